"""Values of options, whose errors name them as the command line does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from gemq import recipes


@contextmanager
def named(*options: str) -> Iterator[None]:
    """Turn a ``ValueError`` that begins with one of ``options`` (``bits must be ...``) into typer's of ``--bits``."""
    try:
        yield
    except ValueError as error:
        first, _, rest = str(error).partition(" ")
        if type(error) is not ValueError or first.rstrip(":") not in options:
            raise
        raise typer.BadParameter(f"--{first.replace('_', '-')} {rest}") from None


def budgets(text: str) -> tuple[float, ...]:
    """``"3,2.5,2"`` as numbers; a typer error if one is not."""
    with named("bits"):
        return recipes.budgets_of(text)


def widths(text: str) -> tuple[int, ...]:
    """``"1,2,3"`` as ascending widths; a typer error if one is not in 0..8."""
    with named("candidates"):
        return recipes.widths_of(text)


def shared(text: str) -> int | None:
    """``"auto"`` as None, else a width."""
    with named("shared_bits"):
        return recipes.shared_of(text)
