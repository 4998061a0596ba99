"""Render a study's Markdown tables and figures, and mark the cells that reproduce the paper's order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cells
import eq6
import figures
import numpy as np
import tables
from cells import Run

from gemq.format import mean_width

READABLE = 60  # claims are made for models below this perplexity only
REPLAYED = "full-precision routing replayed"


@dataclass(frozen=True)
class Study:
    """Results by ``(model, seed, run)``."""

    models: list[str]
    seeds: list[int]
    results: dict[tuple[str, int, Run], dict]

    def stages(self, model: str, run: Run) -> list[dict]:
        """The stages of a run, one dict a seed and budget, each with its ``seed``."""
        found = []
        for seed in self.seeds:
            result = self.results.get((model, seed, run))
            found += [stage | {"seed": seed} for stage in (result or {"stages": []})["stages"]]
        return found

    def perplexities(self, model: str, run: Run, budget: float, text: str, field: str = "perplexity") -> list[float]:
        """One value a seed."""
        return [s[field][text] for s in self.stages(model, run) if s["budget"] == budget and field in s]

    def full(self, model: str, text: str, tuned: bool) -> list[float]:
        """Full precision, or that with routers tuned by each seed."""
        return self.perplexities(model, tables.FP_TUNED if tuned else tables.FP, 16.0, text)

    def texts(self, model: str) -> list[str]:
        """Names of the evaluation texts, of the first cell that has any."""
        for (name, _, _), result in self.results.items():
            if name == model and "perplexity" in result["stages"][0]:
                return list(result["stages"][0]["perplexity"])
        return []


def spread(values: list[float], digits: int = 2) -> str:
    """``mean ± half the range``, or ``—``."""
    if not values:
        return "—"
    text = f"{sum(values) / len(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def _rows_of(table: tables.Table) -> list[tuple[str, Run, str]]:
    """Label, run and field of every line; a replayed run has a second line."""
    found = []
    for label, run in table.rows:
        found.append((label, run, "perplexity"))
        if run.replay:
            found.append((REPLAYED, run, "replayed"))
    return found


def _gap(study: Study, model: str, run: Run, values: dict[str, list[float]]) -> str:
    """Rise of log perplexity over full precision with routers tuned alike, in percent, mean over texts."""
    rises = []
    for text, found in values.items():
        base = study.perplexities(model, tables.control(run), 16.0, text)
        if found and base:
            rises.append(math.log(np.mean(found) / np.mean(base)))
    return f"{100 * float(np.mean(rises)):+.1f}%" if rises else "—"


def _perplexity(study: Study, model: str, table: tables.Table) -> list[str]:
    texts = study.texts(model)
    lines = [f"| bits | {table.varied} | {' | '.join(texts)} | over FP tuned alike |",
             "|---|---|" + "---|" * (len(texts) + 1)]
    entries: list[tuple[float, int, str]] = []
    for at, (label, run, field) in enumerate(_rows_of(table)):
        for budget in (16.0,) if run.kind == "fp" else run.budgets:
            values = {text: study.perplexities(model, run, budget, text, field) for text in texts}
            if any(values.values()):
                gap = "" if run.kind == "fp" else _gap(study, model, run, values)
                cell = " | ".join(spread(v) for v in values.values())
                entries.append((-budget, at, f"| {budget:g} | {label} | {cell} | {gap} |"))
    return lines + [line for *_, line in sorted(entries)]


def _orders(study: Study, model: str, table: tables.Table) -> list[str]:
    """A line an order of the paper: in which cells it holds beyond the spread of seeds, and in which it does not."""
    lines, rows = [], {label: (run, field) for label, run, field in _rows_of(table)}
    for better, worse in table.orders:
        verdicts: dict[str, list[str]] = {"holds": [], "within the spread": [], "does not hold": []}
        (one, one_field), (two, two_field), few = rows[better], rows[worse], False
        for budget in one.budgets:
            for text in study.texts(model):
                a = study.perplexities(model, one, budget, text, one_field)
                b = study.perplexities(model, two, budget, text, two_field)
                if not (a and b):
                    continue
                few |= min(len(a), len(b)) < 3
                if max(a) < min(b):
                    verdict = "holds"
                elif min(a) > max(b):
                    verdict = "does not hold"
                else:
                    verdict = "within the spread"
                verdicts[verdict].append(f"{text} {budget:g}")
        said = [f"{verdict} at {', '.join(where)}" for verdict, where in verdicts.items() if where]
        if said:
            lines.append(f"* {better} below {worse}: {'; '.join(said)}{' (fewer than three seeds)' if few else ''}.")
    return ["", "The paper's order:", *lines] if lines else []


def changed_share(one: dict, two: dict) -> float:
    """Share of experts that have another width, of one of their matrices at least, in the other stage."""
    gate_up, down = (
        np.array(one.get(part, one["bits"])) != np.array(two.get(part, two["bits"])) for part in ("bits", "down_bits")
    )
    return float((gate_up | down).mean())


def _estimates(study: Study, model: str, table: tables.Table) -> list[str]:
    lines = _perplexity(study, model, table) + _orders(study, model, table)
    base = {(s["seed"], s["budget"]): s for s in study.stages(model, table.rows[0][1])}
    changes = []
    for label, run in table.rows[1:]:
        for budget in run.budgets[1:]:
            values = [
                100 * changed_share(s, base[s["seed"], budget]) for s in study.stages(model, run)
                if s["budget"] == budget and (s["seed"], budget) in base
            ]
            if values:
                changes.append(f"| {label} | {budget:g} | {spread(values, 1)} |")
    head = ["", "Experts whose width differs from that by estimates on the full-precision model, in %:", "",
            "| estimated on | bits | changed |", "|---|---|---|"]
    return lines + (head + changes if changes else [])


def _subsets(study: Study, model: str, table: tables.Table) -> list[str]:
    ((_, run),) = table.rows
    texts = study.texts(model)
    lines = ["| bits | seed | " + " | ".join(texts) + " |", "|---|---|" + "---|" * len(texts)]
    for budget in run.budgets:
        for stage in study.stages(model, run):
            if stage["budget"] == budget:
                scores = " | ".join(f"{stage['perplexity'][t]:.2f}" for t in texts)
                lines.append(f"| {budget:g} | {stage['seed']} | {scores} |")
    return lines


def _maps(study: Study, model: str, table: tables.Table) -> list[str]:
    lines = []
    for stage in study.stages(model, table.rows[0][1]):
        if stage["seed"] == study.seeds[0]:
            down = stage.get("down_bits")
            what = "gate and up, then down, and" if down else "and then"
            head = f"{stage['budget']:g} bits; a line a layer, a digit an expert, {what} the layer's mean:"
            lines += ["", head, "```"]
            for at, row in enumerate(stage["bits"]):
                parts = [row, *([down[at]] if down else [])]
                digits = "  ".join("".join(map(str, part)) for part in parts)
                lines.append(f"{digits}  {mean_width(row, parts[-1]):.2f}")
            lines.append("```")
    return lines


def _importance(study: Study, model: str, table: tables.Table) -> list[str]:
    """Pearson correlation of log importance at the lowest width, between seeds and between texts."""
    found = {
        (label, stage["seed"]): np.array(stage["routed"])
        for label, run in table.rows for stage in study.stages(model, run)
    }
    if not found:
        return []
    logs = {key: np.log(np.maximum(v[..., 0], 1e-300)).ravel() for key, v in found.items()}
    pairs: dict[str, list[float]] = {}
    for one in logs:
        for two in logs:
            if one < two:
                kind = "same text, other windows" if one[0] == two[0] else f"{one[0]} and {two[0]}"
                pairs.setdefault(kind, []).append(float(np.corrcoef(logs[one], logs[two])[0, 1]))
    lines = ["| importance measured on | Pearson correlation of its logarithm |", "|---|---|"]
    lines += [f"| {kind} | {spread(values, 3)} |" for kind, values in pairs.items()]
    first = next(iter(found.values()))[..., 0].sum(1)
    lines += ["", f"A layer's summed importance spreads by {first.max() / first.min():.1f} times between layers "
              f"({', '.join(f'{100 * v / first.sum():.0f}%' for v in first)} of the total, first layer to last)."]
    return lines


def _routes(study: Study, model: str, table: tables.Table) -> list[str]:
    lines = ["| bits | method | tokens with other experts than in full precision, all layers | first layer | last |",
             "|---|---|---|---|---|"]
    entries = []
    for at, (label, run) in enumerate(table.rows):
        for budget in (16.0,) if run.kind == "fp" else run.budgets:
            rows = [100 * np.array(s["changed_routes"]) for s in study.stages(model, run) if s["budget"] == budget]
            if rows:
                parts = [[float(f(r)) for r in rows] for f in (np.mean, lambda r: r[0], lambda r: r[-1])]
                entries.append((-budget, at, f"| {budget:g} | {label} | "
                                             f"{' | '.join(spread(p, 1) + '%' for p in parts)} |"))
    return lines + [line for *_, line in sorted(entries)]


def _eq6(study: Study, model: str, table: tables.Table) -> list[str]:
    lines = ["| perturbed by | bits | Spearman, all | within layers | true / predicted: quartiles | sums |",
             "|---|---|---|---|---|---|"]
    for label, run in table.rows:
        for stage in study.stages(model, run):
            predicted, true = np.array(stage["predicted"]), np.array(stage["true"])
            found = eq6.summary(predicted, true, stage["candidates"], stage["length"])
            lines += [f"| {label} | {r['bits']} | {r['spearman']:.3f} | {r['within_layers']:.3f} | "
                      f"{' / '.join(f'{v:.2f}' for v in r['ratio'])} | {r['total']:.2f} |" for r in found]
            # values that an allocation compares: every expert at every width, and at those above 1 bit
            for name, first in (("all", 0), ("2 and up", sum(b < 2 for b in stage["candidates"]))):
                rank = eq6.spearman(predicted[..., first:], true[..., first:])
                lines.append(f"| {label} | {name}, together | {rank:.3f} | | | |")
            lines += _first_order(label, stage)
    return lines if len(lines) > 2 else []


def _first_order(label: str, stage: dict) -> list[str]:
    """The rows of Eq. 6 with the first-order term added."""
    predicted, first, true = (np.array(stage[name]) for name in ("predicted", "first_order", "true"))
    lines = []
    for b, bits in enumerate(stage["candidates"]):
        both, multiple = eq6.with_first_order(predicted[..., b], first[..., b], true[..., b], stage["length"])
        within = np.mean([eq6.spearman(p, t) for p, t in zip(both, true[..., b], strict=True)])
        lines.append(f"| {label}, first order + {multiple:.2f} Eq. 6 | {bits} | {eq6.spearman(both, true[..., b]):.3f} "
                     f"| {within:.3f} | | |")
    return lines


VIEWS = {"estimates": _estimates, "subsets": _subsets, "maps": _maps, "importance": _importance, "routes": _routes,
         "eq6": _eq6}


def _standing(study: Study, model: str) -> str:
    """Sentence on the claims that this model's results support."""
    texts = study.texts(model)
    values = {t: study.full(model, t, False) for t in texts}
    known = {t: v[0] for t, v in values.items() if v}
    if not known:
        return "Full precision was not measured: only orders are reported."
    said = ", ".join(f"{t} {v:.2f}" for t, v in known.items())
    enough = len(study.seeds) >= 3 and min(known.values()) < READABLE
    why = "claims are made from it" if enough else (
        f"only orders are reported: claims need three seeds and a perplexity below {READABLE}")
    return f"Full precision: {said}; {why}."


