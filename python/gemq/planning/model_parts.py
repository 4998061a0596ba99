"""Count the parts of a model without any storage: the numbers that every prediction is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from gemq.model_config import skeleton
from gemq.models import MoeModel, describe
from gemq.packed_model import kept_in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def meta_model(config: PreTrainedConfig) -> nn.Module:
    """The unquantized model of a transformers config, without any storage; what the family keeps in float32 is that."""
    model: Any = skeleton(config).eval().requires_grad_(False)
    for name in kept_in_float32(model):
        tensor = model.get_parameter_or_buffer(name)
        tensor.data = tensor.data.float()
    return model


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: its ``parameters``, the shapes ``(n, k)`` of the linears that are quantized (attention,
    dense MLP, shared expert), whether it has routed experts, the width of its dense or shared MLP (0 without), and
    the width of what its attention mixes (heads x head size)."""

    parameters: int
    linears: tuple[tuple[int, int], ...]
    routed: bool
    mlp: int
    attention: int


@dataclass(frozen=True)
class ModelParts:
    """Sizes of a model, in elements. ``outside`` are the parameters of embeddings, head and last norm, ``expert`` those
    of one routed expert, which takes ``expert_hidden`` numbers a token: ``hidden``, but for latent widths."""

    parameters: int
    outside: int
    layers: tuple[LayerParts, ...]
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    vocabulary: int
    expert: int
    expert_hidden: int

    @property
    def expert_rows(self) -> int:
        """Rows of a routed expert's first projection: gate and up, or up alone."""
        return self.expert // self.expert_hidden - self.intermediate

    @property
    def moe_layers(self) -> int:
        """Decoder layers with routed experts."""
        return sum(layer.routed for layer in self.layers)

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest decoder layer."""
        return max(layer.parameters for layer in self.layers)

    @property
    def quantizable(self) -> int:
        """Parameters of all that is quantized or tuned: experts, routers, linears."""
        linears = sum(n * k for layer in self.layers for n, k in layer.linears)
        return linears + self.moe_layers * self.experts * (self.expert + self.hidden)

    def active(self, layer: LayerParts) -> int:
        """Parameters of a decoder layer that one token is multiplied by."""
        idle = (self.experts - self.top_k) * self.expert if layer.routed else 0
        return layer.parameters - idle


def _mixed_width(linears: dict[str, nn.Linear]) -> int:
    # the projection behind the attention: o_proj, or out_proj of linear attention
    found = [m.in_features for path, m in linears.items() if path.rpartition(".")[2] in ("o_proj", "out_proj")]
    return max(found, default=0)


def _layer(moe: MoeModel, index: int, module: nn.Module) -> LayerParts:
    prefix = f"{moe.layer_path(index)}."
    attention = {p: m for p, m in moe.attention.items() if p.startswith(prefix)}
    dense = [m for p, m in moe.dense.items() if p.startswith(prefix)]
    block = moe.moe_at(index)
    if block is not None and block.shared is not None:
        dense = list(block.shared_linears().values())
    linears = [(m.out_features, m.in_features) for m in [*attention.values(), *dense]]
    width = dense[-1].in_features if dense else 0
    parameters = sum(p.numel() for p in module.parameters())
    return LayerParts(parameters, tuple(linears), block is not None, width, _mixed_width(attention))


def count_parts(moe: MoeModel) -> ModelParts:
    """The :class:`ModelParts` of a located model, on any device."""
    layers = tuple(_layer(moe, index, module) for index, module in enumerate(moe.layers))
    parameters = sum(p.numel() for p in moe.model.parameters())
    outside = parameters - sum(layer.parameters for layer in layers)
    model: Any = moe.model
    vocabulary, hidden = model.get_input_embeddings().num_embeddings, moe.routers[0].shape[1]
    return ModelParts(
        parameters, outside, layers, hidden, moe.intermediate, moe.num_experts, moe.top_k, vocabulary,
        moe.expert_parameters, moe.form.hidden,
    )


def located(config: PreTrainedConfig) -> MoeModel:
    """The model of a transformers config without storage, located. Raises
    :class:`gemq.errors.UnsupportedModelError`."""
    return describe(meta_model(config))
