"""Launchers for a few tokens on ``gpu_tile`` stacks: allocate, prepare, multiply. No host sync, no data-dependent grid.

The launches of a block of experts, a program a cell; ``up`` and ``gate`` tiles are one program's::

    prepare_kernel          gate_up_kernel                     product_kernel
    1 program: block        blocks x n / (tiles * ROWS)        blocks x n / ROWS x splits of K
      tables, counters      +---------+---------+              +--------+--------+
    1 a row and 512         | block 0 | block 1 |  tile 0      |  b 0   |  b 1   |  tile 0 |  the last program of
      columns of x          +---------+---------+              +--------+--------+         |  a tile to arrive sums
    1 a pair: zeros         | block 0 | block 1 |  tile 1      |  b 0   |  b 1   |  tile 1 v  all its blocks' partial
      after its end         +---------+---------+              +--------+--------+            sums, in slot order
       x -> fp16            silu(gate) * up -> fp16            partial float32 -> out

    blocks: up to 8 or 16 pairs that share an expert (:mod:`.blocks`); neighbours of one expert meet in the L2.

``gemq.ops`` validates: arguments are trusted beyond what would be read out of bounds. Widths 5, 6 and 7 are stored as
8; 0 contributes zero, and so do ids below 0 or at least ``E``. ``fast=None`` takes the float16 bit tricks on CUDA
devices and plain arithmetic under the interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from . import launch_parameters
from .activation import SILU, Inner, add_bias
from .decode_kernels import gate_up_kernel, product_kernel
from .decode_prepare import Activations, Blocks, prepare
from .layout import ROWS, Stack, all_words_along_k, stored_bits
from .widths import Decode

PLAIN, SCALED = 0, 2


@lru_cache
def _name_of(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def device_name(device: torch.device) -> str:
    """The name that launch tables are looked up by."""
    return _name_of(device.index) if device.type == "cuda" else launch_parameters.DEFAULT


def _interpreted() -> bool:
    return triton.knobs.runtime.interpret


def _mode(x: Tensor, fast: bool | None) -> int:
    fast = x.is_cuda and not _interpreted() if fast is None else fast
    return SCALED if fast else PLAIN


def _how(k: int, group_size: int, launch: launch_parameters.Launch, mode: int, tiles: int, parts: int, splits: int,
         planes: bool, only: int = 0) -> Decode:  # fmt: skip
    """The compile-time choices of a product over ``k`` columns."""
    return Decode(
        all_words_along_k(k), group_size, launch.columns, launch.warps, tiles, parts, splits, mode, not _interpreted(),
        launch.ahead, launch_parameters.fragment_run(triton.__version__), planes, launch.pdl, only,
    )


def _options(launch: launch_parameters.Launch) -> dict:
    """Options of triton's own that both kernels are launched with."""
    pdl = {"launch_pdl": True} if launch.pdl else {}
    return pdl | {"num_warps": launch.warps, "num_stages": 1, "maxnreg": launch.registers}


def check(x: Tensor, topk_ids: Tensor, group_size: int) -> None:
    """Raise ``ValueError`` for shapes that the kernels would read out of bounds."""
    tokens, top_k = topk_ids.shape
    if x.dim() not in (2, 3) or x.shape[0] != tokens or (x.dim() == 3 and x.shape[1] != top_k):
        raise ValueError(f"x {list(x.shape)} must be [T, k] or [T, top_k, k] for topk_ids {list(topk_ids.shape)}")
    if group_size not in (32, 64, 128) or x.shape[-1] % group_size:
        raise ValueError(f"group_size={group_size} must be 32, 64 or 128 and divide k={x.shape[-1]}")


