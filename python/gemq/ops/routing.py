"""Router logits to experts and weights, as a torch custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq import reference
from gemq.ops import checks

SCORING = ("softmax", "sigmoid")


@torch.library.custom_op("gemq::topk_routing", mutates_args=())
def _topk_routing(
    logits: Tensor, top_k: int, scoring: str, normalize: bool, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if logits.is_cuda:
        from gemq.triton_kernels import topk

        return topk(logits, top_k, sigmoid=scoring == "sigmoid", normalize=normalize, scale=scale, bias=bias)
    return reference.topk_routing(logits, top_k, scoring=scoring, normalize=normalize, scale=scale, bias=bias)


@_topk_routing.register_fake
def _(logits, top_k, scoring, normalize, scale, bias):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def topk_routing(
    logits: Tensor, top_k: int, *, scoring: str = "softmax", normalize: bool = True, scale: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts of each token and their weights: one kernel on CUDA, torch elsewhere.

    Args:
        logits: ``[T, E]``; float32, float16 or bfloat16. Scores are computed in float32.
        top_k: experts a token, 1..E.
        scoring: ``softmax`` over all experts, or ``sigmoid`` of each.
        normalize: divide the chosen scores by their sum (Mixtral, Qwen3-MoE; not DeepSeek-V2-Lite, Qwen1.5-MoE).
        scale: multiplies the weights at last (DeepSeek's routed scaling factor).
        bias: ``[E]`` or None: added to the scores for the choice alone (DeepSeek-V3).

    Returns:
        ``(weights float32 [T, top_k], ids int32 [T, top_k])``, largest first, the lower index first among equals.
        Not differentiable. A NaN among a token's logits reaches its weights.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option out of the above.
    """
    checks.tensor("logits", logits, dtype=checks.FLOATS, dim=2, contiguous=False)
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be within 1..{experts}, the number of experts, got {top_k}")
    if scoring not in SCORING:
        raise ValueError(f"scoring must be one of {', '.join(SCORING)}, got {scoring!r}")
    if bias is not None:
        checks.tensor("bias", bias, dtype=checks.FLOATS, dim=1, device=logits.device)
        if bias.numel() != experts:
            raise ValueError(f"bias has {bias.numel()} entries for {experts} experts")
    return _topk_routing(logits.contiguous(), top_k, scoring, normalize, float(scale), bias)
