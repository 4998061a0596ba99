"""Compare results with float64 references: one table of tolerances, one comparer."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gemq.reference.grid import dequantize_codes

# ||out - ref|| / ||ref|| allowed, by the precision of activations and outputs; weights are exact.
TOLERANCE = {
    # sums of a few hundred float32 products, each a rounding of at most 2**-24 = 6e-8 of random sign: near 3e-7 in
    # norm, and a few times that in a gradient whose terms cancel
    torch.float32: 3e-6,
    # one rounding to 11 bits: at most 2**-11 = 4.9e-4 an element, about 2e-4 in norm; Triton's kernels round the
    # activations too, twice in a whole block
    torch.float16: 6e-4,
    # one rounding to 8 bits: at most 2**-8 = 3.9e-3 an element, about 1.7e-3 in norm; Triton's interpreter truncates,
    # at most 2**-7
    torch.bfloat16: 2**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2.5e-3,
}


def assert_close(out: Tensor, ref: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Fail unless ``out`` has the shape, the NaNs, the infinities and (by :data:`TOLERANCE`) the values of ``ref``.

    ``ref`` is float64. ``dtype`` is the precision of the computation where it is not that of ``out``. A reference of
    zeros must be met exactly.
    """
    assert ref.dtype == torch.float64, f"references are float64, got {ref.dtype}"
    assert out.shape == ref.shape, f"shape {list(out.shape)}, expected {list(ref.shape)}"
    limit = TOLERANCE[dtype or out.dtype]
    out, ref = out.detach().to("cpu", torch.float64), ref.detach().cpu()
    odd = (out.isnan() != ref.isnan()) | ((out.isinf() | ref.isinf()) & (out != ref) & ~ref.isnan())
    assert not odd.any(), f"{int(odd.sum())} NaN or infinite elements differ, first {_at(odd.int(), out, ref)}"
    finite = ref.isfinite()
    difference = torch.where(finite, out - ref, 0.0)
    error, size = float(difference.norm()), float(torch.where(finite, ref, 0.0).norm())
    assert error <= limit * size, (
        f"relative error {error / size if size else float('inf'):.2e} above {limit:.1e}, "
        f"worst {_at(difference.abs(), out, ref)}"
    )


def _at(score: Tensor, out: Tensor, ref: Tensor) -> str:
    """The place with the highest score, and what is there."""
    index = tuple(int(i) for i in torch.unravel_index(score.argmax(), score.shape))
    return f"at {index}: {float(out[index]):.6g}, expected {float(ref[index]):.6g}"


def output_error(weight: Tensor, hessian: Tensor, codes: Tensor, meta: Tensor) -> float:
    """``tr(D H D')`` of what quantizing lost, D, in float64."""
    lost = (weight - dequantize_codes(codes, meta)).double()
    return float(((lost @ hessian.double()) * lost).sum())
