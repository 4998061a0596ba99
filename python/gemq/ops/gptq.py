"""One group of GPTQ's column loop: compiled for the CPU and for CUDA, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq._core import core
from gemq.ops import checks
from gemq.reference import gptq_group as reference_gptq_group
from gemq.reference.grid import CLIPS, check_weights

FP16_MAX = 65504.0


def gptq_group(
    block: Tensor, factor: Tensor, bits: Tensor, clip: str = "none", propagate_from: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`gemq.reference.gptq_group`, for float32 ``block`` and ``factor`` and int32 ``bits``.

    Raises ``ValueError`` for an unknown ``clip``, tensors on different devices, or weights that are not finite or
    beyond float16's range.
    """
    if block.device.type != "cpu" and not (block.is_cuda and core().cuda_built()):
        return reference_gptq_group(block, factor, bits, clip, propagate_from)
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    for name, value in (("factor", factor), ("bits", bits)):
        if value.device != block.device:
            raise ValueError(f"{name} is on {value.device}, block on {block.device}")
    block, factor, bits = block.float().contiguous(), factor.float().contiguous(), bits.to(torch.int32).contiguous()
    low, high = torch.aminmax(block)
    if not -FP16_MAX <= float(low) <= float(high) <= FP16_MAX:  # false for NaN, too
        check_weights(block)
    matrices, n, group = block.shape
    codes = torch.empty_like(block, dtype=torch.uint8)
    meta = torch.empty(matrices, n, 2, dtype=torch.float16, device=block.device)
    errors = torch.empty_like(block)
    core().gptq_group(
        checks.device_code("block", block), *(t.data_ptr() for t in (block, factor, bits, codes, meta, errors)),
        matrices, n, group, CLIPS.index(clip), propagate_from, torch.get_num_threads(),
        torch.cuda.current_stream(block.device).cuda_stream if block.is_cuda else 0,
    )
    return codes, meta, errors
