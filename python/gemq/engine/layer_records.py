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
from gemq.engine.source import OUTSIDE, Source
from gemq.engine.stored_experts import PackedProjection
from gemq.models import MoeModel, Packed
from gemq.nn import LowBitEmbedding, LowBitExperts, LowBitLinear, TiedHead
from gemq.nn.experts import PROJECTIONS
from gemq.ops import unpack
from gemq.packed_model import packed_ends, packed_skeleton
from gemq.reference.grid import dequantize_codes
from gemq.tensor_files import check_finite
from gemq.widths import Widths

# weights that are dequantized at a time: what they pass through in float32 would be several copies of a head
_AT_ONCE = 1 << 24


@dataclass
class LayerRecord:
    """Packed modules of one decoder layer, or of embedding and head, by module path, and GPTQ's report per matrix."""

    modules: dict[str, Packed]
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
    modules: dict[str, Packed] = {}
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
    """Build the record of unit ``index``, a layer or :data:`gemq.engine.source.OUTSIDE`, from its
    :meth:`LayerRecord.contents`. None if they are None or of other widths."""
    if contents is None:
        return None
    tensors, reports = contents
    if index == OUTSIDE:
        modules = packed_ends(moe, widths, group_size, "meta")
    else:
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
    """Load the dequantized weights of a record into unit ``index`` of ``source``, which was loaded without them."""
    for path, module in record.modules.items():
        if isinstance(module, TiedHead):
            source.model.tie_weights()
        elif isinstance(module, (LowBitLinear, LowBitEmbedding)):
            source.put(f"{path}.weight", _linear(module, source.dtype).to(source.device))
        else:
            gate_up, down = (PackedProjection(module, name, source.dtype, source.device) for name in PROJECTIONS)
            source.experts[index] = gate_up, down


def _linear(module: LowBitLinear | LowBitEmbedding, dtype: torch.dtype) -> Tensor:
    bits, n, k, _ = module.matrix
    codes, meta = module.weight_codes.view(n, -1), module.weight_meta.view(n, -1, 2)
    out, rows = codes.new_empty(n, k, dtype=dtype), max(_AT_ONCE // k, 1)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        out[part] = dequantize_codes(unpack(codes[part].contiguous(), bits, k), meta[part], dtype)
    return out
