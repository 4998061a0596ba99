"""Packed models with random weights of the families whose steps are compared, and the logits of their steps."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from listed_models import listed_model
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from gemq.bench.random_model import build_packed
from gemq.generation import Decoding, GenerationOptions
from gemq.models import describe
from gemq.packed_config import PackedConfig
from gemq.widths import Widths

EXPERTS = (2, 0, 1, 3)


@lru_cache
def step_model(
    kind: str, attention: int = 4, dtype: torch.dtype = torch.float32, experts: tuple[int, ...] = EXPERTS
) -> nn.Module:
    """A tiny model of random packed weights; an expert of 0 bits among others; routers that differ between tokens."""
    dense = tiny_model(kind, experts=len(experts)) if kind in FAMILIES else listed_model(kind)
    moe = describe(dense)
    rows = {layer.index: list(experts[layer.index % 3 :] + experts[: layer.index % 3]) for layer in moe.moe}
    shared = {n: attention for n in rows} if moe.shared_multiple else {}
    plan = PackedConfig(Widths(rows, shared, attention, attention), group_size=32)
    model = build_packed(dense.config, plan, dtype, torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(1)
    own = dict(dense.named_parameters()) | dict(dense.named_buffers())
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("_meta"):
                tensor.mul_(4)
            elif name in own and own[name].shape == tensor.shape:
                tensor.copy_(own[name])
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("embed_tokens.weight", "embeddings.weight", "lm_head.weight")):
                tensor.normal_(0, 0.5, generator=generator)
            elif tensor.dim() == 1 and name.endswith(("norm.weight", "layernorm.weight", "norm_f.weight", "_scale")):
                tensor.normal_(1, 0.2, generator=generator)
            elif name.endswith(("bias", "sinks", "dt_bias", "A_log")) and tensor.is_floating_point():
                tensor.normal_(0, 0.3, generator=generator)
            elif name.endswith("layer_scalar"):
                tensor.fill_(0.7)
    return model


class Recorded(Decoding):
    """A decoding that keeps the logits of every step."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.found: list[Tensor] = []

    def _set_up(self) -> None:
        super()._set_up()
        step = self.step

        def record(*arguments: Any) -> Tensor:
            out = step(*arguments)
            self.found.append(out.float().clone())
            return out

        self.step = record


@torch.inference_mode()
def step_logits(
    model: nn.Module, ids: Tensor, mask: Tensor | None, step: str, new: int, compile: str = "none"
) -> tuple[Tensor, Tensor]:
    """``[new - 1, B, V]`` logits of all steps and the tokens ``[B, new]``."""
    options = GenerationOptions(new, ignore_eos=True)
    run = Recorded(model, ids, mask, options, compile=compile, step=step)
    tokens = torch.stack(list(run), 1)
    assert run.step_kind == step, run.step_reason
    return torch.stack(run.found), tokens
