"""``gemq quantize --resume``: the options of a run directory, with which those on the line must agree."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer
from pydantic import TypeAdapter, ValidationError

from gemq.choices import Keep
from gemq.engine.journal import MANIFEST, read_manifest
from gemq.errors import CheckpointError
from gemq.pipeline import QuantizeConfig, run_directory

# what may lie elsewhere by now: known by content, or the choice of this command line
_MOVABLE = ("model", "output", "calibration", "router_text", "costs")

# former names of options
_RENAMED = {"stream": "keep", "scratch": "keep", "redo": "changed", "restart": "changed"}

# which fields of the config an option decides
_FIELDS = {
    "model": ("model",), "output": ("output",), "bits": ("method.budgets",),
    "allocation": ("method.given",), "method": ("method.method",),
    "candidates": ("method.candidates",), "constraints": ("method.per_layer",), "calibration": ("calibration",),
    "samples": ("samples",), "length": ("length",), "seed": ("seed",), "attention_bits": ("method.attention_bits",),
    "dense_bits": ("method.dense_bits",), "shared_bits": ("method.shared_bits",), "accounting": ("method.accounting",),
    "granularity": ("method.granularity",),
    "head_bits": ("method.head_bits",), "embedding_bits": ("method.embedding_bits",),
    "router_bits": ("method.router_bits",), "group_size": ("method.gptq.group_size",),
    "recipe": ("method.gptq.clip", "method.gptq.propagate_from", "method.gptq.refine", "method.gptq.compensate",
               "method.gptq.rescale",
               "method.perturbation", "method.per_layer", "method.accounting", "method.granularity", "samples",
               "method.estimate",
               "method.tune"),
    "clip": ("method.gptq.clip",), "refine": ("method.gptq.refine",),
    "compensate": ("method.gptq.compensate",), "rescale": ("method.gptq.rescale",),
    "perturbation": ("method.perturbation",), "damping": ("method.gptq.damping",),
    "tune_routers": ("method.tune",), "router_text": ("router_text",), "router_lr": ("method.router.learning_rate",),
    "router_epochs": ("method.router.epochs",), "estimate": ("method.estimate",),
    "batch_size": ("method.batch_size",), "device": ("device",), "dtype": ("dtype",), "keep": ("keep",),
    "trust_remote_code": ("trust_remote_code",), "tensor_bits": ("method.tensor_bits",), "costs": ("costs",),
}


def _may_differ(name: str, stored: dict[str, Any], wanted: dict[str, Any]) -> bool:
    # activations can be in memory one time and in files the next
    return name in _MOVABLE or (name == "keep" and Keep.model not in (stored["keep"], wanted["keep"]))


def _field(config: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return list(config) if isinstance(config, tuple) else config


def stored_config(folder: Path) -> QuantizeConfig:
    """The options that a run directory was begun with.

    Raises :class:`CheckpointError` if it is none, or naming the field of its manifest that is missing, unknown, of
    another type or out of range.
    """
    found = read_manifest(folder)
    if found is None:
        raise CheckpointError(f"{folder} is not a run directory that can be resumed: it has no readable manifest")
    try:
        # as JSON: lists are what tuples became
        return TypeAdapter(QuantizeConfig).validate_json(json.dumps(found["command"]), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("command", *first["loc"])))
        given = repr(first["input"])
        shown = given if len(given) <= 60 else f"{given[:57]}..."
        raise CheckpointError(
            f"{folder / MANIFEST} is malformed at {field}: {first['msg'].removeprefix('Value error, ')}, got {shown}"
        ) from None


def resumed(folder: Path, given: QuantizeConfig, context: typer.Context) -> QuantizeConfig:
    """The stored options; :class:`CheckpointError` names those on the command line that differ from them.

    Where the run writes and whether it runs a model's code is never taken from the run directory, which may be a
    stranger's: the output must be the one that the directory lies beside, or be given, and trust is given again. A
    model or a text that was moved is given by its new place; the engine compares contents.
    """
    config = stored_config(folder)
    stored, wanted = (asdict(c) for c in (config, given))
    explicit = {_RENAMED.get(name, name) for name in context.params
                if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"}
    if "changed" in explicit:
        raise CheckpointError("--resume takes the options of the run, so --changed has nothing to do")
    if config.trust_remote_code and not given.trust_remote_code:
        raise CheckpointError(
            f"the run in {folder} was begun with --trust-remote-code: give it again to run the model's code"
        )
    conflicts = [
        f"--{name.replace('_', '-')} ({_field(stored, path)} there, {_field(wanted, path)} here)"
        for name, paths in _FIELDS.items() if name in explicit for path in paths
        if not _may_differ(name, stored, wanted) and _field(stored, path) != _field(wanted, path)
    ]
    if conflicts:
        raise CheckpointError(f"{folder} was begun with other options: {', '.join(conflicts)}")
    free = {n: getattr(given, n) for n in (*_MOVABLE, "overwrite", "keep", "keep_run") if n in explicit}
    config = replace(config, run_dir=str(folder), changed="refuse", log=given.log, **free)
    if "output" not in explicit and run_directory(replace(config, run_dir=None)).resolve() != folder.resolve():
        raise CheckpointError(
            f"the run in {folder} writes to {config.output!r}, which it does not lie beside; say where with --output"
        )
    return config
