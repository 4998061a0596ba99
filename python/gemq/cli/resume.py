"""``gemq quantize --resume``: the options of a run directory, with which those on the line must agree."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from gemq.algorithms.given_allocation import GivenAllocation
from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.progressive import MethodConfig
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.algorithms.tensor_bits import TensorBits
from gemq.engine.journal import read_manifest
from gemq.errors import CheckpointError
from gemq.pipeline import QuantizeConfig

# which fields of the config an option decides
_FIELDS = {
    "model": ("model",), "output": ("output",), "bits": ("method.budgets",),
    "allocation": ("method.given",), "method": ("method.method",),
    "candidates": ("method.candidates",), "constraints": ("method.per_layer",), "calibration": ("calibration",),
    "samples": ("samples",), "length": ("length",), "seed": ("seed",), "attention_bits": ("method.attention_bits",),
    "dense_bits": ("method.dense_bits",), "shared_bits": ("method.shared_bits",), "accounting": ("method.accounting",),
    "granularity": ("method.granularity",),
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
    "batch_size": ("method.batch_size",), "device": ("device",), "dtype": ("dtype",), "stream": ("stream",),
    "trust_remote_code": ("trust_remote_code",), "tensor_bits": ("method.tensor_bits",), "costs": ("costs",),
}


def _field(config: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return list(config) if isinstance(config, tuple) else config


def stored_config(folder: Path) -> QuantizeConfig:
    """The options that a run directory was begun with. Raises :class:`CheckpointError` if it is none."""
    found = read_manifest(folder)
    if found is None:
        raise CheckpointError(f"{folder} is not a run directory that can be resumed: it has no readable manifest")
    command = dict(found["command"])
    method = dict(command.pop("method"))
    given = method.pop("given", None)
    gptq, router = GptqConfig(**method.pop("gptq")), RouterTuningConfig(**method.pop("router"))
    for name in ("budgets", "candidates"):
        method[name] = tuple(method[name])
    method["tensor_bits"] = tuple(TensorBits(**item) for item in method.get("tensor_bits", ()))
    return QuantizeConfig(**command, method=MethodConfig(
        **method, gptq=gptq, router=router, given=None if given is None else GivenAllocation.from_json(given)
    ))


def resumed(folder: Path, given: QuantizeConfig, context: typer.Context) -> QuantizeConfig:
    """The stored options; :class:`CheckpointError` names those on the command line that differ from them."""
    config = stored_config(folder)
    stored, wanted = asdict(config), asdict(given)
    explicit = [n for n in context.params if context.get_parameter_source(n).name == "COMMANDLINE"]
    if "redo" in explicit or "restart" in explicit:
        raise CheckpointError("--resume takes the options of the run, so --redo and --restart have nothing to do")
    conflicts = [
        f"--{name.replace('_', '-')} ({_field(stored, path)} there, {_field(wanted, path)} here)"
        for name in explicit for path in _FIELDS.get(name, ())
        if _field(stored, path) != _field(wanted, path)
    ]
    if conflicts:
        raise CheckpointError(f"{folder} was begun with other options: {', '.join(conflicts)}")
    free = {n: getattr(given, n) for n in ("overwrite", "scratch", "keep_run", "log") if n in explicit}
    return replace(config, run_dir=str(folder), changed="refuse", **free)
