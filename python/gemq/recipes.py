"""Options of quantizing by the names of the command line, and the recipes that set them: the one table for both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemq.algorithms.given_allocation import GivenAllocation
from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.algorithms.tensor_bits import TensorBits
from gemq.choices import Changed, Keep, Recipe
from gemq.format import MAX_BITS, UNQUANTIZED
from gemq.interchange import read_allocation
from gemq.pipeline import QuantizeConfig

DEFAULT_BITS = 2.5


# what a recipe may set, as it is without one
DEFAULTS: dict[str, Any] = {
    "perturbation": "gptq", "constraints": "none", "samples": 128, "estimate": "tuned", "tune_routers": True,
    "accounting": "exact", "granularity": "auto",
}
RECIPES: dict[Recipe, dict[str, Any]] = {
    Recipe.default: {"perturbation": "gptq"},
    Recipe.best: {"perturbation": "gptq", "samples": 256},
    # the authors' scripts; besides these, GPTQ propagates no errors inside a group at 3 bits and below
    Recipe.paper: {"perturbation": "rtn", "constraints": "c2c3", "accounting": "paper", "granularity": "expert"},
    # one measurement by rounding on a quarter of the text, for all budgets, and no tuning
    Recipe.fast: {"perturbation": "rtn", "samples": 32, "estimate": "fp",
                  "tune_routers": False},
}


def budgets_of(bits: float | str | Sequence[float]) -> tuple[float, ...]:
    """Budgets in bits per expert: a number, several, or a text like ``"3,2.5,2"``.

    Raises ``ValueError`` for what is no number, and for a budget that comes twice.
    """
    parts = bits.split(",") if isinstance(bits, str) else bits if isinstance(bits, Sequence) else [bits]
    try:
        found = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"bits must be numbers separated by commas, got {bits!r:.80}") from None
    if len(set(found)) != len(found):
        raise ValueError(f"bits names a budget twice: {bits!r:.80}")
    return found


def widths_of(candidates: str | Sequence[int]) -> tuple[int, ...]:
    """Ascending widths in 0..8: several, or a text like ``"1,2,3"``. Raises ``ValueError`` for another."""
    parts = candidates.split(",") if isinstance(candidates, str) else candidates
    try:
        found = tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError):
        raise ValueError(f"candidates must be whole numbers separated by commas, got {candidates!r:.80}"
                         ) from None
    if not found or any(not 0 <= width <= MAX_BITS for width in found):
        raise ValueError(f"candidates must be in 0..{MAX_BITS}, got {candidates!r:.80}")
    return found


def shared_of(bits: str | int | None) -> int | None:
    """A width of shared experts, or None for ``"auto"``. Raises ``ValueError`` for another text."""
    if bits is None or bits == "auto":
        return None
    try:
        return int(bits)
    except (TypeError, ValueError):
        raise ValueError(f"shared_bits must be auto or a width, got {bits!r:.80}") from None


def tensor_bits_of(given: Mapping[str, int] | Sequence[str] | None) -> tuple[TensorBits, ...]:
    """Widths by name pattern: a map of patterns to bits, or texts like ``"o_proj=8"``. Raises ``ValueError``."""
    if isinstance(given, Mapping):
        return tuple(TensorBits(pattern, width) for pattern, width in given.items())
    found = []
    for text in given or ():
        pattern, equals, width = text.rpartition("=")
        width = width.strip()
        if not equals or not (width.isascii() and width.isdecimal() and len(width) <= 3):
            raise ValueError(f"tensor_bits must be like 'o_proj=8', got {text!r:.80}")
        found.append(TensorBits(pattern, int(width)))
    return tuple(found)


def given_allocation(
    allocation: str | os.PathLike | None, bits: float | str | Sequence[float] | None
) -> tuple[tuple[float, ...], GivenAllocation | None]:
    """The budgets, and the allocation of a file or checkpoint, whose mean ``bits`` then bounds (if it is given)."""
    limits = budgets_of(DEFAULT_BITS if bits is None else bits)
    if allocation is None:
        return limits, None
    if bits is None:
        limits = (float(MAX_BITS),)
    if len(limits) != 1:
        raise ValueError(f"allocation is for one budget, got bits {bits!r}")
    return limits, read_allocation(Path(allocation), None if bits is None else limits[0])


def _renamed(former: dict[str, Any], keep: str, changed: str) -> tuple[str, str]:
    """``keep`` and ``changed`` as the keywords of the release before say them, with a ``DeprecationWarning``. Raises
    ``TypeError`` for a keyword that never was, ``ValueError`` for a value that was not allowed."""
    unknown = sorted(set(former) - {"stream", "scratch", "redo", "restart"})
    if unknown:
        raise TypeError(f"quantize_config() got an unexpected keyword argument {unknown[0]!r}")
    if former.get("redo") and former.get("restart"):
        raise ValueError("redo and restart exclude each other")
    if former.get("scratch", "disk") not in ("disk", "memory"):
        raise ValueError(f"scratch must be one of disk, memory, got {former['scratch']!r:.80}")
    if "stream" in former or "scratch" in former:
        activations = former.get("scratch") == "memory"
        keep = Keep.layer if former.get("stream", True) else Keep.model
        keep = Keep.activations if activations and keep is Keep.layer else keep
    for name in ("redo", "restart"):
        changed = Changed(name) if former.get(name) else changed
    for name in former:
        new = f"keep={str(keep)!r}" if name in ("stream", "scratch") else f"changed={str(changed)!r}"
        warnings.warn(f"{name} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=3)
    return keep, changed


def quantize_config(
    model: str | os.PathLike, output: str | os.PathLike, *, bits: float | str | Sequence[float] | None = None,
    recipe: str = "default", method: str = "gemq", candidates: str | Sequence[int] = (1, 2, 3),
    granularity: str | None = None, constraints: str | None = None, calibration: str = "wikitext2",
    samples: int | None = None, length: int = 2048, seed: int = 0, attention_bits: int = 4, dense_bits: int = 4,
    shared_bits: str | int | None = "auto", accounting: str | None = None, router_bits: int = 16,
    group_size: int = 128, clip: str | None = None, refine: int | None = None, compensate: bool | None = None,
    rescale: bool | None = None, perturbation: str | None = None, damping: float = 0.01,
    tune_routers: bool | None = None, router_text: str | None = None, router_method: str = "loss",
    router_lr: float = 1e-4, router_epochs: int = 1, router_batch: int = 1, affinity: float = 0.0,
    estimate: str | None = None, batch_size: int = 4, device: str | None = None, dtype: str = "auto",
    overwrite: bool = False, trust_remote_code: bool = False, check: bool = True,
    keep: str = Keep.layer, run_dir: str | os.PathLike | None = None, changed: str = Changed.refuse,
    keep_run: bool = False, log: str | os.PathLike | None = None, allocation: str | os.PathLike | None = None,
    head_bits: int = UNQUANTIZED, embedding_bits: int = UNQUANTIZED,
    tensor_bits: Mapping[str, int] | Sequence[str] | None = None, costs: str | os.PathLike | None = None,
    **former: Any,
) -> QuantizeConfig:
    """The settings of a run from the options of ``gemq quantize``, by the same names (docs/command-line.md).

    What is None and in :data:`DEFAULTS` is the recipe's. ``former`` are keywords of the release before: ``stream``,
    ``scratch``, ``redo`` and ``restart``. Raises ``ValueError`` naming the option, what was given and what is allowed.
    """
    keep, changed = _renamed(former, keep, changed)
    for name, value, allowed in (("recipe", recipe, Recipe), ("keep", keep, Keep), ("changed", changed, Changed)):
        if value not in set(allowed):
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r:.80}")
    budgets, given = given_allocation(allocation, bits)
    told = {"perturbation": perturbation, "constraints": constraints, "samples": samples, "estimate": estimate,
            "tune_routers": tune_routers, "accounting": accounting, "granularity": granularity}
    chosen = DEFAULTS | RECIPES[Recipe(recipe)] | {name: value for name, value in told.items() if value is not None}
    whole = MethodConfig(
        budgets=budgets, given=given, method=method, candidates=widths_of(candidates),
        granularity=chosen["granularity"], per_layer=chosen["constraints"], attention_bits=attention_bits,
        dense_bits=dense_bits, shared_bits=shared_of(shared_bits), accounting=chosen["accounting"],
        router_bits=router_bits, tune=chosen["tune_routers"], router_method=router_method, affinity=affinity,
        estimate=chosen["estimate"], perturbation=chosen["perturbation"], batch_size=batch_size,
        gptq=GptqConfig.for_recipe("paper" if recipe == "paper" else "default", group_size, damping, clip, refine,
                                   compensate, rescale),
        router=RouterTuningConfig(learning_rate=router_lr, epochs=router_epochs, batch_size=router_batch),
        tensor_bits=tensor_bits_of(tensor_bits), head_bits=head_bits, embedding_bits=embedding_bits,
    )
    places = [None if place is None else os.fspath(place) for place in (run_dir, log, costs)]
    return QuantizeConfig(
        os.fspath(model), os.fspath(output), calibration, chosen["samples"], length, seed, router_text, device, dtype,
        overwrite, trust_remote_code, whole, str(keep), places[0], str(changed), keep_run, places[1], check,
        places[2],
    )
