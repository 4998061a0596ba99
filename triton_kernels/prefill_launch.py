"""Launchers for many tokens: sort pairs by expert, normalise inputs, multiply by either method, sum over slots.

As in :mod:`.by_tokens`: no host sync, no data-dependent grid, arguments are trusted. The inner activations of a block
are float16 with a power of two a row, found between the two products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import launch_parameters
from .activation import SILU, Inner, add_bias
from .blocks_by_sorting import sort_pairs
from .layout import ROWS, STEP_COLUMNS, WIDTHS, Stack, all_words_along_k, span_columns
from .prefill_inputs import combine, normalize, rescale
from .prefill_packed import packed_kernel
from .prefill_unpacked import dequantize_kernel, grouped_kernel
from .widths import Packed, Unpacking

# float16 weights of the dense method live in at most so many bytes at a time, or in one expert's if that is more
SCRATCH_BYTES = 512 << 20
UNPACKING_WARPS = 4


@dataclass(frozen=True)
class Job:
    """Values that all products of a call share; ``order`` is that of blocks_by_sorting.sort_pairs."""

    order: tuple[Tensor, Tensor, Tensor]
    launch: launch_parameters.Prefill
    fast: bool
    between: Inner = SILU


@dataclass(frozen=True)
class Inputs:
    """Normalised activations: float16 ``x [inputs, padded k]``, ``inverse [inputs]``; ``sharing`` pairs have one."""

    x: Tensor
    inverse: Tensor
    k: int
    sharing: int


def _multiply(inputs: Inputs, stack: Stack, out: Tensor, exponents: Tensor | None, group_size: int, job: Job) -> None:
    """``out [pairs, n]``; with ``exponents``, the float16 inner activations that they scale."""
    (_, n), parts = out.shape, _parts(exponents, job)
    if job.launch.method == "dense":
        _multiply_dense(inputs, stack, out, exponents, group_size, job)
        return
    qweight, meta, bits, offsets, meta_offsets = stack
    block_expert, block_pairs, _ = job.order
    blocks, launch = block_expert.numel(), job.launch
    how = Packed(
        all_words_along_k(inputs.k), group_size, launch.rows, launch.columns, parts, launch.warps, launch.stages,
        launch.steps, job.fast, launch_parameters.threads_first(triton.__version__),
    )
    packed_kernel[(blocks * triton.cdiv(n, launch.rows // parts),)](
        inputs.x, inputs.inverse, qweight.view(torch.int32), meta.view(torch.int32), bits, offsets, meta_offsets,
        block_expert, block_pairs, out, out if exponents is None else exponents, bits.numel(), blocks, inputs.sharing,
        n, inputs.k, inputs.x.shape[1], HOW=how, num_warps=launch.warps, num_stages=1, **_inner(exponents, job),
    )


def _parts(exponents: Tensor | None, job: Job) -> int:
    """Matrices of a product: gate and up, where their inner activations are what it writes."""
    return 2 if exponents is not None and job.between.gated else 1


def _inner(exponents: Tensor | None, job: Job) -> dict:
    """Arguments of the kernels that write inner activations, which have ``exponents``."""
    if exponents is None:
        return {}
    between = job.between
    return {"bias_ptr": between.gate_up_bias, "GATING": between.gating, "SQUARED": not between.gated}


def _multiply_dense(
    inputs: Inputs, stack: Stack, out: Tensor, exponents: Tensor | None, group_size: int, job: Job
) -> None:
    qweight, meta, bits, offsets, meta_offsets = stack
    block_expert, block_pairs, counts = job.order
    (_, n), parts, k, experts = out.shape, _parts(exponents, job), inputs.k, bits.numel()
    blocks, launch = block_expert.numel(), job.launch
    height, stride = triton.cdiv(parts * n, ROWS) * ROWS, triton.cdiv(k, STEP_COLUMNS) * STEP_COLUMNS
    chunk = max(1, min(experts, SCRATCH_BYTES // (2 * height * stride)))
    weights = torch.empty(chunk, height, stride, dtype=torch.float16, device=out.device)
    words = all_words_along_k(k)
    spans = max(triton.cdiv(k, span_columns(width, kw)) for width, kw in zip(WIDTHS, words, strict=True))
    how = Unpacking(words, group_size, UNPACKING_WARPS, job.fast, launch_parameters.threads_first(triton.__version__))
    for first in range(0, experts, chunk):
        until = min(first + chunk, experts)
        dequantize_kernel[(spans, height // ROWS, until - first)](
            qweight.view(torch.int32), meta.view(torch.int32), bits, offsets, meta_offsets, counts, weights, first,
            height, k, stride, HOW=how, num_warps=how.warps, num_stages=1,
        )
        grouped_kernel[(blocks * triton.cdiv(n, launch.rows // parts),)](
            inputs.x, inputs.inverse, weights, bits, block_expert, block_pairs, out,
            out if exponents is None else exponents, first, until, experts, blocks, inputs.sharing, n, height, k,
            inputs.x.shape[1], stride, COLUMNS=launch.columns, ROWS=launch.rows, PARTS=parts, STAGES=launch.stages,
            num_warps=launch.warps, num_stages=launch.stages, **_inner(exponents, job),
        )


def _inputs(x: Tensor, top_k: int, launch: launch_parameters.Prefill) -> Inputs:
    """Normalise inputs ``[T, k]``, which a token's pairs share, or ``[T, top_k, k]``."""
    k = x.shape[-1]
    sharing = top_k if x.dim() == 2 else 1
    return Inputs(*normalize(x.contiguous().view(-1, k), launch.method == "packed"), k, sharing)


