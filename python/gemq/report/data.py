"""Load the data of a report: the JSON files that lie beside checkpoints, checked and converted to plain types.

``gemq_report.json``, ``gemq_run.json``, ``gemq_costs.json``, ``gemq_evaluations.json`` and ``config.json`` of quantized
checkpoints, and the ``table.json`` of ``gemq demo``. No weights are read but the routers, and only if the original
model is given.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemq.algorithms.costs import Costs
from gemq.checkpoint_summary import Summary, summarize
from gemq.errors import CheckpointError
from gemq.evaluations import Score, read_evaluations, score_of
from gemq.folders import checkpoint_folder, local_folder
from gemq.format import mean_width
from gemq.integrity import RUN_FILE, read_json
from gemq.pipeline import COSTS_FILE, REPORT_FILE

TABLE_FILE = "table.json"


@dataclass(frozen=True)
class RouterShift:
    """Change of one layer's router: relative change of its ``weights`` (Frobenius norm), and the share of ``selected``
    experts that the original model would not have selected (None where it was not measured)."""

    weights: float
    selected: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One quantized checkpoint: its headers' sums, and whatever was recorded beside it.

    ``error`` and ``tokens`` map decoder layers to the mean output error of GPTQ and the fewest calibration tokens
    that one of its experts saw; ``seconds`` stages to their time.
    """

    name: str
    folder: Path
    summary: Summary
    base: str | None = None
    calibration: str | None = None
    parameters: int | None = None
    objective: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    error: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    shift: dict[int, RouterShift] = field(default_factory=dict)
    costs: Costs | None = None
    scores: tuple[Score, ...] = ()

    @property
    def bits(self) -> dict[str, dict[int, list[int]]]:
        """Widths of the routed experts by decoder layer, under ``"experts"``, or under ``"gate and up"`` and ``"down"``
        where these have widths of their own."""
        config = self.summary.config
        experts, down = (dict(sorted(rows.items())) for rows in (config.widths.experts, config.widths.down))
        return {"gate and up": experts, "down": down} if down else {"experts": experts}

    @property
    def mean_bits(self) -> dict[int, float]:
        """Mean width of the routed experts' weights by decoder layer."""
        config = self.summary.config
        return {layer: mean_width(*config.widths.of_experts(layer)) for layer in sorted(config.widths.experts)}


@dataclass(frozen=True)
class Compared:
    """A row of a demo's table: a method at a budget (None: unquantized), perplexity, bytes, seconds."""

    method: str
    bits: float | None
    perplexity: float
    bytes: int
    seconds: float


@dataclass(frozen=True)
class ReportData:
    """Data of a report: all checkpoints, by falling size; scores of other models; the demo's table."""

    checkpoints: tuple[Checkpoint, ...]
    others: tuple[Score, ...] = ()
    table: tuple[Compared, ...] = ()


def load(
    folders: Iterable[str | os.PathLike], *, scores: Iterable[str | os.PathLike] = (),
    source: str | os.PathLike | None = None,
) -> ReportData:
    """Read checkpoints, which are folders or hub names, and folders whose subfolders are checkpoints (as several
    budgets and the demo leave them).

    ``scores`` are files of ``gemq eval --format json`` or ``jsonl``; ``source`` is the folder of the original model,
    whose routers are compared. Raises :class:`CheckpointError` naming the folder or file that cannot be used.
    """
    found, table = [], []
    for given in folders:
        folder = Path(given) if Path(given).is_dir() else checkpoint_folder(given)
        found += _checkpoints(folder, None if Path(given).is_dir() else os.fspath(given))
        if (folder / TABLE_FILE).is_file():
            table += _table(folder / TABLE_FILE)
    if len({c.folder.resolve() for c in found}) != len(found):
        raise CheckpointError("a checkpoint was named twice")
    extra = [score for file in scores for score in _scores(Path(file))]
    found, others = _share_out(found, extra)
    if source is not None:
        from gemq.report.routers import weight_shift

        original = local_folder(source)
        found = [_with_shift(c, weight_shift(c.folder, original)) for c in found]
    # the best of the smallest comes last
    found.sort(key=lambda c: (-c.summary.tensor_bytes, -c.scores[0].perplexity if c.scores else 0.0, c.name))
    return ReportData(tuple(_distinct_names(found)), tuple(others), tuple(table))


def _checkpoints(folder: Path, name: str | None) -> list[Checkpoint]:
    """The checkpoints in a folder, which is the snapshot of the repository ``name`` if that is given."""
    if (folder / "config.json").is_file():
        found = _checkpoint(folder)
        return [found if name is None else replace(found, name=name)]
    inside = sorted(p.parent for p in folder.glob("*/config.json"))
    if not inside:
        raise CheckpointError(f"{folder} is no checkpoint and holds none: neither it nor a subfolder has a config.json")
    return [_checkpoint(path) for path in inside]


