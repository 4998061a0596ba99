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


class Keep(StrEnum):
    """Parts of the work that stay in memory while quantizing; a run directory holds the rest.

    ``layer``: one decoder layer. ``activations``: those of the calibration text as well. ``model``: everything, without
    a run directory, so that nothing can be continued.
    """

    layer = "layer"
    activations = "activations"
    model = "model"


class Changed(StrEnum):
    """Dealings with a run directory that was begun with other settings.

    ``refuse`` it, ``redo`` the stages that the changes touch, or ``restart`` with an empty one.
    """

    refuse = "refuse"
    redo = "redo"
    restart = "restart"


class Constraints(StrEnum):
    """Experts that every layer must have: one at the highest width (c2), one at the second highest (c3)."""

    none = "none"
    c2 = "c2"
    c3 = "c3"
    c2c3 = "c2c3"


class Accounting(StrEnum):
    """Counts of shared experts in the budget."""

    exact = "exact"
    paper = "paper"


class Granularity(StrEnum):
    """Weights that share one width."""

    auto = "auto"
    expert = "expert"
    matrix = "matrix"


class Perturbation(StrEnum):
    """Ways to quantize an expert in order to measure it."""

    gptq = "gptq"
    rtn = "rtn"


class Estimate(StrEnum):
    """Models on which the costs of later budgets are measured."""

    full = "fp"
    quantized = "quantized"
    tuned = "tuned"


class Solver(StrEnum):
    """Solvers of the allocation's program."""

    auto = "auto"
    highs = "highs"
    cbc = "cbc"


class Dtype(StrEnum):
    """Dtypes to compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
