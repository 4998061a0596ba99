"""Random packed layers, routings and timers to measure the kernels, for ``gemq tune`` and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemq import format as fmt
from gemq.ops.packed_stack import Stack


def random_stack(
    bits: Sequence[int], n: int, k: int, group_size: int, layout: str, device: torch.device | str,
    generator: torch.Generator | None = None,
) -> Stack:
    """``len(bits)`` experts ``n`` x ``k`` of random codes straight in ``layout``; no packing, any bytes are codes.

    Weights are centred with a range of about ``3.5 * k ** -0.5``, so that activations keep their size. ``generator``
    is on ``device``. Returns ``(qweight, meta, expert_bits, expert_offsets, meta_offsets)`` as the ops take them.
    """
    plan = fmt.expert_layout(list(bits), n, k, group_size, layout)
    qweight = torch.randint(0, 256, (plan.code_bytes,), dtype=torch.uint8, device=device, generator=generator)
    meta = torch.empty(plan.meta_elements, dtype=torch.float16, device=device)
    ends = [*plan.meta_offsets[1:], plan.meta_elements]
    for width, begin, end in zip(plan.bits, plan.meta_offsets, ends, strict=True):
        if width == 0:
            continue
        # 5, 6 and 7 bits lie in gpu_tile as 8
        top = (1 << (fmt.gpu_bits(width) if layout == "gpu_tile" else width)) - 1
        s = 3.5 / (top * k**0.5)
        part = meta[begin:end].view((-1, 2, 16) if layout == "cpu_tile" else (-1, 2))
        part[:, 0] = s
        part[:, 1] = -s * top / 2
    tables = [torch.tensor(values, dtype=kind, device=device) for values, kind in (
        (plan.bits, torch.int32), (plan.code_offsets, torch.int64), (plan.meta_offsets, torch.int64))]
    return qweight, meta, tables[0], tables[1], tables[2]


def random_routing(
    tokens: int, experts: int, top_k: int, device: torch.device | str, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``(topk_ids int64, topk_weights float32)``, each ``[tokens, top_k]``: distinct experts, drawn uniformly for each
    token; weights that sum to 1. ``generator`` is on the CPU."""
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=generator).softmax(-1)
    return ids.to(device), weights.to(device)


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``run`` captured in a CUDA graph, after two calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def event_time(run: Callable[[], object]) -> float:
    """Microseconds of one call on the current CUDA stream, by events; waits for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def clock_time(run: Callable[[], object]) -> float:
    """Microseconds of one call by the wall clock, for the CPU."""
    begin = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begin) / 1e3
