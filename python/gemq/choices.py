"""Values of options that have a fixed set: one enumeration each, for the command line and Python alike.

A member is its text, so a plain string does as well. This file imports nothing of gemq: the help of a command reads it.
"""

from __future__ import annotations

from enum import StrEnum


class Recipe(StrEnum):
    """Sets of options."""

    default = "default"
    best = "best"
    paper = "paper"
    fast = "fast"


class Method(StrEnum):
    """Bit allocation."""

    gemq = "gemq"
    pmq = "pmq"
    uniform = "uniform"
    global_pmq = "global-pmq"
    two_step = "two-step"
    fisher = "fisher"


class RouterMethod(StrEnum):
    """Targets of router tuning."""

    loss = "loss"
    alignment = "alignment"


class Clip(StrEnum):
    """Range search."""

    none = "none"
    paper = "paper"
    mse = "mse"


class Compile(StrEnum):
    """Ways to run a decoding step."""

    auto = "auto"
    none = "none"
    compile = "compile"
    graph = "graph"