def document(study: Study, chosen: dict[str, tables.Table], folder: Path) -> str:
    """The study's Markdown; figures are written into ``folder``."""
    parts = ["# Accuracy study", "", "Perplexity, mean ± half the range over calibration seeds; the last column is the "
             "rise of log perplexity over full precision with its routers tuned alike where the row's are."]
    for model in study.models:
        name = cells.label(model)
        result = next((r for (m, *_), r in study.results.items() if m == model), None)
        if result is None:
            continue
        size = f"{result['parameters'] / 1e6:.1f} M parameters, {result['layers']} MoE layers"
        parts += ["", f"## {name}", "", f"{size} of {result['experts']} experts. {_standing(study, model)}"]
        for table in chosen.values():
            view = VIEWS.get(table.view)
            lines = view(study, model, table) if view else _perplexity(study, model, table)
            if not view:
                lines += _orders(study, model, table)
            if any(set(line) - set("|- ") for line in lines[2:]):
                parts += ["", f"### {_title(table)}", "", *lines]
        for title, file in figures.draw(study, model, chosen, folder).items():
            parts += ["", f"![{title}]({file})"]
    return "\n".join(parts) + "\n"


def _title(table: tables.Table) -> str:
    return f"Table {table.key}. {table.title}" if table.key.isdigit() else table.title
