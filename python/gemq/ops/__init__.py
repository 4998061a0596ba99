"""gemq's operators: plain tensors in, tensors out, from any runtime.

Every op is a ``torch.library`` custom op with a fake implementation; the products are differentiable with
respect to the activations and the routing weights. The layout of the packed weights chooses the kernels:

============  =====================================  ==========================
layout        backend                                devices
============  =====================================  ==========================
``canonical`` torch: dequantize, then multiply       CPU, CUDA
``cpu_tile``  C++, see :mod:`gemq.ops.cpu`           CPU
``gpu_tile``  Triton                                 CUDA; CPU under its interpreter
============  =====================================  ==========================

Nothing falls back silently: a layout on a device that cannot serve it raises ``ValueError``.
"""

from gemq.activation import Activation
from gemq.ops.checks import set_debug
from gemq.ops.cpu import cpu_activations, cpu_isa, set_cpu_activations, set_cpu_isa
from gemq.ops.expert_buffers import expert_tables, layout_for, pack_experts, pack_stack, unpack_experts
from gemq.ops.matmul import lowbit_gemm, moe_lowbit_ffn, moe_lowbit_gemm
from gemq.ops.packed_stack import PackedStack
from gemq.ops.packing import dequantize, pack, repack, unpack
from gemq.ops.routing import topk_routing

__all__ = [
    "Activation",
    "PackedStack",
    "cpu_activations",
    "cpu_isa",
    "dequantize",
    "expert_tables",
    "layout_for",
    "lowbit_gemm",
    "moe_lowbit_ffn",
    "moe_lowbit_gemm",
    "pack",
    "pack_experts",
    "pack_stack",
    "repack",
    "set_cpu_activations",
    "set_cpu_isa",
    "set_debug",
    "topk_routing",
    "unpack",
    "unpack_experts",
]
