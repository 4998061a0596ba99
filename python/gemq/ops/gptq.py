"""One group of GPTQ's column loop: compiled on the CPU, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq._core import core
from gemq.reference import gptq_group as reference_gptq_group
from gemq.reference.grid import CLIPS, check_weights


def gptq_group(
    block: Tensor, factor: Tensor, bits: Tensor, clip: str = "none", propagate_from: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`gemq.reference.gptq_group`, for float32 ``block`` and ``factor`` and int32 ``bits``.

    Raises ``ValueError`` for an unknown ``clip`` or weights that are not finite or beyond float16's range.
    """
    if block.device.type != "cpu":
        return reference_gptq_group(block, factor, bits, clip, propagate_from)
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    check_weights(block)
    block, factor, bits = block.float().contiguous(), factor.float().contiguous(), bits.to(torch.int32).contiguous()
    matrices, n, group = block.shape
    codes = torch.empty(block.shape, dtype=torch.uint8)
    meta = torch.empty(matrices, n, 2, dtype=torch.float16)
    errors = torch.empty_like(block)
    core().gptq_group_cpu(
        block.data_ptr(), factor.data_ptr(), bits.data_ptr(), codes.data_ptr(), meta.data_ptr(), errors.data_ptr(),
        matrices, n, group, CLIPS.index(clip), propagate_from, torch.get_num_threads(),
    )
    return codes, meta, errors
