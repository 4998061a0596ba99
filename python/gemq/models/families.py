"""Find the experts, routers, shared experts and attention of a transformers MoE model.

transformers 5 fuses the experts of a layer into one module, ``mlp.experts``, with ``gate_up_proj [E, 2I, H]``
(gate first) and ``down_proj [E, H, I]``, called as ``experts(hidden [T, H], top_k_index [T, k],
top_k_weights [T, k])``. Everything is located by these attributes and shapes; ``SUPPORTED`` lists the
architectures for which this was tested, ``docs/families.md`` what is special in each.
"""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from torch import nn
from transformers import AutoConfig

from gemq.activation import SILU, Activation
from gemq.config_fields import field
from gemq.errors import UnsupportedModelError
from gemq.format import GROUP_SIZES, UNQUANTIZED
from gemq.model_config import skeleton
from gemq.models.experts import ExpertsForm, experts_form, mlp_activation
from gemq.models.forward import decoder_of
from gemq.transformers_versions import lacks, needed
from gemq.widths import Widths

_log = logging.getLogger("gemq")
# compared with transformers' own models; another type that has their structure works with a warning
SUPPORTED = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "gemma4_text", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe_text", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "kolibri1", "laguna", "lfm2_moe",
    "llama4_text", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "mistral4", "mixtral",
    "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    "qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen4_exp_text", "solar_open", "step3p5",
)
# known, and different in a way that is not handled
REFUSED = {
    "minimax": "its lightning attention keeps its state in a cache of its own",
}
# names of a decoder layer's token mixer, of its MoE block or dense MLP, of a block's router, and of a router's top-k
_MIXERS = ("self_attn", "linear_attn", "mamba", "conv")
_BLOCKS = ("mlp", "feed_forward", "block_sparse_moe")
_ROUTERS = ("gate", "router", "gate.wg", "router.gate", "router.classifier", "router.proj")
# a config's number of experts
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
# fields of a config that, above 0, make a layer depend on more than the output of the one before it
_NOT_LAYERWISE = {
    "num_kv_shared_layers": "its last layers use keys and values of earlier ones",
    "hidden_size_per_layer_input": "each layer takes an embedding of every token besides",
}
# arguments of a layer that are no function of the sizes of a batch
_HANDED_ON = {"prev_topk_indices": "what the layer before it chose", "input_ids": "the tokens themselves"}
_TOP_K = ("num_experts_per_tok", "moe_topk", "top_k_experts")
# linears of a mixer that stay as they are, because an error in them grows from token to token: rows that set how fast a
# recurrent state decays (in_proj_ba, in_proj_a, in_proj_b, b_proj; x_proj and dt_proj of Mamba), and the indexer's
# weights, which choose the tokens that attention sees
_KEPT_LINEARS = ("in_proj_ba", "in_proj_a", "in_proj_b", "x_proj", "dt_proj", "b_proj", "indexer.weights_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
_UNGATED_LINEARS = _MLP_LINEARS[1:]
_MERGED_LINEARS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class MoeLayer:
    """One MoE block: decoder layer ``index``, module ``path``, and its parts."""

    index: int
    path: str
    block: nn.Module
    experts: nn.Module
    form: ExpertsForm
    router: nn.Module
    router_path: str
    shared: nn.Module | None
    shared_path: str | None
    shared_gate: nn.Module | None
    shared_activation: Activation = SILU

    @property
    def latent(self) -> bool:
        """True if the routed experts work in another width than the block, and than the shared expert."""
        shared = list(self.shared_linears().values())
        return bool(shared) and shared[-1].out_features != self.form.hidden

    def shared_linears(self) -> dict[str, nn.Linear]:
        """Gate (if the activation has one), up and down projection of the shared expert by module path; empty without
        one."""
        if self.shared is None:
            return {}
        names = _shared_names(self.shared, self.shared_activation)
        return {f"{self.shared_path}.{name}": getattr(self.shared, name) for name in names}

    def stacks(self) -> dict[str, str]:
        """Projections by the paths of the parameters that hold them."""
        return {f"{self.path}.experts.{own}": name for name, own in self.form.names.items()}


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
        linears = list(self.moe[0].shared_linears().values())
        return linears[-1].in_features / self.intermediate if linears else 0.0

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return self.form.parameters

    @property
    def form(self) -> ExpertsForm:
        """Storage and activation of the experts, alike in all layers."""
        return self.moe[0].form

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


def _decoder(model: Any) -> tuple[str, Any]:
    decoder = decoder_of(model)
    path = next((name for name, module in model.named_modules() if module is decoder), None)
    if not path or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(f"{type(model).__name__} is not supported yet: it has no decoder.layers list")
    return path, decoder


def _child(module: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    """The first of the names, dotted ones included, that is a submodule of ``module``, and that submodule."""
    for name in names:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            return name, found
    return None


def _router(path: str, block: Any, experts: int, hidden: int) -> tuple[str, nn.Module]:
    """Name and module of a block's router, which has a weight ``[experts, hidden]``."""
    shape = (experts, hidden)
    for found in filter(None, (_child(block, (name,)) for name in _ROUTERS)):
        if tuple(getattr(getattr(found[1], "weight", None), "shape", ())) == shape:
            return found
    raise UnsupportedModelError(
        f"{path} is not supported yet: none of {', '.join(_ROUTERS)} has a weight {list(shape)}"
    )


def shared_expert(block: nn.Module) -> tuple[str | None, nn.Module | None]:
    """The name and module of a block's shared expert, None without one; one of no width is none."""
    for name in ("shared_experts", "shared_expert", "shared_mlp"):
        module = getattr(block, name, None)
        width = getattr(getattr(module, "down_proj", None), "in_features", None)
        if module is not None and width != 0:
            return name, module
    return None, None


def _shared_activation(path: str, shared: nn.Module | None) -> Activation:
    """The activation of a shared expert, which is an MLP of linears. Raises :class:`UnsupportedModelError`."""
    if shared is None:
        return SILU
    found = mlp_activation(shared)
    if found is None:
        kind = type(getattr(shared, "act_fn", None)).__name__
        raise UnsupportedModelError(f"{path} is not supported yet: its shared expert has the activation {kind}")
    names = _shared_names(shared, found)
    if not all(isinstance(getattr(shared, n, None), nn.Linear) for n in names):
        raise UnsupportedModelError(f"{path} is not supported yet: its shared expert is no MLP of {', '.join(names)}")
    return found


def _shared_names(shared: nn.Module, activation: Activation) -> tuple[str, ...]:
    """The linears of a shared expert: gate (if there is one) and up, together or not, and down."""
    if not activation.gated:
        return _UNGATED_LINEARS
    return _MERGED_LINEARS if isinstance(getattr(shared, "gate_up_proj", None), nn.Linear) else _MLP_LINEARS


def _looks(experts: Any) -> tuple:
    """Class, shapes and activation of an experts module: alike in modules of one form."""
    shapes = {name: parameter.shape for name, parameter in experts.named_parameters(recurse=False)}
    act = getattr(experts, "act_fn", None)
    return type(experts), shapes, getattr(act, "__name__", type(act)), getattr(experts, "limit", None)


def _moe_layer(index: int, path: str, block: Any, config: Any, form: ExpertsForm) -> MoeLayer:
    name, shared = shared_expert(block)
    router_name, router = _router(path, block, form.experts, config.hidden_size)
    return MoeLayer(
        index, path, block, block.experts, form, router, f"{path}.{router_name}", shared,
        None if name is None else f"{path}.{name}",
        None if name is None else getattr(block, "shared_expert_gate", None), _shared_activation(path, shared),
    )


def _linears(path: str, module: nn.Module) -> dict[str, nn.Linear]:
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    # a linear whose columns no group divides stays as it is, too
    return {
        f"{path}.{name}": child for name, child in linears.items()
        if name not in _KEPT_LINEARS and child.in_features % min(GROUP_SIZES) == 0
    }


@dataclass(frozen=True)
class _Parts:
    """Parts of a decoder layer: the linears of its mixer and of dense MLPs, and its MoE block at ``path``."""

    path: str
    mixer: dict[str, nn.Linear]
    dense: dict[str, nn.Linear]
    block: Any = None


def _parts(path: str, layer: Any) -> _Parts:
    if isinstance(getattr(layer, "mixer", None), nn.Module):
        return _one_of_them(f"{path}.mixer", layer.mixer)
    found = _child(layer, _MIXERS)
    if found is None:
        raise UnsupportedModelError(f"{path} is not supported yet: it has none of {', '.join(_MIXERS)}")
    mixer = _linears(f"{path}.{found[0]}", found[1])
    found = _child(layer, _BLOCKS)
    if found is None:
        raise UnsupportedModelError(f"{path} is not supported yet: it has none of {', '.join(_BLOCKS)}")
    name, block = found
    if hasattr(block, "experts"):
        # Granite's shared expert stands beside the block, and reads what it reads
        beside = getattr(layer, "shared_mlp", None)
        dense = _linears(f"{path}.shared_mlp", beside) if isinstance(beside, nn.Module) else {}
        return _Parts(f"{path}.{name}", mixer, dense, block)
    # Gemma 4 has experts and router on the layer, beside a dense MLP
    own = layer if isinstance(getattr(layer, "experts", None), nn.Module) else None
    return _Parts(path, mixer, _linears(f"{path}.{name}", block), own)


def _one_of_them(path: str, mixer: Any) -> _Parts:
    """A layer of Nemotron-H is one thing: attention, Mamba, a dense MLP or a MoE block."""
    if hasattr(mixer, "experts"):
        return _Parts(path, {}, {}, mixer)
    linears = _linears(path, mixer)
    return _Parts(path, {}, linears) if hasattr(mixer, "up_proj") else _Parts(path, linears, {})


def _top_k(config: Any) -> int:
    value = next(found for name in _TOP_K if (found := field(config, name)) is not None)
    return value if isinstance(value, int) else value[0]


def check_supported(config: Any) -> None:
    """Raise :class:`UnsupportedModelError` unless the transformers config is of a supported architecture, or makes a
    model of the structure of one."""
    if not _is_listed(config):
        _check_structure(config.get_text_config().model_type, config.to_json_string())


def _is_listed(config: Any) -> bool:
    """True for a type of :data:`SUPPORTED`, False for another with experts. Raises :class:`UnsupportedModelError` for
    what is refused by name, and for types without experts."""
    text = config.get_text_config()
    kind = getattr(text, "model_type", None)
    if kind in REFUSED:
        raise UnsupportedModelError(f"model type {kind!r} is not supported: {REFUSED[kind]}")
    if kind is not None and lacks(kind):
        raise UnsupportedModelError(needed(kind))
    if kind not in SUPPORTED and not any(field(text, name) for name in _COUNTS):
        raise UnsupportedModelError(f"model type {kind!r} is not supported yet; supported: {', '.join(SUPPORTED)}")
    return kind in SUPPORTED


@lru_cache
def _tell_unlisted(kind: str) -> None:
    """Warn, once, that a type fits the structure of others and was not compared."""
    if kind not in SUPPORTED:
        _log.warning(
            "model type %s has the structure of supported types, but was never compared with transformers: check the "
            "quantized model before you rely on it", kind,
        )


@lru_cache
def _check_structure(kind: str, config: str) -> None:
    """Locate the parts of a model without storage, of an unlisted type, made of a config in JSON."""
    data = json.loads(config)
    data.pop("quantization_config", None)
    try:
        describe(skeleton(AutoConfig.for_model(data.pop("model_type"), **data)))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"model type {kind!r} is not supported yet: {error}") from error


def describe(model: nn.Module) -> MoeModel:
    """Locate the parts of an unquantized transformers MoE causal language model.

    Raises :class:`gemq.errors.UnsupportedModelError` naming what is missing or different.
    """
    config: Any = model.config
    _is_listed(config)
    config = config.get_text_config()
    for name, what in _NOT_LAYERWISE.items():
        if field(config, name):
            raise UnsupportedModelError(f"{type(model).__name__} with {name} is not supported yet: {what}")
    prefix, decoder = _decoder(model)
    taken = inspect.signature(type(decoder.layers[0]).forward).parameters
    for name, what in _HANDED_ON.items():
        if name in taken:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not supported yet: its layers take {what} ({name}) besides the output of "
                f"the one before"
            )
    moe: list[MoeLayer] = []
    attention: dict[str, nn.Linear] = {}
    dense: dict[str, nn.Linear] = {}
    form: ExpertsForm | None = None
    for index, layer in enumerate(decoder.layers):
        found = _parts(f"{prefix}.layers.{index}", layer)
        attention |= found.mixer
        dense |= found.dense
        if found.block is not None:
            if form is None or _looks(found.block.experts) != _looks(moe[-1].experts):
                form = experts_form(found.path, found.block.experts, config)
            moe.append(_moe_layer(index, found.path, found.block, config, form))
    if form is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no MoE layer")
    _tell_unlisted(config.model_type)
    forms = {layer.form for layer in moe}
    if len(forms) > 1:
        shapes = sorted((f.experts, f.rows, f.hidden) for f in forms)
        raise UnsupportedModelError(f"MoE layers of different shapes are not supported yet: {shapes}")
    return MoeModel(
        model, decoder, prefix, list(decoder.layers), moe, attention, dense, form.experts, _top_k(config), form.hidden,
        form.intermediate,
    )
