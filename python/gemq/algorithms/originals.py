"""Copies of a model's weights before quantization, from which it is perturbed, quantized and restored."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.models import MoeLayer, MoeModel


class Originals:
    """Copies of every quantizable weight and of the routers, in the model's dtype and on its device."""

    def __init__(self, moe: MoeModel):
        self._moe = moe
        self._experts = {m.index: (m.experts.gate_up_proj, m.experts.down_proj) for m in moe.moe}
        self._experts = {i: tuple(p.detach().clone() for p in pair) for i, pair in self._experts.items()}
        self._routers = [p.detach().clone() for p in moe.routers]
        self._linears = {path: module.weight.detach().clone() for path, module in self._modules().items()}

    def _modules(self) -> dict:
        shared = {}
        for layer in self._moe.moe:
            if layer.shared is not None:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    shared[f"{layer.shared_path}.{name}"] = getattr(layer.shared, name)
        return self._moe.attention | self._moe.dense | shared

    def experts(self, layer: MoeLayer) -> tuple[Tensor, Tensor]:
        """``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]`` of a layer."""
        return self._experts[layer.index]

    def linear(self, path: str) -> Tensor:
        """The weight ``[out, in]`` of the linear at ``path``."""
        return self._linears[path]

    def shared(self, layer: MoeLayer) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down weights of a layer's shared expert."""
        return tuple(self._linears[f"{layer.shared_path}.{n}"] for n in ("gate_proj", "up_proj", "down_proj"))

    @torch.no_grad()
    def restore(self) -> None:
        """Copy all original weights back into the model."""
        for layer in self._moe.moe:
            gate_up, down = self._experts[layer.index]
            layer.experts.gate_up_proj.copy_(gate_up)
            layer.experts.down_proj.copy_(down)
        for parameter, value in zip(self._moe.routers, self._routers, strict=True):
            parameter.copy_(value)
        for path, module in self._modules().items():
            module.weight.copy_(self._linears[path])
