"""Find the experts, routers, shared experts and attention of a transformers MoE model.

transformers 5 fuses the experts of a layer into one module, ``mlp.experts``, with ``gate_up_proj [E, 2I, H]``
(gate first) and ``down_proj [E, H, I]``, called as ``experts(hidden [T, H], top_k_index [T, k],
top_k_weights [T, k])``. Everything is located by these attributes and shapes; ``SUPPORTED`` lists the
architectures for which this was tested, ``docs/families.md`` what is special in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from gemq.errors import UnsupportedModelError
from gemq.format import UNQUANTIZED
from gemq.widths import Widths

SUPPORTED = (
    "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
)
# known, and different in a way that is not handled
REFUSED = {
    "gpt_oss": "its experts have biases, transposed weights with gate and up interleaved, and a clamped activation "
    "that is not SiLU(gate) * up",
}
# the token mixers of a decoder layer, and their linears that stay as they are: Qwen3-Next's in_proj_ba has two rows a
# head, which set how fast the recurrent state decays
_MIXERS = ("self_attn", "linear_attn")
_KEPT_LINEARS = ("in_proj_ba",)
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MoeLayer:
    """One MoE block: decoder layer ``index``, module ``path``, and its parts."""

    index: int
    path: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module
    shared: nn.Module | None
    shared_path: str | None
    shared_gate: nn.Module | None

    @property
    def router_path(self) -> str:
        """The router's module path."""
        return f"{self.path}.gate"

    def shared_linears(self) -> dict[str, nn.Linear]:
        """Gate, up and down projection of the shared expert by module path; empty without one."""
        if self.shared is None:
            return {}
        return {f"{self.shared_path}.{name}": getattr(self.shared, name) for name in _MLP_LINEARS}


@dataclass(frozen=True)
class MoeModel:
    """A supported model, located. ``attention`` and ``dense`` map module paths of linears to the modules."""

    model: nn.Module
    decoder: nn.Module
    decoder_path: str
    layers: list[nn.Module]
    moe: list[MoeLayer]
    attention: dict[str, nn.Linear]
    dense: dict[str, nn.Linear]
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def routers(self) -> list[nn.Parameter]:
        """The router weights ``[E, H]`` of every MoE layer, in layer order."""
        return [cast(nn.Parameter, layer.router.weight) for layer in self.moe]

    @property
    def shared_multiple(self) -> float:
        """S: the width of a layer's merged shared expert in units of a routed expert; 0 without one."""
        shared: Any = self.moe[0].shared
        return 0.0 if shared is None else shared.gate_proj.out_features / self.intermediate

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.intermediate

    def moe_at(self, index: int) -> MoeLayer | None:
        """The MoE block of decoder layer ``index``; None if that is dense."""
        return next((layer for layer in self.moe if layer.index == index), None)

    def layer_path(self, index: int) -> str:
        """Module path of a decoder layer."""
        return f"{self.decoder_path}.layers.{index}"

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear that can be quantized, by module path: attention, dense MLPs, shared experts."""
        shared = {path: linear for layer in self.moe for path, linear in layer.shared_linears().items()}
        return self.attention | self.dense | shared

    def quantized_linears(self, widths: Widths) -> dict[str, tuple[nn.Linear, int]]:
        """The linears that ``widths`` quantizes, and the bits of each. Raises ``ValueError`` for an exception that is
        no linear of the model, and for a layer whose shared expert has no width."""
        found = dict.fromkeys(self.attention, widths.attention) | dict.fromkeys(self.dense, widths.dense)
        for layer in self.moe:
            if layer.shared is not None and layer.index not in widths.shared:
                raise ValueError(f"no width for the shared expert of decoder layer {layer.index}")
            found |= dict.fromkeys(layer.shared_linears(), widths.shared.get(layer.index, UNQUANTIZED))
        unknown = sorted(widths.linears.keys() - found.keys())
        if unknown:
            raise ValueError(f"a width for {unknown[0]!r}, which is no linear of the model")
        modules, found = self.linears(), found | widths.linears
        return {path: (modules[path], bits) for path, bits in found.items() if bits < UNQUANTIZED}


def _decoder(model: nn.Module) -> tuple[str, Any]:
    prefix = getattr(model, "base_model_prefix", "")
    decoder = getattr(model, prefix, None) if prefix else None
    if decoder is None or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(f"{type(model).__name__} is not supported yet: it has no decoder.layers list")
    return prefix, decoder


def shared_expert(block: nn.Module) -> tuple[str | None, nn.Module | None]:
    """The name and module of a block's shared expert, None without one; one of no width is none."""
    for name in ("shared_experts", "shared_expert"):
        module = getattr(block, name, None)
        width = getattr(getattr(module, "gate_proj", None), "out_features", None)
        if module is not None and width != 0:
            return name, module
    return None, None


