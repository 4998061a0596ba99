"""The whole of gemq in one call each, with the options of the command line by the same names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gemq import dry_run, pipeline
from gemq.algorithms.allocation import Allocation, pareto
from gemq.dry_run import Preview
from gemq.engine.progression import StageProgress
from gemq.engine.walk import OnLayer
from gemq.outcome import QuantizeOutcome
from gemq.pipeline import QuantizeConfig
from gemq.recipes import budgets_of, quantize_config, shared_of
from gemq.run_log import logging_layers


def _config(
    model: str | os.PathLike | QuantizeConfig, output: str | os.PathLike | None, options: dict[str, Any]
) -> QuantizeConfig:
    if not isinstance(model, QuantizeConfig):
        if output is None:
            raise TypeError("output must be given: the folder to write")
        return quantize_config(model, output, **options)
    if output is not None or options:
        raise TypeError("a QuantizeConfig says everything: give no output or options beside it")
    return model


def _one_or_all(bits: Any, found: list) -> Any:
    several = not isinstance(bits, (int, float, type(None))) and len(budgets_of(bits)) > 1
    return found if several else found[0]


def quantize(
    model: str | os.PathLike | QuantizeConfig, output: str | os.PathLike | None = None, *,
    progress: StageProgress | None = None, on_layer: OnLayer | None = None, **options: Any,
) -> QuantizeOutcome | list[QuantizeOutcome]:
    """Quantize a model and save a packed checkpoint: ``gemq.quantize("my/model", "out", bits=2.5)``.

    Args:
        model: folder or hub name of the full-precision model, or a :class:`QuantizeConfig`, which says everything.
        output: folder to write; with several budgets each is in a folder of it.
        progress: called as ``progress(stage, done, total)``.
        on_layer: gets the :class:`gemq.algorithms.layer_report.LayerReport` of every quantized decoder layer.
        options: those of ``gemq quantize``: ``bits``, ``recipe``, ``calibration``, ``samples``, ...
            (:func:`gemq.recipes.quantize_config` has all).

    Returns the outcome of one budget, a list for several or for a :class:`QuantizeConfig`. A call that was ended is
    continued by the same call. Raises :class:`gemq.GemqError`, ``ValueError`` or ``TypeError`` with one line that says
    what to change.
    """
    config = _config(model, output, options)
    found = pipeline.quantize(config, progress, logging_layers(config.log, on_layer))
    return found if isinstance(model, QuantizeConfig) else _one_or_all(options.get("bits"), found)


def preview(
    model: str | os.PathLike | QuantizeConfig, output: str | os.PathLike | None = None, **options: Any
) -> Preview | list[Preview]:
    """Tell what :func:`quantize` would make of every tensor; no weights or text are read, nothing is written.

    Arguments and errors are those of :func:`quantize`. Returns the preview of one budget, or a list.
    """
    found = dry_run.preview(_config(model, output, options))
    return found if isinstance(model, QuantizeConfig) else _one_or_all(options.get("bits"), found)


def allocate(
    costs: str | os.PathLike, bits: float | str | Sequence[float] = 2.5, *, constraints: str = "none",
    shared_bits: str | int | None = "auto", accounting: str = "exact", granularity: str = "auto",
    solver: str = "auto",
) -> Allocation | list[Allocation]:
    """Solve the program again for any budget, from the costs that quantizing saved (a checkpoint, or its file).

    Returns the allocation of one budget, or a list for several. Raises :class:`gemq.CheckpointError` or ``ValueError``.
    """
    found = pareto(
        pipeline.load_costs(costs), list(budgets_of(bits)), per_layer=constraints, solver=solver,
        fixed_shared_bits=shared_of(shared_bits), accounting=accounting, granularity=granularity,
    )
    return _one_or_all(bits, found)
