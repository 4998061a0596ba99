"""Collect the parts that several processes quantized: afterwards every process holds the whole layer.

A process quantizes the matrices whose Hessians it has. With one process these functions change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemq import distributed
from gemq.algorithms.gptq import GptqReport
from gemq.nn.experts import QuantizedStack


def _reports(reports: dict) -> dict:
    return {key: report for part in distributed.gather(reports) for key, report in part.items()}


def gathered_linears(
    paths: list[str], bits: dict[str, int], made: dict[str, tuple[Tensor, Tensor, int]],
    reports: dict[str, GptqReport], device: torch.device,
) -> tuple[dict[str, tuple[Tensor, Tensor, int]], dict[str, GptqReport]]:
    """Gather ``(codes, scales, bits)`` and reports of the linears at ``paths`` from those ``made`` in each process."""
    if distributed.world().size == 1 or not paths:
        return made, reports
    mine = {f"{path} {kind}": t for path, pair in made.items() for kind, t in zip("cm", pair[:2], strict=True)}
    everyones, told = distributed.merged(mine, device), _reports(reports)
    found = {path: (everyones[f"{path} c"], everyones[f"{path} m"], bits[path]) for path in paths}
    return found, {path: told[path] for path in paths}


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