def _product(
    act: Activations, stack: Stack, blocks: Blocks, ids: Tensor | None, topk_weights: Tensor | None, out: Tensor,
    pairs: int, top_k: int, sharing: int, n: int, group_size: int, launch: launch_parameters.Launch, mode: int,
    dense: int = 0, bias: Tensor | None = None,
) -> None:
    """``out [pairs, n]``, or with weights ``[tokens, n]``, of prepared activations."""
    qweight, meta, bits, offsets, meta_offsets = stack
    direct = launch.splits == 1 and topk_weights is None
    partial = out if direct else torch.empty(launch.splits, pairs, n, dtype=torch.float32, device=out.device)
    product_kernel[(blocks.count, triton.cdiv(n, ROWS), launch.splits)](
        act.x, act.groups, qweight.view(torch.int32), meta.view(torch.int32), bits, offsets, meta_offsets,
        blocks.expert, blocks.pairs, bits if ids is None else ids, bits if topk_weights is None else topk_weights,
        blocks.arrived, partial, out, bits.numel(), act.x.shape[1], pairs, top_k, sharing, n, act.columns,
        act.x.shape[-1],
        HOW=_how(act.columns, group_size, launch, mode, 1, 1, launch.splits, act.x.shape[0] > 1, stored_bits(dense)),
        SLOTS=0 if topk_weights is None else triton.next_power_of_2(top_k), DENSE=dense, bias_ptr=bias,
        **_options(launch),
    )


def moe_decode(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, *, n: int, group_size: int = 128, out: Tensor | None = None,
    fast: bool | None = None, bias: Tensor | None = None,
) -> Tensor:
    """A few tokens (any number works, 1 to 16 are fast): ``x [T, k]`` or ``[T, top_k, k]`` times their experts.

    Returns ``[T, top_k, n]``, or the weighted sum ``[T, n]``, of products and a ``bias [E, n]``, in the dtype of ``x``.
    Two launches.
    """
    stack = (qweight, meta, expert_bits, expert_offsets, meta_offsets)
    check(x, topk_ids, group_size)
    tokens, top_k = topk_ids.shape
    experts, pairs, k = expert_bits.numel(), topk_ids.numel(), x.shape[-1]
    if out is None:
        out = x.new_empty((tokens, top_k, n) if topk_weights is None else (tokens, n))
    if pairs == 0 or n == 0:
        return out.zero_()
    launch = launch_parameters.decode_launch(device_name(x.device), "gemm", tokens, experts, top_k, n, k)
    mode = _mode(x, fast)
    ids = topk_ids.contiguous().view(-1)
    tiles = triton.cdiv(n, ROWS)
    weighted = topk_weights is not None
    act, blocks = prepare(
        x.contiguous().view(-1, k), ids, experts, group_size, launch.columns,
        counters_a_block=0 if weighted or launch.splits == 1 else tiles, counters=tiles if weighted else 0,
        scaled=mode == SCALED, pdl=launch.pdl,
    )
    weights = topk_weights.contiguous() if weighted else None
    sharing = top_k if x.dim() == 2 else 1
    _product(act, stack, blocks, ids, weights, out, pairs, top_k, sharing, n, group_size, launch, mode, bias=bias)
    return out


