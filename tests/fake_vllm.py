"""The part of vLLM 0.33.0 that gemq's plug-in meets, in its own words: signatures, abstract methods, loading by name.

``tests/test_serving.py`` compares every signature here with vLLM's sources where they are present. Distributed state is
given instead of read: ``parallel`` sets tensor parallelism of linears and experts and the expert map.
"""

from __future__ import annotations

import enum
import re
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: torch.nn.Module, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer: torch.nn.Module, *args, **kwargs) -> torch.Tensor: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class QuantizationConfig(ABC):
    online_quantization_config = None

    def __init__(self):
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
        return None

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    @staticmethod
    def get_checkpoint_weight_mapper():
        return WeightsMapper(orig_to_new_suffix={".g_idx": None})

    def maybe_update_config(self, model_name, hf_config=None, revision=None):
        return None


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class FusedMoEMethodBase(QuantizeMethodBase):
    def __init__(self, moe):
        super().__init__()
        self.moe = moe
        self.moe_quant_config = None
        self.moe_kernel = None

    @abstractmethod
    def create_weights(
        self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
    ): ...

    def maybe_roundup_sizes(self, hidden_size, intermediate_size_per_partition, act_dtype, moe_parallel_config):
        raise AssertionError("rounding up asks for all-to-all back ends")

    @abstractmethod
    def get_fused_moe_quant_config(self, layer): ...

    @property
    def is_monolithic(self) -> bool:
        return False

    @property
    def supports_eplb(self) -> bool:
        return False

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        raise NotImplementedError


@dataclass
class WeightsMapper:
    orig_to_new_regex: Mapping[re.Pattern, str | None] = field(default_factory=dict)
    orig_to_new_substr: Mapping[str, str | None] = field(default_factory=dict)
    orig_to_new_stacked: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    orig_to_new_suffix: Mapping[str, str | None] = field(default_factory=dict)

    def __or__(self, other):
        names = (f"orig_to_new_{kind}" for kind in ("regex", "substr", "stacked", "suffix"))
        return WeightsMapper(**{name: {**getattr(self, name), **getattr(other, name)} for name in names})

    def apply(self, weights):
        """In the order regex, substring, stacked, suffix; each dictionary in its own order."""
        for name, data in weights:
            for pattern, new in self.orig_to_new_regex.items():
                name = pattern.sub(new, name)
            for old, new in self.orig_to_new_substr.items():
                name = name.replace(old, new, 1)
            shard = None
            for old, (new, found) in self.orig_to_new_stacked.items():
                if old in name:
                    name, shard = name.replace(old, new, 1), found
            if any(name.endswith(s) and new is None for s, new in self.orig_to_new_suffix.items()):
                continue
            if shard is not None:
                data.shard_id = shard
            yield name, data


class MoEActivation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"


@dataclass
class FusedMoEParallelConfig:
    tp_size: int = 1
    tp_rank: int = 0
    use_ep: bool = False


@dataclass
class FusedMoEConfig:
    num_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size: int
    num_local_experts: int
    activation: MoEActivation = MoEActivation.SILU
    moe_parallel_config: FusedMoEParallelConfig = field(default_factory=FusedMoEParallelConfig)
    in_dtype: torch.dtype = torch.float32
    has_bias: bool = False

    @property
    def intermediate_size_per_partition(self) -> int:
        return self.intermediate_size // self.moe_parallel_config.tp_size


class FusedMoEQuantConfig:
    pass


