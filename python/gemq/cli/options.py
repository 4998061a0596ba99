"""Parsing of option values that are lists."""

from __future__ import annotations

from pathlib import Path

import typer

from gemq.algorithms.given_allocation import GivenAllocation
from gemq.format import MAX_BITS
from gemq.interchange import read_allocation

DEFAULT_BITS = "2.5"


def budgets(text: str) -> tuple[float, ...]:
    """``"3,2.5,2"`` as numbers; a typer error if one is not."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--bits must be numbers separated by commas, got {text!r}") from None
    if len(set(values)) != len(values):
        raise typer.BadParameter(f"--bits names a budget twice: {text!r}")
    return values


def widths(text: str) -> tuple[int, ...]:
    """``"1,2,3"`` as ascending widths; a typer error if one is not in 0..8."""
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"--candidates must be whole numbers separated by commas, got {text!r}") from None
    if any(not 0 <= v <= 8 for v in values):
        raise typer.BadParameter(f"--candidates must be in 0..8, got {text!r}")
    return values


def shared(text: str) -> int | None:
    """``"auto"`` as None, else a width."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"--shared-bits must be auto or a width, got {text!r}") from None


def allocation(path: Path | None, bits: str | None) -> tuple[tuple[float, ...], GivenAllocation | None]:
    """The budgets, and the allocation of ``--allocation``, whose mean ``--bits`` then bounds (if it is given)."""
    if path is None:
        return budgets(DEFAULT_BITS if bits is None else bits), None
    limits = budgets(bits) if bits else (float(MAX_BITS),)
    if len(limits) != 1:
        raise typer.BadParameter(f"--allocation is for one budget, got --bits {bits}")
    return limits, read_allocation(path, limits[0] if bits else None)
