"""The log of a run: a file of JSON lines that every stage and every quantized layer adds to.

A line has ``time`` (seconds since 1970), ``stage`` and mostly ``event``: ``start`` and ``end`` of a stage, or
``layer`` with the fields of :class:`gemq.algorithms.layer_report.LayerReport`. Lines of stages are those of
:meth:`gemq.engine.journal.RunDirectory.log`.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from gemq.algorithms.layer_report import LayerReport
from gemq.engine.journal import append
from gemq.engine.walk import OnLayer


def logging_layers(log: str | os.PathLike | None, on_layer: OnLayer | None = None) -> OnLayer | None:
    """``on_layer``, after which rank 0 adds a line about the layer to ``log``; ``on_layer`` itself without a log."""
    if log is None:
        return on_layer
    file = Path(log)

    def seen(layer: LayerReport) -> None:
        if on_layer is not None:
            on_layer(layer)
        append([file], {"stage": "quantize", "event": "layer", **asdict(layer)})

    return seen