class RoutedExperts(nn.Module):
    """Creates its weights by the quantization method, loads by the mapping of experts, runs it on routed tokens."""

    def __init__(self, layer_name, params_dtype, moe_config, quant_config, expert_map=None, names=("gate_proj",
                 "down_proj", "up_proj")):  # fmt: skip
        super().__init__()
        self.layer_name, self.moe_config, self.quant_config, self.names = layer_name, moe_config, quant_config, names
        self.global_num_experts = moe_config.num_experts
        self.register_buffer("_expert_map", expert_map, persistent=False)
        self.swiglu_limit, self.apply_router_weight_on_input = None, False
        self.quant_method = quant_config.get_quant_method(self, layer_name)
        assert isinstance(self.quant_method, FusedMoEMethodBase)
        sizes = self.quant_method.maybe_roundup_sizes(
            moe_config.hidden_dim, moe_config.intermediate_size_per_partition, moe_config.in_dtype,
            moe_config.moe_parallel_config,
        )
        self.quant_method.create_weights(
            layer=self, num_experts=moe_config.num_local_experts, hidden_size=sizes[0],
            unpadded_hidden_size=moe_config.hidden_dim, intermediate_size_per_partition=sizes[1],
            params_dtype=params_dtype, weight_loader=self.weight_loader, global_num_experts=moe_config.num_experts,
        )

    @property
    def expert_map(self):
        return self._expert_map

    def weight_loader(self, *_, **__):
        raise AssertionError("gemq's parameters have loaders of their own")

    def load_weights(self, weights):
        gate, down, up = self.names
        mapping = [
            (f"experts.{'w2' if role == down else 'w13'}_", f"experts.{e}.{role}.", e, shard)
            for e in range(self.global_num_experts) for shard, role in (("w1", gate), ("w2", down), ("w3", up))
        ]  # fmt: skip
        for name, loaded in weights:
            full = f"{self.layer_name}.{name}"
            for param_name, weight_name, expert, shard in mapping:
                if weight_name not in full:
                    continue
                mapped = full.replace(weight_name, param_name)
                param = getattr(self, mapped.removeprefix(f"{self.layer_name}."))
                for at, one in enumerate(loaded.unsqueeze(0).unbind(), start=expert):
                    done = param.weight_loader(
                        param=param, loaded_weight=one, weight_name=mapped, shard_id=shard, expert_id=at,
                        return_success=True,
                    )
                    if done:
                        yield mapped.removeprefix(f"{self.layer_name}.")

    def forward_modular(self, x, topk_weights, topk_ids):
        assert not self.quant_method.is_monolithic
        return self.quant_method.apply(
            layer=self, x=x, topk_weights=topk_weights, topk_ids=topk_ids, shared_experts=None,
            shared_experts_input=None,
        )


class LinearBase(nn.Module):
    """``tp_size`` divides the outputs of all but a row-parallel layer, which divides its inputs, and a replicated one.

    Keys and values of fewer heads than ranks have ``repeats``: the ranks that share a head.
    """

    def __init__(self, input_size, output_sizes, quant_config, prefix, tp_size=1, row=False, bias=False, tp_rank=0,
                 replicated=False, repeats=1):
        super().__init__()
        self.tp_rank, self.tp_size, self.row, self.repeats = tp_rank, tp_size, row, repeats
        tp_size = 1 if replicated else tp_size
        output_sizes = [size * (repeats if at else 1) for at, size in enumerate(output_sizes)]
        self.input_size_per_partition = input_size // tp_size if row else input_size
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        if self.quant_method is None:
            raise ValueError("All linear layers should support quant method.")
        self.sizes = parts = [size if row else size // tp_size for size in output_sizes]
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=input_size // tp_size if row else input_size,
            output_partition_sizes=parts, input_size=input_size, output_size=sum(output_sizes),
            params_dtype=torch.float32, weight_loader=self.weight_loader,
        )
        self.bias = nn.Parameter(torch.zeros(sum(parts)), requires_grad=False) if bias else None

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        param.data.copy_(loaded_weight)

    def load_weights(self, weights):
        for name, loaded in weights:
            param = getattr(self, name)
            shard = getattr(loaded, "shard_id", None)
            if name != "bias":
                param.weight_loader(param, loaded, shard)
            else:
                at = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)
                start, size = sum(self.sizes[:at]), self.sizes[at]
                if len(loaded) == sum(self.sizes):
                    size = len(loaded)
                first = self.tp_rank * (len(loaded) // size) // self.tp_size * size
                param.data[start : start + size].copy_(loaded[first : first + size])
            yield name

    def forward(self, x):
        bias = None if self.row and self.tp_rank else self.bias
        return self.quant_method.apply(self, x, bias)


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ):
        weight = nn.Parameter(torch.zeros(sum(output_partition_sizes), input_size_per_partition), requires_grad=False)
        weight.weight_loader = extra_weight_attrs["weight_loader"]
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


