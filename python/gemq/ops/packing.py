"""Packing, unpacking, dequantizing and repacking through the compiled extension (CPU and CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq import format as fmt
from gemq._core import core
from gemq.ops import checks

_OUT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LAYOUT_CODES = {"cpu_tile": 1, "gpu_tile": 2}


@torch.library.custom_op("gemq::pack", mutates_args=())
def _pack(codes: Tensor, bits: int) -> Tensor:
    rows, k = codes.shape
    out = codes.new_empty(rows, fmt.row_bytes(k, bits))
    if out.numel():
        core().pack(
            device=checks.device_code("codes", codes), src=codes.data_ptr(), dst=out.data_ptr(), rows=rows, k=k,
            bits=bits, threads=torch.get_num_threads(), stream=checks.stream(codes),
        )
    return out


@_pack.register_fake
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(codes.shape[0], fmt.row_bytes(codes.shape[1], bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes ``[rows, k]`` into the canonical bit stream, uint8 ``[rows, ceil(k * bits / 8)]``.

    ``bits`` is 1..8; codes must be below ``2 ** bits`` (higher bits are dropped). Raises ``TypeError`` or
    ``ValueError`` for another dtype, shape, width, a non-contiguous tensor or an unsupported device.
    """
    fmt.check_bits(bits)
    checks.tensor("codes", codes, dtype=torch.uint8, dim=2)
    return _pack(codes, bits)


@torch.library.custom_op("gemq::unpack", mutates_args=())
def _unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    out = packed.new_empty(packed.shape[0], k)
    if out.numel():
        core().unpack(
            device=checks.device_code("packed", packed), src=packed.data_ptr(), dst=out.data_ptr(),
            rows=packed.shape[0], k=k, bits=bits, threads=torch.get_num_threads(), stream=checks.stream(packed),
        )
    return out


@_unpack.register_fake
def _(packed: Tensor, bits: int, k: int) -> Tensor:
    return packed.new_empty(packed.shape[0], k)


def _check_packed(packed: Tensor, bits: int, k: int) -> None:
    fmt.check_bits(bits)
    checks.size("k", k)
    checks.tensor("packed", packed, dtype=torch.uint8, dim=2)
    if packed.shape[1] != fmt.row_bytes(k, bits):
        raise ValueError(
            f"packed has {packed.shape[1]} bytes a row, but k={k} codes of {bits} bits take {fmt.row_bytes(k, bits)}"
        )


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 ``[rows, ceil(k * bits / 8)]`` to codes uint8 ``[rows, k]``.

    Raises ``TypeError`` or ``ValueError`` as :func:`pack` does, and when the row length does not match ``k``.
    """
    _check_packed(packed, bits, k)
    return _unpack(packed, bits, k)


@torch.library.custom_op("gemq::dequantize", mutates_args=())
def _dequantize(packed: Tensor, meta: Tensor, bits: int, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(packed.shape[0], k, dtype=dtype, device=packed.device)
    if out.numel():
        core().dequantize(
            device=checks.device_code("packed", packed), src=packed.data_ptr(), meta=meta.data_ptr(),
            dst=out.data_ptr(), rows=packed.shape[0], k=k, bits=bits, group_size=group_size,
            out_dtype=_OUT_DTYPES[dtype], threads=torch.get_num_threads(), stream=checks.stream(packed),
        )
    return out


@_dequantize.register_fake
def _(packed: Tensor, meta: Tensor, bits: int, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(packed.shape[0], k, dtype=dtype, device=packed.device)


def dequantize(
    packed: Tensor, meta: Tensor, bits: int, k: int, group_size: int = 128, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Weights ``[rows, k]`` as ``q * s + m`` of canonical codes.

    Args:
        packed: uint8 ``[rows, ceil(k * bits / 8)]``.
        meta: float16 ``[rows, k // group_size, 2]``, the pairs ``(s, m)``.
        dtype: float32, float16 or bfloat16; the float32 value rounded once.

    Raises ``TypeError`` or ``ValueError`` for dtypes, shapes, widths, devices or strides out of this.
    """
    _check_packed(packed, bits, k)
    fmt.check_group_size(group_size, k)
    checks.tensor("meta", meta, dim=3, device=packed.device)
    checks.metadata("meta", meta, packed.shape[0], k, group_size)
    if not isinstance(dtype, torch.dtype) or dtype not in _OUT_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return _dequantize(packed, meta, bits, k, group_size, dtype)


@torch.library.custom_op("gemq::repack", mutates_args=())
def _repack(
    codes: Tensor, meta: Tensor, bits: int, n: int, k: int, group_size: int, layout: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    target = "canonical" if inverse else layout
    out = codes.new_empty(fmt.codes_bytes(n, k, bits, target))
    out_meta = meta.new_empty(fmt.meta_elements(n, k, bits, group_size, target))
    if out.numel():
        core().repack(
            device=checks.device_code("codes", codes), src_codes=codes.data_ptr(), src_meta=meta.data_ptr(),
            dst_codes=out.data_ptr(), dst_meta=out_meta.data_ptr(), n=n, k=k, bits=bits, group_size=group_size,
            layout=_LAYOUT_CODES[layout], inverse=inverse, threads=torch.get_num_threads(),
            stream=checks.stream(codes),
        )
    return out, out_meta


@_repack.register_fake
def _(
    codes: Tensor, meta: Tensor, bits: int, n: int, k: int, group_size: int, layout: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    target = "canonical" if inverse else layout
    return (
        codes.new_empty(fmt.codes_bytes(n, k, bits, target)),
        meta.new_empty(fmt.meta_elements(n, k, bits, group_size, target)),
    )


def repack(
    codes: Tensor,
    meta: Tensor,
    bits: int,
    n: int,
    k: int,
    group_size: int = 128,
    *,
    source: str = "canonical",
    target: str,
) -> tuple[Tensor, Tensor]:
    """Move one packed matrix ``n`` x ``k`` between layouts (:mod:`gemq.format`).

    ``codes`` (uint8) and ``meta`` (float16) are flat buffers of exactly the source layout's size; returns new
    flat buffers of the target layout. Between two tile layouts the canonical one is the way-point.
    Raises ``TypeError`` or ``ValueError`` for sizes, dtypes, devices, widths or layouts out of this.
    """
    fmt.check_bits(bits)
    checks.size("n", n)
    checks.size("k", k)
    fmt.check_group_size(group_size, k)
    fmt.check_layout(source)
    fmt.check_layout(target)
    checks.tensor("codes", codes, dtype=torch.uint8, dim=1)
    checks.tensor("meta", meta, dtype=torch.float16, dim=1, device=codes.device)
    for name, given, wanted in (
        ("codes", codes.numel(), fmt.codes_bytes(n, k, bits, source)),
        ("meta", meta.numel(), fmt.meta_elements(n, k, bits, group_size, source)),
    ):
        if given != wanted:
            raise ValueError(f"{name} holds {given} elements, but {n} x {k} at {bits} bits in {source} has {wanted}")
    if source == target:
        return codes.clone(), meta.clone()
    if source != "canonical":
        codes, meta = _repack(codes, meta, bits, n, k, group_size, source, True)
    if target != "canonical":
        codes, meta = _repack(codes, meta, bits, n, k, group_size, target, False)
    return codes, meta
