"""The part of SGLang 0.5.23 that gemq's plug-in meets, in its own words: signatures, abstract methods, loading by name.

``tests/test_serving.py`` compares every signature here with SGLang's sources where they are present.
"""

from __future__ import annotations

import concurrent.futures
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


class QuantizeMethodBase(ABC):
    def create_weights(self, layer, *weight_args, **extra_weight_attrs):
        raise NotImplementedError()

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer) -> None:
        return


class LinearMethodBase(QuantizeMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ):
        raise NotImplementedError()

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class FusedMoEMethodBase(QuantizeMethodBase):
    runner = None

    def create_weights(
        self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
    ):
        raise NotImplementedError

    def create_moe_runner(self, layer, moe_runner_config):
        raise NotImplementedError

    def get_moe_runner_backend(self, layer):
        return self.runner.runner_backend if self.runner is not None else None

    @abstractmethod
    def apply(self, layer, dispatch_output): ...


class QuantizationConfig(ABC):
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
    def override_quantization_method(cls, hf_quant_cfg, user_quant):
        return None

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    @abstractmethod
    def get_scaled_act_names(self): ...


@dataclass
class MoeRunnerConfig:
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    no_combine: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None


class StandardTopKOutput(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None


class StandardDispatchOutput(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: StandardTopKOutput


class StandardCombineInput(NamedTuple):
    hidden_states: torch.Tensor


class CombineInput:
    pass


class DispatchOutput:
    pass


class FusedMoE(nn.Module):
    """Creates its weights by the quantization method; dispatches to local ids as the standard dispatcher does."""

    def __init__(self, num_experts, hidden_size, intermediate_size, quant_config, prefix, *, ep=(0, 1), tp=1, shared=0,
                 with_bias=False, **runner):  # fmt: skip
        super().__init__()
        self.num_experts, self.num_fused_shared_experts, self.with_bias = num_experts, shared, with_bias
        self.moe_ep_rank, self.moe_ep_size = ep
        self.moe_tp_size = tp
        self.num_local_experts = num_experts // self.moe_ep_size
        self.quant_method = quant_config.get_quant_method(self, prefix)
        assert isinstance(self.quant_method, FusedMoEMethodBase)
        self.quant_method.create_weights(
            layer=self, num_experts=self.num_local_experts, hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size // tp, params_dtype=torch.float32,
            weight_loader=self.weight_loader, with_bias=with_bias, moe_intermediate_size=intermediate_size,
        )
        self.quant_method.create_moe_runner(self, MoeRunnerConfig(**runner))
        assert self.quant_method.get_moe_runner_backend(self) is None
        self.should_fuse_routed_scaling_factor_in_topk = getattr(
            self.quant_method, "fuse_routed_scaling_factor_in_topk", False
        )
        self.runner = self.quant_method.runner

    def weight_loader(self, *_, **__):
        raise AssertionError("gemq's parameters have loaders of their own")

    def forward(self, hidden_states, topk_output):
        if self.moe_ep_size > 1:
            mapping = torch.full((self.num_experts,), -1, dtype=torch.int32)
            first = self.moe_ep_rank * self.num_local_experts
            mapping[first : first + self.num_local_experts] = torch.arange(self.num_local_experts, dtype=torch.int32)
            ids = topk_output.topk_ids
            topk_output = topk_output._replace(topk_ids=torch.where(ids < 0, -1, mapping[ids.clamp_min(0)]))
        given = StandardDispatchOutput(hidden_states, None, topk_output)
        (out,) = self.quant_method.apply(layer=self, dispatch_output=given)
        return out


class LinearBase(nn.Module):
    """``tp_size`` divides the outputs of all but a row-parallel layer, which divides its inputs."""

    def __init__(self, input_size, output_sizes, quant_config, prefix, tp_size=1, row=False, bias=False):
        super().__init__()
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        assert self.quant_method is not None
        parts = [size if row else size // tp_size for size in output_sizes]
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=input_size // tp_size if row else input_size,
            output_partition_sizes=parts, input_size=input_size, output_size=sum(output_sizes),
            params_dtype=torch.float32, weight_loader=self.weight_loader,
        )
        self.bias = nn.Parameter(torch.zeros(sum(parts)), requires_grad=False) if bias else None
        if bias:
            self.bias.weight_loader = self._load_bias

    def _load_bias(self, param, loaded_weight, shard):
        start = {"q": 0, "k": 1, "v": 2}[shard]
        rows = self.quant_method.parts.rows
        param.data[sum(rows[:start]) : sum(rows[: start + 1])].copy_(loaded_weight)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        param.data.copy_(loaded_weight)

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias)


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


STACKED = (
    ("qkv_proj", "q_proj", "q"), ("qkv_proj", "k_proj", "k"), ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1),
)  # fmt: skip


