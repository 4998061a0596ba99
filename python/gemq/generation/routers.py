"""Computation of the routers of transformers' models after their logits, by class: their attributes do not tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from gemq.ops.decode import Routing


def routing_of(router: nn.Module) -> Routing | None:
    """Routing rule of a router whose class is known, else None."""
    kind = type(router)
    rule = _RULES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
    return None if rule is None else rule(router)


def _normalized(router: Any) -> Routing:
    return Routing(router.top_k)


def _optional(router: Any) -> Routing:
    return Routing(router.top_k, normalize=router.norm_topk_prob)


def _corrected(router: Any) -> Routing:
    return Routing(
        router.top_k, "sigmoid", router.norm_topk_prob, 1e-20, router.routed_scaling_factor,
        router.e_score_correction_bias, "two_largest", router.num_group, router.topk_group,
    )


def _scaled(router: Any) -> Routing | None:
    """Routing rule of DeepSeek-V2."""
    plain = Routing(router.top_k, normalize=False, scale=router.routed_scaling_factor)
    if router.topk_method == "greedy":
        return plain
    if router.topk_method != "group_limited_greedy":
        return None
    return replace(plain, group_score="largest", groups=router.num_group, kept_groups=router.topk_group)


def _softmax_of_chosen(router: Any) -> Routing:
    """Routing rule of gpt-oss: a softmax over the chosen logits is one over all, normalized."""
    return Routing(router.top_k)


def _scaled_experts(router: Any) -> Routing:
    """Routing rule of Gemma 4."""
    return Routing(router.config.top_k_experts, expert_scale=router.per_expert_scale)


_RULES = {
    "GptOssTopKRouter": _softmax_of_chosen,
    "Gemma4TextRouter": _scaled_experts,
    "Glm4MoeLiteTopkRouter": _corrected,
    "NemotronHTopkRouter": _corrected,
    "Qwen3NextTopKRouter": _optional,
    "Qwen3_5MoeTopKRouter": _normalized,
    "DeepseekV2TopkRouter": _scaled,
    "DeepseekV3TopkRouter": _corrected,
    "Dots1TopkRouter": _corrected,
    "MixtralTopKRouter": _normalized,
    "Qwen2MoeTopKRouter": _optional,
    "Qwen3MoeTopKRouter": _optional,
    "OlmoeTopKRouter": _optional,
    "Glm4MoeTopkRouter": _corrected,
}
