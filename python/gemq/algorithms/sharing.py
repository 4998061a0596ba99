"""Collect the parts that several processes quantized: afterwards every process holds the whole layer.

A process quantizes the matrices whose Hessians it has. With one process these functions change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.algorithms.gptq import GptqReport
from gemq.nn.experts import QuantizedStack
from gemq.reference.grid import dequantize_codes


def _reports(reports: dict) -> dict:
    return {key: report for part in distributed.gather(reports) for key, report in part.items()}


def share_linears(
    linears: dict[str, tuple[nn.Linear, int]], made: dict[str, tuple[Tensor, Tensor, int]],
    reports: dict[str, GptqReport],
) -> tuple[dict[str, tuple[Tensor, Tensor, int]], dict[str, GptqReport]]:
    """Gather codes, scales and reports of all of a layer's ``linears`` from those ``made`` in each process. The weights
    that other processes made are written into the modules."""
    if distributed.world().size == 1 or not linears:
        return made, reports
    device = next(iter(linears.values()))[0].weight.device
    mine = {f"{path} {kind}": t for path, pair in made.items() for kind, t in zip("cm", pair[:2], strict=True)}
    everyones, told, found = distributed.merged(mine, device), _reports(reports), {}
    for path, (module, width) in linears.items():
        codes, meta = everyones[f"{path} c"], everyones[f"{path} m"]
        found[path] = (codes, meta, width)
        if path not in made:
            module.weight.copy_(dequantize_codes(codes, meta, module.weight.dtype))
    return found, {path: told[path] for path in linears}


def gathered_stack(
    bits: list[int], part: range, made: QuantizedStack, reports: dict[int, GptqReport], device: torch.device
) -> tuple[QuantizedStack, dict[int, GptqReport]]:
    """Gather the stack of all experts of ``bits`` from those ``made`` in each process; ``part`` are the experts of this
    one. Reports are counted within the part and returned by expert."""
    reports = {part.start + e: report for e, report in reports.items()}
    if distributed.world().size == 1:
        return made, reports
    pairs = zip(part, made.codes, made.meta, strict=True)
    mine = {f"{e} {kind}": t for e, *pair in pairs for kind, t in zip("cm", pair, strict=True) if t is not None}
    everyones = distributed.merged(mine, device)
    codes, meta = ([everyones.get(f"{e} {kind}") for e in range(len(bits))] for kind in "cm")
    return QuantizedStack(codes, meta, list(bits)), _reports(reports)


def share_stack(
    weights: Tensor, bits: list[int], part: range, made: QuantizedStack, reports: dict[int, GptqReport]
) -> tuple[QuantizedStack, dict[int, GptqReport]]:
    """Gather as :func:`gathered_stack`, and write the experts that other processes made into ``weights [E, n, k]``."""
    stack, found = gathered_stack(bits, part, made, reports, weights.device)
    for e in set(range(len(bits))) - set(part):
        if bits[e]:
            weights[e].copy_(dequantize_codes(stack.codes[e], stack.meta[e], weights.dtype))
        else:
            weights[e].zero_()
    return stack, found