def _checkpoint(folder: Path) -> Checkpoint:
    summary = summarize(folder)
    report = read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {}
    run = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    costs = None
    if (folder / COSTS_FILE).is_file():
        try:
            costs = Costs.load(folder / COSTS_FILE)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    try:
        recorded = _recorded(report | {name: run[name] for name in ("seconds",) if name in run})
    except ValueError as error:
        raise CheckpointError(f"{REPORT_FILE} or {RUN_FILE} in {folder} is malformed: {error}") from None
    if costs is not None and set(costs.layers) != set(summary.config.widths.experts):
        raise CheckpointError(f"{folder / COSTS_FILE} is of other layers than config.json")
    return Checkpoint(folder.resolve().name, folder, summary, costs=costs, scores=tuple(read_evaluations(folder)),
                      **recorded)


def _recorded(report: dict[str, Any]) -> dict[str, Any]:
    """Read the fields of ``gemq_report.json`` that the report shows; older files hold fewer."""
    options = _field(report, "options", lambda value: _model_names(value or {})) or {}
    error, tokens = _field(report, "matrices", lambda value: _by_layer(value or {}))
    return {
        "base": options.get("model"),
        "calibration": options.get("calibration"),
        "parameters": _field(report, "parameters", lambda value: None if value is None else int(_number(value))),
        "objective": _field(report, "objective", lambda value: None if value is None else _number(value)),
        "seconds": _field(report, "seconds", lambda value: {n: _number(v) for n, v in (value or {}).items()}),
        "error": error,
        "tokens": tokens,
        "shift": _field(report, "router_shift", lambda value: _shift((value or {}).get("layers") or {})),
    }


def _field(report: dict[str, Any], name: str, read: Callable[[Any], Any]) -> Any:
    """Apply ``read`` to a field, which may be absent. Raises ``ValueError`` naming the field if it is malformed."""
    try:
        return read(report.get(name))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        said = f"nothing named {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: {said:.200}") from None


def _model_names(options: dict[str, Any]) -> dict[str, str | None]:
    return {name: _model_name(options.get(name)) for name in ("model", "calibration")}


def _shift(layers: dict[str, Any]) -> dict[int, RouterShift]:
    return {
        int(layer): RouterShift(
            _number(found["weights"]), None if found.get("selected") is None else _number(found["selected"])
        )
        for layer, found in layers.items()
    }


def _number(value: Any) -> float:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    # whole numbers of JSON have no bound
    if not plain or abs(value) > sys.float_info.max or value != value:
        raise ValueError(f"expected a finite number, got {value!r:.60}")
    return float(value)


def _model_name(value: Any) -> str | None:
    """Return a hub name unchanged, and a path without its folders: a report does not show where a model was stored."""
    if not isinstance(value, str) or not value:
        return None
    return value if value.count("/") == 1 and not value.startswith((".", "/")) else value.rstrip("/").rsplit("/", 1)[-1]


def _by_layer(matrices: dict[str, Any]) -> tuple[dict[int, float], dict[int, int]]:
    """Mean output error and fewest tokens of the routed experts' matrices, by decoder layer."""
    errors: dict[int, list[float]] = {}
    tokens: dict[int, list[int]] = {}
    for path, report in matrices.items():
        if ".experts." not in path:
            continue
        layer = int(path.split(".layers.", 1)[1].split(".", 1)[0])
        errors.setdefault(layer, []).append(_number(report["error"]))
        tokens.setdefault(layer, []).append(int(_number(report["tokens"])))
    return {n: sum(v) / len(v) for n, v in sorted(errors.items())}, {n: min(v) for n, v in sorted(tokens.items())}


def _table(file: Path) -> list[Compared]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [
            Compared(str(r["method"]), None if r["bits"] is None else _number(r["bits"]), _number(r["perplexity"]),
                     int(_number(r["bytes"])), _number(r["seconds"]))
            for r in rows
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a table of gemq demo ({type(error).__name__}: {error})") from None


def _scores(file: Path) -> list[Score]:
    try:
        text = file.read_text(encoding="utf-8")
        records = json.loads(text) if text.lstrip().startswith("[") else [
            json.loads(line) for line in text.splitlines() if line.strip()
        ]
        # a file by its name alone, as `gemq eval --record` keeps it
        return [replace(s, data=Path(s.data).name if "/" in s.data else s.data) for s in map(score_of, records)]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file} does not hold records of gemq eval --format json ({error})") from None


def _share_out(found: list[Checkpoint], extra: list[Score]) -> tuple[list[Checkpoint], list[Score]]:
    """Assign scores to the checkpoint whose model they measure; the others are kept apart."""
    others = []
    for score in extra:
        path = Path(score.model or "").resolve()
        at = next((i for i, c in enumerate(found) if c.folder.resolve() == path), None)
        if at is None:
            others.append(replace(score, model=_model_name(score.model) or "unnamed"))
        else:
            kept = [s for s in found[at].scores if s.key != score.key]
            found[at] = replace(found[at], scores=(*kept, score))
    return found, others


def _with_shift(checkpoint: Checkpoint, weights: dict[int, float]) -> Checkpoint:
    recorded = {n: s.selected for n, s in checkpoint.shift.items()}
    return replace(
        checkpoint, shift={n: RouterShift(value, recorded.get(n)) for n, value in weights.items()}
    )


def _distinct_names(found: list[Checkpoint]) -> list[Checkpoint]:
    """Distinguish checkpoints of the same name by their folder's parent."""
    names = [c.name for c in found]
    return [
        c if names.count(c.name) == 1
        else replace(c, name=f"{c.folder.resolve().parent.name}/{c.name}")
        for c in found
    ]
