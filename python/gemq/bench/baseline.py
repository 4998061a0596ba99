"""Run 16-bit experts as other programs do, as the baseline for packed experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GATHER = "gemq_gather_einsum"
# name on the command line: transformers' implementation
IMPLEMENTATIONS = {
    "grouped_mm": "grouped_mm", "batched_mm": "batched_mm", "gather": GATHER, "eager": "eager",
}


def gather_einsum(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``[T, H] -> [T, H]``: gather the chosen experts' weights and multiply by einsum, as the GEMQ authors' decode
    script does."""
    gate, up = torch.einsum("th,tknh->tkn", hidden, module.gate_up_proj[top_k_index]).chunk(2, dim=-1)
    out = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, module.down_proj[top_k_index])
    return torch.einsum("tkh,tk->th", out, top_k_weights.to(out.dtype))


PREFILL = "grouped_mm"


def use_experts(model: Any, name: str) -> None:
    """Run the unquantized experts of ``model`` by one of :data:`IMPLEMENTATIONS`.

    Long prompts are best run by :data:`PREFILL`: gathering implementations copy an expert for every token.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name not in IMPLEMENTATIONS:
        raise ValueError(f"baseline must be one of {', '.join(IMPLEMENTATIONS)} or all, got {name!r}")
    if name == "gather":
        ALL_EXPERTS_FUNCTIONS.register(GATHER, gather_einsum)
    model.set_experts_implementation(IMPLEMENTATIONS[name])
