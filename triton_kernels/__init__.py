"""Triton kernels that multiply by packed experts of mixed widths (layout ``gpu_tile``).

Imports torch and triton only, registers nothing, does nothing at import; ``gemq.ops`` validates and calls it.
"""

from .by_tokens import lowbit_gemm, moe_ffn, moe_gemm, moe_prefill
from .decode_launch import dense_decode, ffn_decode, moe_decode
from .topk import topk

__all__ = ["dense_decode", "ffn_decode", "lowbit_gemm", "moe_decode", "moe_ffn", "moe_gemm", "moe_prefill", "topk"]
