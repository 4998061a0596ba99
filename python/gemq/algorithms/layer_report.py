"""Summary of the quantization of one decoder layer, in a line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gemq.algorithms.gptq import GptqReport


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer of one ``budget`` (None outside a progression).

    ``bits`` is the mean width of its routed experts and ``tokens`` the fewest calibration tokens that one of them saw
    (None in a dense layer), ``error`` the mean relative output error of its matrices, ``rounded`` how many of them
    were rounded to nearest, for want of tokens or of a positive definite Hessian.
    """

    layer: int
    bits: float | None
    error: float
    tokens: int | None
    rounded: int
    seconds: float
    budget: float | None = None


def layer_report(
    index: int, bits: float | None, reports: Iterable[tuple[str, GptqReport]], seconds: float
) -> LayerReport:
    """Sum up the reports, by module path, of the matrices of decoder layer ``index``, whose experts have ``bits``."""
    found = list(reports)
    routed = [report.tokens for path, report in found if ".experts." in path]
    error = sum(report.error for _, report in found) / len(found) if found else 0.0
    return LayerReport(
        index, bits, error, min(routed, default=None),
        sum(report.fallback != "" for _, report in found), seconds,
    )


def starved_experts(reports: dict[str, GptqReport], columns: int) -> dict[str, int]:
    """Experts that saw fewer tokens than their inputs have ``columns``, with their tokens, fewest first.

    The Hessian of such an expert is singular: damping decides where its error goes.
    """
    found: dict[str, int] = {}
    for path, report in reports.items():
        expert, _, name = path.rpartition(".")
        if ".experts." in path and name == "gate_up_proj" and report.tokens < columns:
            found[expert] = report.tokens
    return dict(sorted(found.items(), key=lambda item: item[1]))
