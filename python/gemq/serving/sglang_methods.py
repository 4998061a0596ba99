"""gemq's quantization method for SGLang 0.5.23: ``QuantizationConfig``, a linear method and a fused-MoE method.

SGLang's loaders leave names that are no per-expert weights as they are, so a layer's buffers keep the names that the
checkpoint gives them. The standard dispatcher hands over local expert ids, -1 for experts of other ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES, add_quantization_method_choices
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.base import CombineInput, DispatchOutput
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.utils import is_cuda
from torch import nn

from gemq.nn.experts import PROJECTIONS, stored_name
from gemq.packed_config import PackedConfig
from gemq.serving.methods import PackedLinearMethod, PackedQuantization, UnpackedLinearMethod
from gemq.serving.packed_layers import ExpertParts, ServingError, check_unsplit, expert_widths

_BUFFERS = [(name, kind) for name in PROJECTIONS for kind in ("codes", "meta")]


class GemqConfig(PackedQuantization, QuantizationConfig):
    """The ``quantization_config`` of a gemq checkpoint, as SGLang asks it."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a linear or of fused experts; None for what holds no quantized weights."""
        if isinstance(layer, FusedMoE):
            return GemqMoEMethod(self.packed, prefix)
        if isinstance(layer, LinearBase):
            return self.linear_method(prefix, UnquantizedLinearMethod, GemqLinearMethod, GemqUnpackedLinearMethod)
        return None

    def get_scaled_act_names(self) -> list[str]:
        """No activation is rescaled."""
        return []


class GemqLinearMethod(PackedLinearMethod, LinearMethodBase):
    """One linear layer, merged ones included, packed at one width."""

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:
        """Register the packed buffers. Raises :class:`ServingError` under tensor parallelism."""
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype
        )
        # DeepSeek's model chooses kernels by the dtype of some layers' weight; of this one it knows none
        layer.weight = torch.empty(0, dtype=torch.int32)


class GemqUnpackedLinearMethod(UnpackedLinearMethod, LinearMethodBase):
    """``kv_b_proj`` of latent attention, which SGLang splits and absorbs."""


class GemqMoEMethod(FusedMoEMethodBase):
    """The experts of one layer, each at its own width, in one kernel call."""

    def __init__(self, packed: PackedConfig, prefix: str):
        self.packed, self.prefix = packed, prefix

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:
        """Register the buffers of this rank's experts, under the checkpoint's names.

        Raises :class:`ServingError` under tensor parallelism and for biases or fused shared experts.
        """
        whole = intermediate_size_per_partition * layer.moe_tp_size
        check_unsplit(self.prefix, [intermediate_size_per_partition], [whole])
        if layer.num_fused_shared_experts or layer.with_bias:
            raise ServingError(
                f"{self.prefix}: experts with biases, or shared experts fused with the routed ones, are not served "
                "(--disable-shared-experts-fusion)"
            )
        widths = expert_widths(self.packed, self.prefix)
        experts = len(widths["gate_up_proj"])
        if experts != layer.num_experts:
            raise ServingError(f"{self.prefix} has {layer.num_experts} experts, the checkpoint {experts}")
        first = layer.moe_ep_rank * num_experts
        kept = range(first, first + num_experts)
        self.parts = ExpertParts(
            self.prefix, hidden_size, intermediate_size_per_partition, widths, kept, self.packed.group_size
        )
        for name, kind in _BUFFERS:
            layer.register_parameter(stored_name(name, kind), self.parts.parameter(name, kind))

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        """No runner of SGLang's: ids arrive local and in the standard form.

        Raises :class:`ServingError` for experts that are not SiLU(gate) * up.
        """
        config = moe_runner_config
        # on CUDA the experts are to scale their sum, elsewhere the model does it after them
        self.scale = (config.routed_scaling_factor or 1.0) if is_cuda() else 1.0
        odd = {
            "another activation": config.activation != "silu" or not config.is_gated,
            "a clamped or scaled activation": any(
                value is not None for value in (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)
            ),
            "weights on the input": config.apply_router_weight_on_input,
            "outputs that are not summed": config.no_combine,
        }
        for name, present in odd.items():
            if present:
                raise ServingError(f"{self.prefix}: experts with {name} are not served")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Repack the loaded buffers for their device's kernels."""
        buffers = {stored_name(name, kind): getattr(layer, stored_name(name, kind)).data for name, kind in _BUFFERS}
        for name in buffers:
            delattr(layer, name)
        layer.packed = self.parts.module(buffers)

    def apply(self, layer: Any, dispatch_output: DispatchOutput) -> CombineInput:
        """``[T, H] -> [T, H]``: the weighted sum over this rank's experts; ids of -1 contribute zero."""
        topk = dispatch_output.topk_output
        scaled = self.scale == 1.0 or layer.should_fuse_routed_scaling_factor_in_topk
        weights = topk.topk_weights if scaled else topk.topk_weights * self.scale
        out = layer.packed(dispatch_output.hidden_states, topk.topk_ids, weights)
        return StandardCombineInput(hidden_states=out)


def register() -> None:
    """Enter gemq into SGLang's table of quantization methods and the choices of ``--quantization``."""
    QUANTIZATION_METHODS["gemq"] = GemqConfig
    if "gemq" not in QUANTIZATION_CHOICES:
        add_quantization_method_choices(["gemq"])
