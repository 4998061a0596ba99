"""The C++ kernels on the CPU: how they round activations, and the calls.

Weights are always the exact ``q * s + m`` of the format. Activations are rounded by groups of ``group_size`` columns
(the groups that share one ``(s, m)``), row by row, or not at all:

=========  =================================  ========================================
setting    what is multiplied                 error of one activation
=========  =================================  ========================================
``int16``  ``scale * q``, ``|q| <= 32512``    at most ``max|x| / 65024`` over its group
``int8``   ``scale * q``, ``|q| <= 127``      at most ``max|x| / 254`` over its group
``exact``  float32                            none
=========  =================================  ========================================

``int16`` is the default: it reaches the speed of memory like ``int8`` at most widths and costs no perplexity that can
be measured, where ``int8`` cost up to 0.12% (docs/performance.md). The integer settings sum exactly inside a group. In
a fused block the inner activations are rounded the same way. A group with a NaN or an infinity
gives NaN; one whose largest value is below ``2 ** -100`` counts as zero. The variant without integer dot products
(``portable``) computes all settings as ``exact``. Sums over groups are float32, and the result is rounded once to the
dtype of ``x``. No result depends on the number of threads, nor, with the integer settings, on the other tokens of a
call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemq._core import core
from gemq.activation import PLAIN, Between
from gemq.ops import checks
from gemq.ops.packed_stack import Stack

ACTIVATIONS = ("exact", "int16", "int8")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_setting = "int16"


def set_cpu_activations(setting: str) -> str:
    """Choose how the CPU kernels round activations, for the whole process; returns the setting before.

    ``setting`` is ``int16`` (the default), ``int8`` or ``exact``, as the table in :mod:`gemq.ops.cpu` says.
    Raises ``ValueError`` for anything else.
    """
    global _setting
    if setting not in ACTIVATIONS:
        raise ValueError(f"setting must be one of {', '.join(ACTIVATIONS)}, got {setting!r}")
    before, _setting = _setting, setting
    return before


def cpu_activations() -> str:
    """The setting of :func:`set_cpu_activations` in force."""
    return _setting


def cpu_isa() -> str:
    """The variant of the CPU kernels in use: ``avx512vnni``, ``avx512``, ``avx2vnni``, ``avx2`` or ``portable``."""
    return core().cpu_isa()


def set_cpu_isa(name: str) -> str:
    """Choose a variant of the CPU kernels, for the whole process; returns the one before.

    Without this, cpuid chooses (or the variable ``GEMQ_CPU_ISA``). Weights packed before stay valid. Raises
    ``ValueError`` for a name that is unknown or does not run on this CPU.
    """
    before = cpu_isa()
    core().set_cpu_isa(name)
    return before


def empty(elements: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor to be filled with tiles, on large pages where the system has them."""
    out = torch.empty(elements, dtype=dtype)
    core().advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def on_large_pages(tensor: Tensor) -> Tensor:
    """Move a tensor's memory to large pages where the system can, and return the tensor. Its address stays."""
    core().advise_huge_pages(tensor.data_ptr(), tensor.nbytes, True)
    return tensor


def address(stack: Stack):
    """Return the extension's ``StackAddress`` of a stack's tensors, which it does not keep alive."""
    codes, meta, bits, offsets, meta_offsets = stack
    return core().stack_address(
        codes=codes.data_ptr(), meta=meta.data_ptr(), bits=bits.data_ptr(), offsets=offsets.data_ptr(),
        meta_offsets=meta_offsets.data_ptr(), code_bytes=codes.numel(), meta_elements=meta.numel(),
    )


def moe_gemm(
    x: Tensor, stack: Stack, topk_ids: Tensor, topk_weights: Tensor | None, n: int, group_size: int
) -> Tensor:
    """:func:`gemq.ops.moe_lowbit_gemm` on contiguous ``x``; ``ValueError`` for an expert outside the buffers."""
    checks.expert_ids(topk_ids, stack[2].numel())
    tokens, top_k = topk_ids.shape
    ids = topk_ids.to(torch.int64).contiguous()
    scale = None if topk_weights is None else topk_weights.float().contiguous()
    if n * x.shape[-1] > 8 * stack[0].numel():
        # no expert can store so many weights; the kernel would say so only after the output was allocated
        checks.expert_bounds("weight", stack, n, x.shape[-1], group_size, "cpu_tile")
    out = x.new_empty((tokens, top_k, n) if scale is None else (tokens, n))
    core().moe_gemm_cpu(
        x=x.data_ptr(), x_per_slot=x.dim() == 3, stack=address(stack), num_experts=stack[2].numel(),
        topk_ids=ids.data_ptr(), topk_weights=0 if scale is None else scale.data_ptr(), out=out.data_ptr(),
        tokens=tokens, top_k=top_k, k=x.shape[-1], n=n, group_size=group_size, type=TYPES[x.dtype],
        precision=ACTIVATIONS.index(_setting), threads=torch.get_num_threads(),
    )
    return out


def moe_ffn(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, intermediate: int,
    group_size: int, down_group_size: int, between: Between = PLAIN,
) -> Tensor:
    """:func:`gemq.ops.moe_lowbit_ffn` on contiguous ``x``; ``ValueError`` for an expert outside the buffers."""
    checks.expert_ids(topk_ids, gate_up[2].numel())
    tokens, top_k = topk_ids.shape
    ids, scale = topk_ids.to(torch.int64).contiguous(), topk_weights.float().contiguous()
    out = torch.empty_like(x)
    activation, gate_up_bias, down_bias = between
    how = activation.gating
    core().moe_ffn_cpu(
        x=x.data_ptr(), gate_up=address(gate_up), down=address(down), num_experts=gate_up[2].numel(),
        topk_ids=ids.data_ptr(), topk_weights=scale.data_ptr(), out=out.data_ptr(), tokens=tokens, top_k=top_k,
        hidden=x.shape[-1], intermediate=intermediate, group_size=group_size, down_group_size=down_group_size,
        type=TYPES[x.dtype], precision=ACTIVATIONS.index(_setting), threads=torch.get_num_threads(),
        gated=activation.gated, slope=how.slope, cubic=how.cubic, limit=how.limit, shift=how.shift,
        gate_up_bias=0 if gate_up_bias is None else gate_up_bias.data_ptr(),
        down_bias=0 if down_bias is None else down_bias.data_ptr(),
    )
    return out


def dense_gemm(x: Tensor, qweight: Tensor, meta: Tensor, bits: int, n: int, group_size: int) -> Tensor:
    """:func:`gemq.ops.lowbit_gemm` on ``x [T, k]``."""
    tokens, k = x.shape
    x = x.contiguous()
    out = x.new_empty(tokens, n)
    core().lowbit_gemm_cpu(
        x=x.data_ptr(), qweight=qweight.data_ptr(), meta=meta.data_ptr(), out=out.data_ptr(), tokens=tokens, k=k, n=n,
        bits=bits, group_size=group_size, type=TYPES[x.dtype], precision=ACTIVATIONS.index(_setting),
        threads=torch.get_num_threads(),
    )
    return out
