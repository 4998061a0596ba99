"""A quantized decoder layer as it is kept in a run directory: packed buffers by module path, widths, reports.

The buffers are those of the checkpoint (canonical layout). Read back they give the packed modules, or the dequantized
weights, bit for bit those that the quantizer left in the model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gemq import durable
from gemq.algorithms.gptq import GptqReport
from gemq.algorithms.sequential import BitPlan, QuantizedWeights
from gemq.checkpoint import packed_parts, packed_skeleton
from gemq.engine.experts import PackedStack
from gemq.engine.source import Source
from gemq.models import MoeModel
from gemq.nn import LowBitExperts, LowBitLinear
from gemq.nn.experts import PROJECTIONS
from gemq.ops import unpack
from gemq.packed_config import PackedConfig
from gemq.reference.grid import dequantize_codes
from gemq.tensor_files import check_finite


@dataclass
class LayerRecord:
    """Packed modules of one decoder layer by module path, and GPTQ's report per matrix."""

    modules: dict[str, LowBitExperts | LowBitLinear]
    reports: dict[str, GptqReport] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the record as a sealed file. Raises :class:`gemq.errors.CheckpointError`."""
        tensors = {
            f"{name}.{leaf}": buffer.cpu()
            for name, module in self.modules.items()
            for leaf, buffer in module.named_buffers()
        }
        reports = {name: list(asdict(report).values()) for name, report in self.reports.items()}
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        durable.seal_tensors(path, tensors, reports)


def record_of(moe: MoeModel, weights: QuantizedWeights) -> LayerRecord:
    """Pack what was quantized of a loaded decoder layer."""
    return LayerRecord(packed_parts(moe, weights), weights.reports)


def empty_modules(moe: MoeModel, index: int, plan: BitPlan, group_size: int) -> dict:
    """Packed modules without contents for one decoder layer of a full-precision skeleton."""
    config = PackedConfig.of_plan(plan, group_size, None, None)
    return packed_skeleton(moe.model, config, "meta", f"{moe.decoder_path}.layers.{index}.")


def read_record(
    path: Path, moe: MoeModel, index: int, plan: BitPlan, group_size: int, trusted: bool = False
) -> LayerRecord | None:
    """Read the record that :meth:`LayerRecord.save` wrote, memory-mapped. None if it is absent, torn or of other
    widths. ``trusted``: this process has already checked the whole file."""
    found = durable.unseal_tensors(path, trusted)
    if found is None:
        return None
    tensors, reports = found
    modules = empty_modules(moe, index, plan, group_size)
    for name, module in modules.items():
        for leaf, buffer in list(module.named_buffers()):
            value = tensors.get(f"{name}.{leaf}")
            if value is None or value.shape != buffer.shape:
                return None
            setattr(module, leaf, value)
    return LayerRecord(modules, {name: GptqReport(*values) for name, values in reports.items()})


@torch.no_grad()
def lay_over(record: LayerRecord, source: Source, index: int) -> None:
    """Load the dequantized weights of a record into decoder layer ``index`` of ``source``, which was loaded without
    them."""
    for path, module in record.modules.items():
        if isinstance(module, LowBitLinear):
            source.put(f"{path}.weight", _linear(module, source.dtype).to(source.device))
        else:
            source.experts[index] = tuple(
                PackedStack(module, name, source.dtype, source.device) for name in PROJECTIONS
            )


def _linear(module: LowBitLinear, dtype: torch.dtype) -> Tensor:
    n, k = module.out_features, module.in_features
    codes = unpack(module.weight_codes.view(n, -1), module.bits, k)
    return dequantize_codes(codes, module.weight_meta.view(n, -1, 2), dtype)