def _fused_ffn(
    x: Tensor, gate_up: Stack, down: Stack, ids: Tensor, topk_weights: Tensor, intermediate: int, group_size: int,
    down_group_size: int, out: Tensor, mode: int, between: Inner,
) -> None:
    tokens, hidden = x.shape
    qweight, meta, bits, offsets, meta_offsets = gate_up
    experts, pairs, top_k = bits.numel(), ids.numel(), ids.numel() // tokens
    name = device_name(x.device)
    tiles = down_group_size // ROWS
    first = launch_parameters.decode_launch(name, "ffn", tokens, experts, top_k, intermediate, hidden, tiles)
    second = launch_parameters.decode_launch(name, "gemm", tokens, experts, top_k, hidden, intermediate)
    # both products read the same tables
    second = replace(second, columns=first.columns)
    inner = Activations.empty(pairs, intermediate, down_group_size, 1, x.device)
    act, blocks = prepare(
        x.contiguous(), ids, experts, group_size, first.columns, 0, triton.cdiv(hidden, ROWS), mode == SCALED, inner,
        down_group_size, first.pdl,
    )
    gate_up_kernel[(blocks.count, intermediate // (ROWS * tiles))](
        act.x, act.groups, qweight.view(torch.int32), meta.view(torch.int32), bits, offsets, meta_offsets,
        blocks.expert, blocks.pairs, inner.x, inner.groups, down[2], experts, tokens, top_k, intermediate, hidden,
        act.x.shape[-1], inner.x.shape[-1],
        HOW=_how(hidden, group_size, first, mode, tiles, 1 + between.gated, 1, mode == SCALED),
        ACT_KWS=all_words_along_k(intermediate), ACT_GROUP=down_group_size, bias_ptr=between.gate_up_bias,
        GATING=between.gating, **_options(first),
    )
    weights = topk_weights.contiguous()
    _product(inner, down, blocks, ids, weights, out, pairs, top_k, 1, hidden, down_group_size, second, mode,
             bias=between.down_bias)


def ffn_decode(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, *, intermediate: int,
    group_size: int = 128, down_group_size: int | None = None, out: Tensor | None = None, fast: bool | None = None,
    between: Inner = SILU,
) -> Tensor:
    """``sum_j w_j * down_j(silu(gate_j(x)) * up_j(x))`` for a few tokens ``x [T, hidden]``, in the dtype of ``x``.

    ``between`` gives another activation, and biases.

    Three launches: tables and activations, gate and up, down and sum. The inner activations keep the 11 significant
    bits of fp16 with an exponent per group. Where the intermediate size does not fill tiles, or a group is
    smaller than a tile, two products with torch between them do.
    """
    down_group_size = down_group_size or group_size
    check(x, topk_ids, group_size)
    out = torch.empty_like(x) if out is None else out
    if topk_ids.numel() == 0:
        return out.zero_()
    if down_group_size % ROWS == 0 and intermediate % down_group_size == 0:
        ids = topk_ids.contiguous().view(-1)
        mode = _mode(x, fast)
        _fused_ffn(x, gate_up, down, ids, topk_weights, intermediate, group_size, down_group_size, out, mode,
                   between)
        return out
    rows = between.rows(intermediate)
    both = moe_decode(x.float(), *gate_up, topk_ids, n=rows, group_size=group_size, fast=fast)
    act = between.act(add_bias(both, between.gate_up_bias, topk_ids, gate_up[2]))
    return moe_decode(
        act, *down, topk_ids, topk_weights, n=x.shape[1], group_size=down_group_size, out=out, fast=fast,
        bias=between.down_bias,
    )


def dense_decode(
    x: Tensor, qweight: Tensor, meta: Tensor, *, bits: int, n: int, group_size: int = 128, out: Tensor | None = None,
    fast: bool | None = None,
) -> Tensor:
    """``x [T, k]`` times one packed matrix, ``[T, n]``, in two launches."""
    tokens, k = x.shape
    check(x, x[:, :1], group_size)
    out = x.new_empty(tokens, n) if out is None else out
    if tokens == 0 or n == 0:
        return out.zero_()
    launch = launch_parameters.decode_launch(device_name(x.device), "gemm", tokens, 1, 1, n, k)
    mode = _mode(x, fast)
    act, blocks = prepare(
        x.contiguous(), None, 1, group_size, launch.columns,
        counters_a_block=0 if launch.splits == 1 else triton.cdiv(n, ROWS), counters=0, scaled=mode == SCALED,
        pdl=launch.pdl,
    )
    # one matrix needs no tables: any tensors stand for them
    stack = (qweight, meta, blocks.expert, blocks.expert, blocks.expert)
    _product(act, stack, blocks, None, None, out, tokens, 1, 1, n, group_size, launch, mode, dense=bits)
    return out
