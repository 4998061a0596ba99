"""A quantized decoder layer as a run keeps it: packed buffers by module path, widths, reports.

The buffers are those of the checkpoint (canonical layout). Read back they give the packed modules, or the dequantized
weights, bit for bit those that the quantizer left in the model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.algorithms.gptq import GptqReport
from gemq.algorithms.matrices import QuantizedWeights
from gemq.engine.source import Source
from gemq.engine.stored_experts import PackedProjection
from gemq.models import MoeModel
from gemq.nn import LowBitExperts, LowBitLinear
from gemq.nn.experts import PROJECTIONS
from gemq.ops import unpack
from gemq.packed_model import packed_skeleton
from gemq.reference.grid import dequantize_codes
from gemq.tensor_files import check_finite
from gemq.widths import Widths


@dataclass
class LayerRecord:
    """Packed modules of one decoder layer by module path, and GPTQ's report per matrix."""

    modules: dict[str, LowBitExperts | LowBitLinear]
    reports: dict[str, GptqReport] = field(default_factory=dict)

    def contents(self) -> tuple[dict[str, Tensor], dict[str, list]]:
        """Return the buffers by name, on the CPU, and the reports as JSON. Raises :class:`gemq.errors.NumberError` for
        numbers that are not finite."""
        tensors = {
            f"{name}.{leaf}": check_finite(f"{name}.{leaf}", buffer.cpu())
            for name, module in self.modules.items()
            for leaf, buffer in module.named_buffers()
        }
        return tensors, {name: list(asdict(report).values()) for name, report in self.reports.items()}


def record_of(moe: MoeModel, weights: QuantizedWeights) -> LayerRecord:
    """Pack what was quantized of a loaded decoder layer."""
    modules: dict[str, LowBitExperts | LowBitLinear] = {}
    for layer in moe.moe:
        if layer.index in weights.stacks:
            gate_up, down = weights.stacks[layer.index]
            form = layer.form
            modules[f"{layer.path}.experts"] = LowBitExperts.from_stacks(
                gate_up, down, moe.hidden, moe.intermediate, weights.group_size, activation=form.activation,
                interleaved=form.interleaved, first=form.first,
            )
    for path, (codes, meta, width) in weights.linears.items():
        group = codes.shape[1] // meta.shape[1]
        linear: Any = moe.model.get_submodule(path)
        modules[path] = LowBitLinear.from_codes(codes, meta, width, group, linear.bias)
    return LayerRecord(modules, weights.reports)


def record_from(
    contents: tuple[dict[str, Tensor], Any] | None, moe: MoeModel, index: int, widths: Widths, group_size: int
) -> LayerRecord | None:
    """Build the record of layer ``index`` from its :meth:`LayerRecord.contents`. None if they are None or of other
    widths."""
    if contents is None:
        return None
    tensors, reports = contents
    modules = packed_skeleton(moe, widths, group_size, "meta", f"{moe.layer_path(index)}.")
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
            gate_up, down = (PackedProjection(module, name, source.dtype, source.device) for name in PROJECTIONS)
            source.experts[index] = gate_up, down


def _linear(module: LowBitLinear, dtype: torch.dtype) -> Tensor:
    n, k = module.out_features, module.in_features
    codes = unpack(module.weight_codes.view(n, -1), module.bits, k)
    return dequantize_codes(codes, module.weight_meta.view(n, -1, 2), dtype)