def _refuse_unknown_structure(path: str, block: Any) -> None:
    experts = block.experts
    names = {name for name, _ in experts.named_parameters()}
    if names != {"gate_up_proj", "down_proj"}:
        raise UnsupportedModelError(f"{path}.experts is not supported yet: it holds {sorted(names)}")
    count, double, hidden = experts.gate_up_proj.shape
    if tuple(experts.down_proj.shape) != (count, hidden, double // 2):
        raise UnsupportedModelError(
            f"{path}.experts is not supported yet: gate_up_proj {list(experts.gate_up_proj.shape)} and down_proj "
            f"{list(experts.down_proj.shape)} are not [E, 2I, H] and [E, H, I]"
        )
    activation = type(getattr(experts, "act_fn", None)).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        raise UnsupportedModelError(f"{path}.experts is not supported yet: its activation is {activation}, not SiLU")
    if tuple(getattr(block.gate, "weight", experts.down_proj).shape) != (count, hidden):
        raise UnsupportedModelError(f"{path}.gate is not supported yet: it has no weight [{count}, {hidden}]")
    _, shared = shared_expert(block)
    if shared is not None and not all(isinstance(getattr(shared, n, None), nn.Linear) for n in _MLP_LINEARS):
        raise UnsupportedModelError(f"{path}: its shared expert is not a gated MLP")


def _moe_layer(index: int, path: str, block: Any) -> MoeLayer:
    name, shared = shared_expert(block)
    return MoeLayer(
        index, path, block, block.experts, block.gate, shared, None if name is None else f"{path}.{name}",
        None if name is None else getattr(block, "shared_expert_gate", None),
    )


def _linears(path: str, module: nn.Module) -> dict[str, nn.Linear]:
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    return {f"{path}.{name}": child for name, child in linears.items() if name not in _KEPT_LINEARS}


def _mixer(path: str, layer: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a decoder layer's attention, full or linear."""
    for name in _MIXERS:
        if isinstance(getattr(layer, name, None), nn.Module):
            return _linears(f"{path}.{name}", getattr(layer, name))
    raise UnsupportedModelError(f"{path} is not supported yet: it has none of {', '.join(_MIXERS)}")


def check_supported(config: Any) -> None:
    """Raise :class:`UnsupportedModelError` unless the transformers config is of a supported architecture."""
    kind = getattr(config, "model_type", None)
    if kind in REFUSED:
        raise UnsupportedModelError(f"model type {kind!r} is not supported: {REFUSED[kind]}")
    if kind not in SUPPORTED:
        raise UnsupportedModelError(f"model type {kind!r} is not supported yet; supported: {', '.join(SUPPORTED)}")


def describe(model: nn.Module) -> MoeModel:
    """Locate the parts of an unquantized transformers MoE causal language model.

    Raises :class:`gemq.errors.UnsupportedModelError` naming what is missing or different.
    """
    config: Any = model.config
    check_supported(config)
    prefix, decoder = _decoder(model)
    moe: list[MoeLayer] = []
    attention: dict[str, nn.Linear] = {}
    dense: dict[str, nn.Linear] = {}
    for index, layer in enumerate(decoder.layers):
        path = f"{prefix}.layers.{index}"
        attention |= _mixer(path, layer)
        block = layer.mlp
        if hasattr(block, "experts"):
            _refuse_unknown_structure(f"{path}.mlp", block)
            moe.append(_moe_layer(index, f"{path}.mlp", block))
        else:
            dense |= _linears(f"{path}.mlp", block)
    if not moe:
        raise UnsupportedModelError(f"{type(model).__name__} has no MoE layer")
    shapes = {tuple(cast(Tensor, m.experts.gate_up_proj).shape) for m in moe}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"MoE layers of different shapes are not supported yet: {sorted(shapes)}")
    count, double, hidden = shapes.pop()
    return MoeModel(
        model, decoder, prefix, list(decoder.layers), moe, attention, dense, count,
        config.num_experts_per_tok, hidden, double // 2,
    )