def load(model: nn.Module, weights, mapper: WeightsMapper) -> set[str]:
    """As ``AutoWeightsLoader``: names are renamed, then followed down the modules; a layer loads its own."""
    loaded = set()
    for name, tensor in mapper.apply(weights):
        module, path = model, name.split(".")
        at = 0
        while at < len(path) - 1 and not hasattr(module, "load_weights"):
            module = module.get_submodule(path[at])
            at += 1
        rest, prefix = ".".join(path[at:]), ".".join(path[:at])
        if hasattr(module, "load_weights"):
            found = list(module.load_weights([(rest, tensor)]))
            loaded |= {f"{prefix}.{one}" for one in found}
        else:
            raise ValueError(f"There is no module or parameter named {name!r}")
    return loaded


def finish(model: nn.Module) -> None:
    """As ``process_weights_after_loading`` of the model loader."""
    for module in list(model.modules()):
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)


DEEPSEEK_STACKED = (
    ("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1), ("fused_qkv_a_proj", "q_a_proj", 0),
    ("fused_qkv_a_proj", "kv_a_proj_with_mqa", 1),
)  # fmt: skip


def load_deepseek(model: nn.Module, weights, experts: int) -> set[str]:
    """As ``DeepseekV2Model.load_weights``: merged linears unless inside experts, then experts, then by name."""
    params = dict(model.named_parameters())
    mapping = [
        (f"experts.routed_experts.{'w2' if role == 'down_proj' else 'w13'}_", f"experts.{e}.{role}.", e, shard)
        for e in range(experts) for shard, role in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ]  # fmt: skip
    loaded = set()
    for name, tensor in weights:
        for merged, single, shard in DEEPSEEK_STACKED:
            if single not in name or ("mlp.experts." in name and name not in params):
                continue
            full = name.replace(single, merged)
            # without a compressed query nothing is fused
            if merged == "fused_qkv_a_proj" and full not in params:
                continue
            name = full
            params[name].weight_loader(params[name], tensor, shard)
            break
        else:
            for merged, single, expert, shard in mapping:
                if single not in name:
                    continue
                full = name.replace(single, merged)
                if params[full].weight_loader(
                    params[full], tensor, full, shard_id=shard, expert_id=expert, return_success=True
                ):
                    name = full
                    break
            else:
                params[name].weight_loader(params[name], tensor)
        loaded.add(name)
    return loaded


def dequantized(layer: LinearBase, out_dtype: torch.dtype) -> torch.Tensor:
    """As ``get_and_maybe_dequant_weights`` of a method that is not vLLM's own."""
    weight = next(getattr(layer, name) for name in ("weight", "qweight", "weight_packed") if hasattr(layer, name))
    eye = torch.eye(layer.input_size_per_partition, dtype=out_dtype, device=weight.device)
    return layer.quant_method.apply(layer, eye, bias=None).to(out_dtype).T


def absorbed(layer: LinearBase, rank: int, heads: int, nope: int, value: int, dtype: torch.dtype):
    """As ``split_kv_b_proj``, which runs after all quantization methods: ``W_UK [L, N, P]``, ``W_UV [L, N, V]``."""
    weight = dequantized(layer, dtype).T
    assert weight.shape == (rank, heads * (nope + value))
    return weight.view(rank, heads, nope + value).split([nope, value], dim=-1)


METHODS: dict[str, type] = {}


def register_quantization_config(quantization: str):
    def wrapper(cls):
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("The quantization config must be a subclass of `QuantizationConfig`.")
        METHODS[quantization] = cls
        return cls

    return wrapper


_PLACES = {
    "vllm.model_executor.layers.fused_moe": (
        "FusedMoEConfig", "FusedMoEMethodBase", "FusedMoEParallelConfig", "FusedMoEQuantConfig", "MoEActivation",
        "RoutedExperts",
    ),
    "vllm.model_executor.layers.linear": ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"),
    "vllm.model_executor.layers.quantization": ("register_quantization_config",),
    "vllm.model_executor.layers.quantization.base_config": ("QuantizationConfig", "QuantizeMethodBase"),
    "vllm.model_executor.models.utils": ("WeightsMapper",),
}


def modules() -> dict[str, types.ModuleType]:
    """``sys.modules`` entries under which the names above are found where vLLM has them."""
    found: dict[str, types.ModuleType] = {}
    for place, names in _PLACES.items():
        parts = place.split(".")
        for depth in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        for name in names:
            setattr(found[place], name, getattr(sys.modules[__name__], name))
    return found
