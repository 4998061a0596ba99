"""``--recipe``: what each sets. An option that is given, on the command line or in a settings file, wins."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import typer

from gemq.cli.settings import given


class Recipe(StrEnum):
    """Sets of options."""

    default = "default"
    best = "best"
    paper = "paper"
    fast = "fast"


# by parameter of `gemq quantize`; what is not named keeps its default
RECIPES: dict[Recipe, dict[str, Any]] = {
    Recipe.default: {"perturbation": "gptq"},
    # the per-layer constraints cost more than they bring where experts are few (docs/findings.md)
    Recipe.best: {"perturbation": "gptq", "constraints": "none", "samples": 256},
    # the authors' scripts; besides these, GPTQ propagates no errors inside a group at 3 bits and below
    Recipe.paper: {"perturbation": "rtn", "constraints": "c2c3", "accounting": "paper", "granularity": "expert"},
    # one measurement by rounding on a quarter of the text, for all budgets, and no tuning
    Recipe.fast: {"perturbation": "rtn", "constraints": "none", "samples": 32, "estimate": "fp",
                  "tune_routers": False},
}


def choose(context: typer.Context, recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """``values`` of the options with those of the recipe where none was given."""
    wanted = RECIPES[recipe]
    return {name: wanted[name] if name in wanted and not given(context, name) else value
            for name, value in values.items()}
