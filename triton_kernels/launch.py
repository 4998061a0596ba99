"""Launchers on ``gpu_tile`` stacks: allocate, route, normalise, multiply, sum. No host sync, no data-dependent grid.

A stack is ``(qweight uint8, meta float16, expert_bits int32 [E], expert_offsets int64 [E] bytes, meta_offsets int64
[E] elements)``. Widths 5, 6 and 7 are stored as 8; 0 contributes zero, and so do ids below 0 or at least ``E``.
Arguments are trusted beyond what would be read out of bounds: ``gemq.ops`` validates.

``fast=None`` takes the tensor-core bit tricks on CUDA devices and plain arithmetic under the interpreter.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import tuning
from .activations import combine, normalize
from .layout import ROWS, WIDTHS, words_along_k
from .moe import moe_kernel
from .routing import route

Stack = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
PLAIN, FAST, SCALED = 0, 1, 2


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else tuning.DEFAULT


def _mode(x: Tensor, decode: bool, fast: bool | None) -> int:
    fast = x.is_cuda and not triton.knobs.runtime.interpret if fast is None else fast
    return (SCALED if decode else FAST) if fast else PLAIN


def _multiply(
    rows: Tensor, stack: Stack, blocks: tuple[Tensor, Tensor], out: Tensor, pairs: int, row_pairs: int, n: int,
    group_size: int, launch: tuning.Launch, parts: int, mode: int,
) -> None:
    """``out [splits, pairs, n]`` of contiguous ``rows [pairs / row_pairs, k]``."""
    qweight, meta, bits, offsets, meta_offsets = stack
    k = rows.shape[1]
    x, sums, inverse = normalize(rows, group_size, mode == SCALED)
    block_expert, block_pairs = blocks
    kws = {f"KW{width}": words_along_k(k, width) for width in WIDTHS}
    moe_kernel[(block_expert.numel(), triton.cdiv(n, ROWS), launch.splits)](
        x, sums, inverse, qweight.view(torch.int32), meta.view(torch.int32), bits, offsets, meta_offsets, block_expert,
        block_pairs, out, bits.numel(), rows.shape[0], pairs, row_pairs, n, k, x.shape[-1], **kws, GROUP=group_size,
        COLUMNS=launch.columns, WARPS=launch.warps, PARTS=parts, SPLITS=launch.splits, MODE=mode,
        PREFETCH=launch.prefetch, RUN=tuning.fragment_run(triton.__version__), num_warps=launch.warps, num_stages=1,
    )


def _check(x: Tensor, topk_ids: Tensor, group_size: int) -> None:
    tokens, top_k = topk_ids.shape
    if x.dim() not in (2, 3) or x.shape[0] != tokens or (x.dim() == 3 and x.shape[1] != top_k):
        raise ValueError(f"x {list(x.shape)} must be [T, k] or [T, top_k, k] for topk_ids {list(topk_ids.shape)}")
    if group_size not in (32, 64, 128) or x.shape[-1] % group_size:
        raise ValueError(f"group_size={group_size} must be 32, 64 or 128 and divide k={x.shape[-1]}")


def _gemm(
    x: Tensor, stack: Stack, topk_ids: Tensor, topk_weights: Tensor | None, n: int, group_size: int, out: Tensor | None,
    fast: bool | None, decode: bool,
) -> Tensor:
    _check(x, topk_ids, group_size)
    tokens, top_k = topk_ids.shape
    experts, pairs, k = stack[2].numel(), topk_ids.numel(), x.shape[-1]
    weighted = topk_weights is not None
    if out is None:
        out = x.new_empty((tokens, n) if weighted else (tokens, top_k, n))
    if pairs == 0 or n == 0:
        return out.zero_()
    name = _device_name(x.device)
    if decode:
        launch = tuning.decode_launch(name, "gemm", tokens, experts, top_k, n, k)
    else:
        launch = tuning.prefill_launch(name, tokens, experts, top_k)
    ids = topk_ids.contiguous().view(-1)
    blocks = route(ids, experts, launch.columns)
    rows = x.contiguous().view(-1, k)
    direct = launch.splits == 1 and not weighted
    target = out if direct else torch.empty(launch.splits, pairs, n, dtype=torch.float32, device=x.device)
    row_pairs = top_k if x.dim() == 2 else 1
    mode = _mode(x, decode, fast)
    _multiply(rows, stack, blocks, target, pairs, row_pairs, n, group_size, launch, 1, mode)
    if not direct:
        weights = topk_weights.contiguous() if weighted else None
        combine(target, ids, weights, out.view(tokens if weighted else pairs, n), experts)
    return out


def moe_decode(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, *, n: int, group_size: int = 128, out: Tensor | None = None,
    fast: bool | None = None,
) -> Tensor:
    """A few tokens (any number works, 1 to 16 are fast): ``x [T, k]`` or ``[T, top_k, k]`` times their experts.

    Returns ``[T, top_k, n]``, or the weighted sum ``[T, n]``, in the dtype of ``x``.
    """
    stack = (qweight, meta, expert_bits, expert_offsets, meta_offsets)
    return _gemm(x, stack, topk_ids, topk_weights, n, group_size, out, fast, decode=True)


def moe_prefill(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, *, n: int, group_size: int = 128, out: Tensor | None = None,
    fast: bool | None = None,
) -> Tensor:
    """:func:`moe_decode` for many tokens: more of them a program, one plane of activations."""
    stack = (qweight, meta, expert_bits, expert_offsets, meta_offsets)
    return _gemm(x, stack, topk_ids, topk_weights, n, group_size, out, fast, decode=False)


def moe_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, *, n: int, group_size: int = 128, out: Tensor | None = None,
    fast: bool | None = None,
) -> Tensor:
    """:func:`moe_decode` or :func:`moe_prefill`, by the number of tokens."""
    stack = (qweight, meta, expert_bits, expert_offsets, meta_offsets)
    decode = tuning.is_decode(_device_name(x.device), x.shape[0])
    return _gemm(x, stack, topk_ids, topk_weights, n, group_size, out, fast, decode)


def moe_ffn(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, *, intermediate: int,
    group_size: int = 128, down_group_size: int | None = None, out: Tensor | None = None, fast: bool | None = None,
) -> Tensor:
    """``sum_j w_j * down_j(silu(gate_j(x)) * up_j(x))`` for ``x [T, hidden]``, in the dtype of ``x``.

    The inner activations stay float32 between the two products.
    """
    tokens, top_k = topk_ids.shape
    down_group_size = down_group_size or group_size
    _check(x, topk_ids, group_size)
    hidden = x.shape[1]
    if tokens * top_k == 0:
        return x.new_zeros(tokens, hidden) if out is None else out.zero_()
    name = _device_name(x.device)
    decode = tuning.is_decode(name, tokens)
    if intermediate % ROWS:
        both = _gemm(x.float(), gate_up, topk_ids, None, 2 * intermediate, group_size, None, fast, decode)
        gate, up = both.chunk(2, dim=-1)
        act = torch.nn.functional.silu(gate) * up
    else:
        act = _gate_up(x, gate_up, topk_ids, intermediate, group_size, name, decode, fast)
    out = torch.empty_like(x) if out is None else out
    return _gemm(act, down, topk_ids, topk_weights, hidden, down_group_size, out, fast, decode)


def moe_decode_ffn(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, **options
) -> Tensor:
    """:func:`moe_ffn`; the name says that up to 16 tokens take the decode kernels."""
    return moe_ffn(x, gate_up, down, topk_ids, topk_weights, **options)


def _gate_up(
    x: Tensor, stack: Stack, topk_ids: Tensor, intermediate: int, group_size: int, name: str, decode: bool,
    fast: bool | None,
) -> Tensor:
    """float32 ``silu(gate) * up`` ``[T, top_k, intermediate]`` in one product."""
    tokens, top_k = topk_ids.shape
    experts = stack[2].numel()
    if decode:
        launch = tuning.decode_launch(name, "ffn", tokens, experts, top_k, intermediate, x.shape[1])
    else:
        launch = tuning.prefill_launch(name, tokens, experts, top_k)
    act = torch.empty(tokens, top_k, intermediate, dtype=torch.float32, device=x.device)
    blocks = route(topk_ids.contiguous().view(-1), experts, launch.columns)
    mode = _mode(x, decode, fast)
    pairs = tokens * top_k
    _multiply(x.contiguous(), stack, blocks, act, pairs, top_k, intermediate, group_size, launch, 2, mode)
    return act


def lowbit_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, *, bits: int, n: int, group_size: int = 128, out: Tensor | None = None,
    fast: bool | None = None,
) -> Tensor:
    """``x [T, k]`` times one packed matrix: a stack of one expert, ``[T, n]``."""
    device = x.device
    stack = (
        qweight, meta, torch.full((1,), bits, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device),
    )
    ids = torch.zeros(x.shape[0], 1, dtype=torch.int32, device=device)
    out = None if out is None else out.view(x.shape[0], 1, n)
    return moe_gemm(x, *stack, ids, n=n, group_size=group_size, out=out, fast=fast).view(x.shape[0], n)
