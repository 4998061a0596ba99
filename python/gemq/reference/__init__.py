"""Plain torch versions of every op: the specification that the kernels are tested against."""

from gemq.reference.bits import dequantize, pack, unpack
from gemq.reference.gptq import descend_codes, gptq_group
from gemq.reference.moe import lowbit_gemm, moe_lowbit_ffn, moe_lowbit_gemm
from gemq.reference.routing import topk_routing
from gemq.reference.tiles import from_layout, to_layout

__all__ = [
    "dequantize",
    "descend_codes",
    "from_layout",
    "gptq_group",
    "lowbit_gemm",
    "moe_lowbit_ffn",
    "moe_lowbit_gemm",
    "pack",
    "to_layout",
    "topk_routing",
    "unpack",
]
