"""gemq's quantization method for vLLM 0.33: ``QuantizationConfig``, a linear method and a routed-experts method.

vLLM merges q, k and v, and gate and up; its loaders rename a checkpoint's tensors and hand them to a parameter's
``weight_loader``. A layer's experts reach it as one buffer, renamed to look like expert 0's (which every family's
loader passes on); the parameter's own loader keeps the slices of this rank.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    MoEActivation,
    RoutedExperts,
)
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from gemq.nn.experts import stored_name
from gemq.packed_config import PackedConfig
from gemq.serving.methods import PackedLinearMethod, PackedQuantization, UnpackedLinearMethod
from gemq.serving.packed_layers import (
    ExpertParts,
    ServingError,
    expert_widths,
    local_ids,
)
from gemq.serving.splits import Rank

SERVED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v2", "deepseek_v3")
# the names that vLLM gives to gate and up together, and to down
_PROJECTIONS = {"w13": "gate_up_proj", "w2": "down_proj"}
_RENAMED = {
    re.compile(r"\.experts\.gate_up_(codes|meta)$"): r".experts.0.gate_proj.\1",
    re.compile(r"\.experts\.down_(codes|meta)$"): r".experts.0.down_proj.\1",
}


class GemqConfig(PackedQuantization, QuantizationConfig):
    """The ``quantization_config`` of a gemq checkpoint, as vLLM asks it."""

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse families whose layers vLLM fuses in ways that were not tried, before anything is loaded."""
        kind = getattr(hf_config, "model_type", None)
        if kind is not None and kind not in SERVED:
            raise ServingError(f"vLLM does not serve {kind!r} from gemq checkpoints; it serves {', '.join(SERVED)}")

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Names by which the loaders of all families pass a layer's buffers on to its experts."""
        return QuantizationConfig.get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_regex=_RENAMED)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a linear or of routed experts; None for what holds no quantized weights."""
        if isinstance(layer, RoutedExperts):
            return GemqMoEMethod(self.packed, layer.moe_config)
        if isinstance(layer, LinearBase):
            return self.linear_method(prefix, UnquantizedLinearMethod, GemqLinearMethod, GemqUnpackedLinearMethod)
        return None


class GemqLinearMethod(PackedLinearMethod, LinearMethodBase):
    """One linear layer, merged ones included, packed at one width."""

    splits = True


class GemqUnpackedLinearMethod(UnpackedLinearMethod, LinearMethodBase):
    """``kv_b_proj`` of latent attention, which vLLM splits and absorbs."""

    splits = True


class GemqMoEMethod(FusedMoEMethodBase):
    """The routed experts of one layer, each at its own width, in one kernel call."""

    def __init__(self, packed: PackedConfig, moe: FusedMoEConfig):
        super().__init__(moe)
        self.packed = packed

    def create_weights(
        self, layer: RoutedExperts, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:
        """Register the buffers of this rank's experts.

        Raises :class:`ServingError` for a split that the columns of down do not allow, and for experts that are not
        SiLU(gate) * up.
        """
        prefix = layer.layer_name
        self._refuse(layer, prefix)
        widths = expert_widths(self.packed, prefix)
        experts = len(widths["gate_up_proj"])
        if experts != layer.global_num_experts:
            raise ServingError(f"{prefix} has {layer.global_num_experts} experts, the checkpoint {experts}")
        kept = _kept(layer.expert_map, num_experts)
        self.parts = ExpertParts(
            prefix, hidden_size, intermediate_size_per_partition, widths, kept, self.packed.group_size,
            Rank(self.moe.moe_parallel_config.tp_rank, self.moe.moe_parallel_config.tp_size),
        )
        for short, name in _PROJECTIONS.items():
            for kind in ("codes", "meta"):
                layer.register_parameter(f"{short}_{kind}", self.parts.parameter(name, kind))

    def _refuse(self, layer: RoutedExperts, prefix: str) -> None:
        odd = {
            "another activation": self.moe.activation is not MoEActivation.SILU, "biases": self.moe.has_bias,
            "a clamped activation": layer.swiglu_limit is not None,
            "weights on the input": layer.apply_router_weight_on_input,
        }
        for name, present in odd.items():
            if present:
                raise ServingError(f"{prefix}: experts with {name} are not served")

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        """Sizes stay: packed weights are not padded."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        """None: no kernel of vLLM's own runs."""
        return None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Repack the loaded buffers for their device's kernels."""
        buffers = {}
        for short, name in _PROJECTIONS.items():
            for kind in ("codes", "meta"):
                buffers[stored_name(name, kind)] = getattr(layer, f"{short}_{kind}").data
                delattr(layer, f"{short}_{kind}")
        layer.packed = self.parts.module(buffers)

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """``[T, H] -> [T, H]``: the weighted sum over this rank's experts; others contribute zero."""
        return layer.packed(x, local_ids(topk_ids, layer.expert_map), topk_weights)


def _kept(expert_map: Tensor | None, num_experts: int) -> list[int]:
    """Global ids of this rank's experts, in the order of their local ids."""
    if expert_map is None:
        return list(range(num_experts))
    local = {slot: expert for expert, slot in enumerate(expert_map.tolist()) if slot >= 0}
    if sorted(local) != list(range(num_experts)):
        raise ServingError(f"the expert map places {len(local)} experts in {num_experts} slots of this rank")
    return [local[slot] for slot in range(num_experts)]


def register() -> None:
    """Enter gemq into vLLM's table of quantization methods."""
    register_quantization_config("gemq")(GemqConfig)
