"""Round the embedding and the head of a model to nearest, before its layers are quantized on what comes out of them.

Their inputs are token numbers, and hidden states that no layer has quantized yet, so nothing is propagated: every group
of a row gets the range of the least squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.engine.layer_records import LayerRecord
from gemq.engine.layers import Weights
from gemq.engine.source import OUTSIDE, Source
from gemq.errors import NumberError
from gemq.nn import LowBitEmbedding, LowBitLinear, TiedHead
from gemq.ops import pack
from gemq.ops.gptq import gptq_group
from gemq.packed_model import packed_ends
from gemq.widths import Widths

# weights that are rounded at a time: their float32 form, errors and codes are held besides
_AT_ONCE = 1 << 23


@torch.no_grad()
def round_ends(source: Source, widths: Widths, group_size: int) -> LayerRecord:
    """The ends of ``source``, packed at the widths that are below 16.

    Raises :class:`NumberError` naming the matrix whose weights are not finite or beyond float16's range.
    """
    with Weights(source).loaded(OUTSIDE):
        modules = packed_ends(source.moe, widths, group_size, source.device)
        for path, module in modules.items():
            if isinstance(module, (LowBitEmbedding, LowBitLinear)) and not isinstance(module, TiedHead):
                try:
                    _round(source.model.get_parameter_or_buffer(f"{path}.weight"), module)
                except ValueError as error:
                    raise NumberError(f"{path}.weight: {error}") from error
    return LayerRecord(modules)


def _round(weight: Tensor, module: LowBitEmbedding | LowBitLinear) -> None:
    """Fill the canonical buffers of ``module``, some rows of ``weight [n, k]`` at a time."""
    bits, n, k, group_size = module.matrix
    codes, meta = module.weight_codes.view(n, -1), module.weight_meta.view(n, -1, 2)
    # the column loop of GPTQ over groups that have nothing to hand on, because it is compiled
    nothing = torch.eye(group_size, device=weight.device)[None]
    width, rows = torch.tensor([bits], device=weight.device), max(_AT_ONCE // k, 1)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        groups = weight[part].float().reshape(1, -1, group_size)
        found, pairs, _ = gptq_group(groups, nothing, width, "mse", bits + 1)
        codes[part], meta[part] = pack(found.view(-1, k), bits), pairs.view(-1, k // group_size, 2)
