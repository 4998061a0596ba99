"""Triton kernels that multiply by packed experts of mixed widths (layout ``gpu_tile``).

Imports torch and triton only, registers nothing, does nothing at import; ``gemq.ops`` validates and calls it.
"""

from .launch import lowbit_gemm, moe_decode, moe_decode_ffn, moe_ffn, moe_gemm, moe_prefill

__all__ = ["lowbit_gemm", "moe_decode", "moe_decode_ffn", "moe_ffn", "moe_gemm", "moe_prefill"]
