"""Measured perplexities, kept beside the checkpoint that was measured.

``gemq_evaluations.json``, written by ``gemq eval --record``; nothing that is loaded depends on it, so it is not part
of the manifest and may grow after a checkpoint was saved::

    {"version": 1, "evaluations": [{"data": "wikitext2", "length": 2048, "perplexity": 4.61, "tokens": 341469,
      "seconds": 812.4, "gemq": "0.1.0"}]}
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemq import durable
from gemq.errors import CheckpointError
from gemq.integrity import EVALUATIONS_FILE, read_json

VERSION = 1
# in nats, but for the share of positions whose likeliest token is the reference's, and the ratio of perplexities
DIVERGENCE = ("mean", "median", "p99", "p999", "same_top", "ratio")
# more tokens than any text has
_MOST = 1 << 62


@dataclass(frozen=True)
class Score:
    """Token perplexity on ``data`` in windows of ``length`` tokens, over ``tokens`` predicted tokens; ``divergence``
    from a reference by the names of :data:`DIVERGENCE`, and the ``reference``."""

    data: str
    length: int
    perplexity: float
    tokens: int
    seconds: float | None = None
    model: str | None = None
    gemq: str | None = None
    divergence: dict[str, float] | None = None
    reference: str | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """Key under which scores are comparable: text, window length in tokens, and number of tokens scored."""
        return self.data, self.length, self.tokens


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def score_of(record: Any) -> Score:
    """A score from JSON. Raises ``ValueError`` saying what is wrong with the record."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, got {type(record).__name__}")
    wanted: dict[str, type | tuple[type, ...]] = {"data": str, "length": int, "perplexity": (int, float), "tokens": int}
    for name, kind in wanted.items():
        value = record.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be given, got {value!r:.60}")
    for name in ("length", "tokens"):
        if not 1 <= record[name] < _MOST:
            raise ValueError(f"{name} must be a number of tokens, got {record[name]!r:.60}")
    seconds = record.get("seconds")
    # whole numbers of JSON have no bound
    if not 1 <= record["perplexity"] <= sys.float_info.max:
        raise ValueError(f"perplexity must be a number of at least 1, got {record['perplexity']!r:.60}")
    if seconds is not None and (not _is_number(seconds) or not 0 <= seconds <= sys.float_info.max):
        raise ValueError(f"seconds must be >= 0, got {seconds!r:.60}")
    divergence = record.get("divergence")
    if divergence is not None and not (
        isinstance(divergence, dict) and set(divergence) == set(DIVERGENCE)
        and all(_is_number(v) and 0 <= v <= sys.float_info.max for v in divergence.values())
    ):
        raise ValueError(f"divergence must give {', '.join(DIVERGENCE)} as numbers >= 0, got {divergence!r:.80}")
    named = ((n, record.get(n)) for n in ("model", "gemq", "reference"))
    texts: dict[str, Any] = {n: v if isinstance(v, str) else None for n, v in named}
    return Score(record["data"], record["length"], float(record["perplexity"]), record["tokens"], seconds, **texts,
                 divergence=divergence)


def read_evaluations(folder: str | os.PathLike) -> list[Score]:
    """Read the scores that were recorded for a checkpoint; none if there is no such file. Raises
    :class:`CheckpointError`."""
    file = Path(folder) / EVALUATIONS_FILE
    if not file.is_file():
        return []
    content = read_json(file)
    records = content.get("evaluations")
    if content.get("version") != VERSION or not isinstance(records, list):
        raise CheckpointError(f"{file} is not a list of evaluations of version {VERSION}")
    try:
        return [score_of(record) for record in records]
    except ValueError as error:
        raise CheckpointError(f"{file} is malformed: {error}") from None


def record(folder: str | os.PathLike, score: Score) -> Path:
    """Add a score to a checkpoint's file; it replaces an earlier one of the same text, window and number of tokens."""
    file = Path(folder) / EVALUATIONS_FILE
    kept = [s for s in read_evaluations(folder) if s.key != score.key]
    rows = [{k: v for k, v in asdict(s).items() if v is not None and k != "model"} for s in [*kept, score]]
    durable.replace(file, (json.dumps({"version": VERSION, "evaluations": rows}, indent=1) + "\n").encode())
    return file