def gemm(
    x: Tensor, stack: Stack, topk_ids: Tensor, topk_weights: Tensor | None, n: int, group_size: int, out: Tensor,
    fast: bool, launch: launch_parameters.Prefill,
) -> Tensor:
    """Write ``[T, top_k, n]``, or the weighted sum ``[T, n]``, to ``out``; ``x`` is ``[T, k]`` or ``[T, top_k, k]``."""
    experts, top_k = stack[2].numel(), topk_ids.shape[1]
    ids = topk_ids.contiguous().view(-1)
    job = Job(sort_pairs(ids, experts, launch.columns), launch, fast)
    inputs = _inputs(x, top_k, launch)
    if topk_weights is None:
        _multiply(inputs, stack, out.view(-1, n), None, group_size, job)
    else:
        _multiply_and_sum(inputs, stack, ids, topk_weights, out, group_size, job)
    return out


def _multiply_and_sum(
    inputs: Inputs, stack: Stack, ids: Tensor, topk_weights: Tensor, out: Tensor, group_size: int, job: Job
) -> None:
    partial = torch.empty(ids.numel(), out.shape[1], dtype=torch.float32, device=out.device)
    _multiply(inputs, stack, partial, None, group_size, job)
    combine(partial, ids, topk_weights.contiguous(), out, stack[2], job.between.down_bias)


def ffn(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, intermediate: int, group_size: int,
    down_group_size: int, out: Tensor, fast: bool, launch: launch_parameters.Prefill,
    between: Inner = SILU,
) -> Tensor:
    """Write the output of the whole expert block for ``x [T, hidden]`` to ``out``."""
    experts, top_k = gate_up[2].numel(), topk_ids.shape[1]
    ids = topk_ids.contiguous().view(-1)
    job = Job(sort_pairs(ids, experts, launch.columns), launch, fast, between)
    inputs = _inputs(x, top_k, launch)
    ordered = launch.method == "packed"
    pairs, device = ids.numel(), x.device
    if between.gated and intermediate % ROWS:
        # the up rows begin inside a tile
        both = torch.empty(pairs, between.rows(intermediate), dtype=torch.float32, device=device)
        _multiply(inputs, gate_up, both, None, group_size, job)
        inner = normalize(between.act(add_bias(both, between.gate_up_bias, ids, gate_up[2])), ordered)
    else:
        part = launch.rows // 2 if between.gated else launch.rows
        act = torch.empty(pairs, intermediate, dtype=torch.float16, device=device)
        exponents = torch.empty(pairs, triton.cdiv(intermediate, part), dtype=torch.int32, device=device)
        _multiply(inputs, gate_up, act, exponents, group_size, job)
        inner = rescale(act, exponents, part, ordered)
    _multiply_and_sum(Inputs(*inner, intermediate, 1), down, ids, topk_weights, out, down_group_size, job)
    return out