def load(model: nn.Module, weights) -> set[str]:
    """As the loops of SGLang's models: merged linears first (never inside experts), then experts by number, then names.

    A name that no parameter has is passed over in silence.
    """
    params = dict(model.named_parameters())
    experts = [(f"experts.{e}.{role}.", e) for e in range(8) for role in ("gate_proj", "up_proj", "down_proj", "w1")]
    loaded = set()
    for name, tensor in weights:
        for merged, single, shard in STACKED:
            if single not in name or "mlp.experts" in name or "block_sparse_moe.experts" in name:
                continue
            full = name.replace(single, merged)
            if full not in params:
                continue
            params[full].weight_loader(params[full], tensor, shard)
            loaded.add(full)
            break
        else:
            assert not any(part in name for part, _ in experts)
            if name in params:
                params[name].weight_loader(params[name], tensor)
                loaded.add(name)
    return loaded


def finish(model: nn.Module) -> None:
    for module in list(model.modules()):
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)


def load_deepseek(model: nn.Module, weights) -> set[str]:
    """As ``DeepseekV2WeightLoaderMixin.do_load_weights``, but for ``post_load_weights``.

    Weights are loaded by several threads; ``q_a_proj`` and ``kv_a_proj_with_mqa`` are put together before.
    """
    params = dict(model.named_parameters())
    fused = any("fused_qkv_a_proj_with_mqa" in name for name in params)
    cached, futures, loaded = {}, [], set()
    with concurrent.futures.ThreadPoolExecutor() as executor:
        for name, tensor in weights:
            for merged, single, shard in STACKED[3:]:
                if single not in name or ("mlp.experts." in name and name not in params):
                    continue
                name = name.replace(single, merged)
                futures.append(executor.submit(params[name].weight_loader, params[name], tensor, shard))
                loaded.add(name)
                break
            else:
                pair = ("q_a_proj", "kv_a_proj_with_mqa")
                mine = next((part for part in pair if fused and part in name), None)
                if mine is not None:
                    cached[name] = tensor
                    names = [name.replace(mine, part) for part in pair]
                    if any(one not in cached for one in names):
                        continue
                    tensor = torch.cat([cached.pop(one) for one in names], dim=0)
                    name = name.replace(mine, "fused_qkv_a_proj_with_mqa")
                if name not in params:
                    continue
                futures.append(executor.submit(params[name].weight_loader, params[name], tensor))
                loaded.add(name)
        for future in concurrent.futures.as_completed(futures):
            future.result()
    return loaded


def absorbed(layer: LinearBase, nope: int, value: int):
    """As ``post_load_weights``, which runs before the quantization methods: ``w_kc [N, P, L]``, ``w_vc [N, V, L]``."""
    assert not hasattr(layer, "qweight"), "read as AWQ's"
    w = layer.weight
    assert w.dtype.is_floating_point
    return w.unflatten(0, (-1, nope + value)).split([nope, value], dim=1)


def model_looks_at_weights(model: nn.Module) -> None:
    """Read some layers' ``weight`` as SGLang's DeepSeek and GLM-4 models do when made and when they run."""
    for name, layer in model.named_modules():
        if name.endswith("shared_experts.gate_up_proj"):
            weight = getattr(layer, "weight", None)
            weight = getattr(layer, "qweight", None) if weight is None else weight
            if weight is None:
                raise ValueError("shared expert gate/up projection has no weight storage")
            assert weight.dtype not in (torch.int8, torch.float8_e4m3fn, torch.uint8)
        if name.endswith("fused_qkv_a_proj_with_mqa"):
            # else a kernel for 16-bit weights runs
            assert layer.weight.dtype != torch.bfloat16


def is_cuda() -> bool:
    return CUDA


CUDA = True
QUANTIZATION_METHODS: dict[str, type] = {"fp8": object}
QUANTIZATION_CHOICES = ["fp8"]
add_quantization_method_choices = QUANTIZATION_CHOICES.extend

_PLACES = {
    "sglang.srt.arg_groups.choices": ("QUANTIZATION_CHOICES", "add_quantization_method_choices"),
    "sglang.srt.layers.linear": ("LinearBase",),
    "sglang.srt.layers.moe.fused_moe_triton.layer": ("FusedMoE",),
    "sglang.srt.layers.moe.moe_runner.base": ("MoeRunnerConfig",),
    "sglang.srt.layers.moe.token_dispatcher.base": ("CombineInput", "DispatchOutput"),
    "sglang.srt.layers.moe.token_dispatcher.standard": ("StandardCombineInput", "StandardDispatchOutput"),
    "sglang.srt.layers.moe.topk": ("StandardTopKOutput",),
    "sglang.srt.layers.quantization": ("QUANTIZATION_METHODS",),
    "sglang.srt.layers.quantization.base_config": (
        "FusedMoEMethodBase", "LinearMethodBase", "QuantizationConfig", "QuantizeMethodBase",
    ),
    "sglang.srt.layers.quantization.unquant": ("UnquantizedLinearMethod",),
    "sglang.srt.utils": ("is_cuda",),
}


def modules() -> dict[str, types.ModuleType]:
    """``sys.modules`` entries under which the names above are found where SGLang has them."""
    found: dict[str, types.ModuleType] = {}
    for place, names in _PLACES.items():
        parts = place.split(".")
        for depth in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        for name in names:
            setattr(found[place], name, getattr(sys.modules[__name__], name))
    return found
