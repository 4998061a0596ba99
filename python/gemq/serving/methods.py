"""Methods that gemq's classes have in both runtimes; they stand before the runtime's own base classes."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from gemq.format import UNQUANTIZED
from gemq.packed_config import PackedConfig
from gemq.serving.packed_layers import LinearParts, check_ends, check_unsplit, read_dense, width_of
from gemq.serving.splits import Rank


class PackedQuantization:
    """The ``quantization_config`` of a gemq checkpoint."""

    def __init__(self, packed: PackedConfig):
        super().__init__()
        self.packed = packed

    def get_name(self) -> str:
        """The name that ``config.json`` gives as ``quant_method``."""
        return "gemq"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activations in 16 bits or float32; products are summed in float32."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The kernels are compiled for sm_80 and newer."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: everything is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Raises :class:`gemq.errors.CheckpointError` for a config that is malformed, edited or too new,
        :class:`ServingError` for a packed head or embedding."""
        packed = PackedConfig.from_dict(config)
        check_ends(packed)
        return cls(packed)

    def linear_method(self, prefix: str, unquantized: type, packed: type, unpacked: type) -> Any:
        """The method of the linear at ``prefix``, of the runtime's three kinds."""
        width = width_of(self.packed, prefix)
        if width == UNQUANTIZED:
            return unquantized()
        return (unpacked if read_dense(prefix) else packed)(self.packed, width, prefix)


class PackedLinearMethod:
    """The weights of one linear layer, merged ones included, packed at one width."""

    # True where the runtime's tensor parallelism is served: its layers say their rank as tp_rank and tp_size
    splits = False

    def __init__(self, packed: PackedConfig, bits: int, prefix: str):
        self.packed, self.bits, self.prefix = packed, bits, prefix

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:
        """Register ``weight_codes`` and ``weight_meta`` of this rank's part. Raises :class:`ServingError` for a split
        that the columns do not allow, and for any where the runtime's is not served."""
        rows = sum(output_partition_sizes)
        if not self.splits:
            check_unsplit(self.prefix, [input_size_per_partition, rows], [input_size, output_size])
        self.parts = LinearParts(
            self.prefix, input_size_per_partition, output_partition_sizes, self.bits, self.packed.group_size,
            input_size, output_size // rows, Rank(getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)),
        )
        for name, parameter in self.parts.parameters().items():
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack the loaded buffers for their device's kernels."""
        layer.packed = self.parts.module(layer.weight_codes.data, layer.weight_meta.data)
        del layer.weight_codes, layer.weight_meta

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T (+ bias)`` in the dtype of ``x``."""
        out = layer.packed(x)
        return out if bias is None else out + bias


class UnpackedLinearMethod(PackedLinearMethod):
    """A packed matrix whose numbers the runtime reads itself: dequantized once, as soon as it is loaded.

    ``weight [out, in]`` in the model's dtype is a buffer, as no checkpoint holds it: runtimes count parameters that
    were not loaded. SGLang reads it before it calls ``process_weights_after_loading``.
    """

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:
        """Register ``weight`` beside the packed buffers. Raises :class:`ServingError` as the packed method does."""
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype
        )
        weight = torch.zeros(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        layer.register_buffer("weight", weight, persistent=False)
        self.parts.when_complete = lambda: self._unpack(layer)

    def _unpack(self, layer: Any) -> None:
        layer.weight.copy_(self.parts.dense(layer.weight_codes.data, layer.weight_meta.data, layer.weight.dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Let go of the packed buffers. Raises :class:`gemq.errors.CheckpointError` if one was not loaded."""
        self.parts.check_complete()
        del layer.weight_codes, layer.weight_meta

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T (+ bias)`` of the dequantized weight."""
        return nn.functional.linear(x, layer.weight, bias)
