"""A linear layer over one packed matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemq import format as fmt
from gemq.nn.base import PackedMatrix
from gemq.ops import backends, checks, lowbit_gemm


class LowBitLinear(PackedMatrix):
    """``x @ W.T (+ bias)`` with ``W [out, in]`` packed at ``bits``; buffers as :class:`PackedMatrix` has them."""

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int = 128, bias: bool = False,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ):
        super().__init__()
        fmt.check_bits(bits)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = fmt.default_group_size(in_features, group_size)
        self._register(device)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @property
    def matrix(self) -> tuple[int, int, int, int]:
        """Bits, rows, columns and group size."""
        return self.bits, self.out_features, self.in_features, self.group_size

    @classmethod
    def from_codes(cls, codes: Tensor, meta: Tensor, bits: int, group_size: int, bias: Tensor | None = None):
        """Build a linear from uint8 codes ``[out, in]`` and float16 metadata ``[out, in // group_size, 2]``.

        Raises ``TypeError`` or ``ValueError`` for metadata of another dtype or shape.
        """
        module = cls(codes.shape[1], codes.shape[0], bits, group_size, bias is not None, device=codes.device)
        module._fill(codes, meta)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        return module

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
