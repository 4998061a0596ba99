"""``--layer-log``: a file with a line per quantized layer, which a run that continues goes on with."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, fields
from pathlib import Path

from gemq import durable
from gemq.algorithms.layer_report import LayerReport
from gemq.engine.journal import LAYER_LOG, read_manifest
from gemq.errors import CheckpointError
from gemq.output_folder import check_log
from gemq.pipeline import QuantizeConfig, run_directory, target_of, uses_directory
from gemq.plain_json import dumps

SUFFIXES = (".csv", ".jsonl")
_NAMES = [field.name for field in fields(LayerReport)]
_HEADER = ",".join(_NAMES)


class LayerLog:
    """The file, judged when this is made, and begun or continued by the first line."""

    def __init__(self, path: Path, config: QuantizeConfig):
        """Raises :class:`CheckpointError` for a file that cannot be written or that another run or program wrote."""
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"--layer-log must end with .csv or .jsonl, got {str(path)!r}")
        if config.log is not None and Path(config.log).resolve() == path.resolve():
            raise CheckpointError(f"--log and --layer-log are both {path}; give each a file of its own")
        self.path = path
        self._note = run_directory(config) / LAYER_LOG if uses_directory(config) else None
        targets = [target_of(config, budget) for budget in config.method.budgets]
        apart = [*targets, run_directory(config)] if uses_directory(config) else targets
        check_log("--layer-log", path, apart, self._is_own, "a layer log")
        self._continues = config.changed != "restart" and self._known(config)
        if path.exists() and path.stat().st_size and not self._known(config):
            raise CheckpointError(f"--layer-log {path} exists and is not of this run; choose another or remove it")
        self._begun = False

    def _is_own(self, line: str) -> bool:
        if self.path.suffix == ".csv":
            return line.rstrip("\r\n") == _HEADER
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and list(found) == _NAMES

    def _known(self, config: QuantizeConfig) -> bool:
        """Tell that the run which is continued wrote this file."""
        if self._note is None or read_manifest(run_directory(config)) is None:
            return False
        found = durable.unseal_json(self._note)
        return found == str(self.path.resolve())

    def add(self, layer: LayerReport) -> None:
        """Append the line of a layer; it is in the file when this returns."""
        text = "" if self._begun else self._begin()
        if self.path.suffix == ".csv":
            line = io.StringIO()
            csv.DictWriter(line, _NAMES, lineterminator="\n").writerow(asdict(layer))
            text += line.getvalue()
        else:
            text += dumps(asdict(layer)) + "\n"
        with durable.explained(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)

    def _begin(self) -> str:
        """Note whose the file is, and cut what a killed run left half written; the header if it has none yet."""
        self._begun = True
        if self._note is not None:
            durable.seal_json(self._note, str(self.path.resolve()))
        whole = 0
        with durable.explained(self.path), self.path.open("a+b") as file:
            if self._continues:
                file.seek(0)
                whole = file.read().rfind(b"\n") + 1
            os.truncate(file.fileno(), whole)
        return "" if whole or self.path.suffix != ".csv" else _HEADER + "\n"
