"""A linear layer over one packed matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemq import format as fmt
from gemq.nn.base import PackedModule
from gemq.ops import backends, checks, layout_for, lowbit_gemm, pack, repack


class LowBitLinear(PackedModule):
    """``x @ W.T (+ bias)`` with ``W [out, in]`` packed at ``bits``.

    The state dict always holds the canonical layout (``weight_codes`` uint8, ``weight_meta`` float16, flat);
    :meth:`prepare` moves the buffers to the layout of their device's kernels.
    """

    weight_codes: Tensor
    weight_meta: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int = 128, bias: bool = False,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ):
        super().__init__()
        fmt.check_bits(bits)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = fmt.default_group_size(in_features, group_size)
        self.layout = "canonical"
        size, pairs = self._sizes("canonical")
        self.register_buffer("weight_codes", torch.zeros(size, dtype=torch.uint8, device=device))
        self.register_buffer("weight_meta", torch.zeros(pairs, dtype=torch.float16, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @property
    def matrix(self) -> tuple[int, int, int, int]:
        """Bits, rows, columns and group size."""
        return self.bits, self.out_features, self.in_features, self.group_size

    def _sizes(self, layout: str) -> tuple[int, int]:
        shape = (self.out_features, self.in_features, self.bits)
        return fmt.codes_bytes(*shape, layout), fmt.meta_elements(*shape, self.group_size, layout)

    @classmethod
    def from_codes(cls, codes: Tensor, meta: Tensor, bits: int, group_size: int, bias: Tensor | None = None):
        """Build a linear from uint8 codes ``[out, in]`` and float16 metadata ``[out, in // group_size, 2]``.

        Raises ``TypeError`` or ``ValueError`` for metadata of another dtype or shape.
        """
        module = cls(codes.shape[1], codes.shape[0], bits, group_size, bias is not None, device=codes.device)
        checks.metadata("meta", meta, codes.shape[0], codes.shape[1], module.group_size)
        module.weight_codes = pack(codes, bits).flatten()
        module.weight_meta = meta.contiguous().flatten()
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        return module

    def _converted(self, layout: str) -> tuple[Tensor, Tensor]:
        return repack(self.weight_codes, self.weight_meta, *self.matrix, source=self.layout, target=layout)

    def prepare(self, layout: str | None = None) -> None:
        """Repack the buffers for their device's kernels, or to ``layout``; in place, no second copy is kept."""
        layout = layout or layout_for(self.weight_codes.device)
        if layout != self.layout:
            self.weight_codes, self.weight_meta = self._converted(layout)
            self.layout = layout

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "canonical":
            destination[prefix + "weight_codes"], destination[prefix + "weight_meta"] = self._converted("canonical")

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weights ``[out, in]``."""
        return backends.dense_weight(self.weight_codes, self.weight_meta, *self.matrix, self.layout, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]`` in the dtype of ``x``."""
        if x.shape[-1:] != (self.in_features,):
            # the op takes buffers that are longer than its matrix, so it would multiply by the wrong weights
            raise ValueError(f"x must have {self.in_features} columns, got shape {list(x.shape)}")
        if self.layout == "cpu_tile" and checks.unwatched(x) and x.is_cpu and x.dtype in checks.FLOATS:
            y = self._direct(x)
        else:
            y = lowbit_gemm(
                x, self.weight_codes, self.weight_meta, bits=self.bits, n=self.out_features,
                group_size=self.group_size, layout=self.layout,
            )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _direct(self, x: Tensor) -> Tensor:
        """Direct kernel call without the dispatcher, for an ``x`` that needs no validation."""
        out = backends.dense_gemm(
            x.reshape(-1, self.in_features), self.weight_codes, self.weight_meta, self.bits, self.out_features,
            self.group_size, self.layout,
        )
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, layout={self.layout}"
        )
