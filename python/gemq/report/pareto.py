"""Perplexity against bytes, over checkpoints or over the methods of a demo."""

from __future__ import annotations

from dataclasses import dataclass

from gemq.evaluations import Score
from gemq.report.data import ReportData
from gemq.report.figures import SERIES, Figure, Table, legend, size
from gemq.report.svg import DASHES, Plot, Scale, around, element, number, text

# points that are named in the drawing; more would cover each other
_NAMED = 8


@dataclass(frozen=True)
class Point:
    """One measured model: which curve it is on, its name, bytes and perplexity."""

    series: str
    name: str
    bytes: int
    perplexity: float


def score(perplexity: float) -> str:
    """Format a perplexity with two decimals; further ones are within the variation between seeds."""
    return f"{perplexity:,.2f}" if perplexity < 1e6 else number(perplexity)


def frontier(points: list[Point]) -> set[Point]:
    """Points that no other point beats in both bytes and perplexity."""
    return {
        p for p in points
        if not any(q.bytes <= p.bytes and q.perplexity <= p.perplexity and
                   (q.bytes, q.perplexity) != (p.bytes, p.perplexity) for q in points)
    }


def curves(data: ReportData) -> list[tuple[str, list[Point], list[tuple[str, float]]]]:
    """``(text, points, reference lines)`` for each text that something was measured on."""
    found = []
    if data.table:
        points = [Point(r.method, f"{r.bits:g} bits", r.bytes, r.perplexity) for r in data.table if r.bits is not None]
        lines = [(r.method, r.perplexity) for r in data.table if r.bits is None]
        found.append(("the demo's held-out text", points, lines))
    for key in dict.fromkeys(s.key for c in data.checkpoints for s in c.scores):
        points = [
            Point(c.base or "checkpoints", c.name, c.summary.tensor_bytes, s.perplexity)
            for c in data.checkpoints for s in c.scores if s.key == key
        ]
        lines = [(s.model or "", s.perplexity) for s in data.others if s.key == key]
        found.append((label(key), points, lines))
    return found


def label(key: tuple[str, int, int]) -> str:
    """A text with its conditions."""
    data, length, tokens = key
    return f"{data}, {tokens:,} tokens in windows of {length:,}"


def figure(where: str, points: list[Point], lines: list[tuple[str, float]]) -> Figure | None:
    """Draw the curve; None for fewer than two points."""
    if len(points) < 2:
        return None
    values = [p.perplexity for p in points] + [v for _, v in lines]
    log = max(values) / min(values) > 1.6
    names = list(dict.fromkeys(p.series for p in points))
    rows = 1 + sum(26 + 6.4 * len(n) for n in names) // 330
    unit, factor = next((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1))
                        if max(p.bytes for p in points) >= f or f == 1)
    plot = Plot.over(around([p.bytes / factor for p in points]), around(values, log=log), log=log,
                     height=270 + 14 * rows)
    plot.y = Scale(plot.y.low, plot.y.high, plot.y.start, plot.y.stop + 6 + 14 * rows, log)
    plot.axes(f"size of the checkpoint, {unit}", "perplexity")
    # the first lines are the best known and drawn last, above the others
    for name, value in lines:
        plot.marks.append(_horizontal(plot, value))
        plot.marks.append(text(plot.x.start + 4, plot.y(value) - 4, f"{name}: {score(value)}", class_="tick"))
        if len(lines) > 1 and abs(plot.y(lines[0][1]) - plot.y(lines[-1][1])) < 12:
            break
    for index, name in reversed(list(enumerate(names))):
        own = sorted((p.bytes / factor, p.perplexity) for p in points if p.series == name)
        # models of one size are no curve
        if own[-1][0] > 1.002 * own[0][0]:
            plot.line(own, f"s{index % SERIES}", DASHES[index % len(DASHES)])
        for p in points:
            if p.series == name:
                note = f"{p.series}, {p.name}: perplexity {score(p.perplexity)}, {size(p.bytes)}"
                plot.marker(p.bytes / factor, p.perplexity, f"s{index % SERIES}", note)
                if len(points) <= _NAMED:
                    right = plot.x(p.bytes / factor) > 0.7 * plot.width
                    plot.marks.append(text(plot.x(p.bytes / factor) + (-8 if right else 8), plot.y(p.perplexity) - 6,
                                           p.name, "end" if right else "start", "value"))
    if len(names) > 1:
        legend(plot, names)
    best = sorted(frontier(points), key=lambda p: p.bytes)
    sentence = "Nothing measured beats, in both size and perplexity: " + "; ".join(
        f"{p.series} {p.name} ({size(p.bytes)}, {score(p.perplexity)})" for p in best) + "."
    ordered = sorted(points, key=lambda p: (p.bytes, p.perplexity))
    table = Table(("model", "size", "perplexity", "on the frontier"), [
        (f"{p.series}, {p.name}", size(p.bytes), score(p.perplexity), "yes" if p in best else "") for p in ordered
    ])
    return Figure(f"Size against perplexity: {where}", sentence, plot.draw(f"Perplexity by size on {where}", sentence),
                  table)


def _horizontal(plot: Plot, value: float) -> str:
    y = plot.y(value)
    return element("line", x1=plot.x.start, x2=plot.x.stop, y1=y, y2=y, class_="axis", stroke_dasharray="4 3")


def perplexity_table(data: ReportData) -> Table | None:
    """Every measured model, a column for each text."""
    keys = list(dict.fromkeys(s.key for s in [*(s for c in data.checkpoints for s in c.scores), *data.others]))
    if not keys:
        return None

    def cells(scores: tuple[Score, ...] | list[Score]) -> tuple[str, ...]:
        by_key = {s.key: score(s.perplexity) for s in scores}
        return tuple(by_key.get(key, "") for key in keys)

    rows = [
        (c.name, f"{c.summary.expert_bits:.3f}", size(c.summary.tensor_bytes), *cells(c.scores))
        for c in data.checkpoints
    ]
    for name in dict.fromkeys(s.model or "" for s in data.others):
        rows.insert(0, (name, "", "", *cells([s for s in data.others if (s.model or "") == name])))
    return Table(("model", "bits/expert", "size", *map(label, keys)), rows)


def demo_table(data: ReportData) -> Table | None:
    """The demo's methods down, budgets across."""
    if not data.table:
        return None
    budgets = sorted({r.bits for r in data.table if r.bits is not None}, reverse=True)
    rows = []
    for method in dict.fromkeys(r.method for r in data.table):
        own = {r.bits: r.perplexity for r in data.table if r.method == method}
        if None in own:
            rows.append((method, *[score(own[None])] + [""] * (len(budgets))))
        else:
            rows.append((method, "", *(score(own[b]) if b in own else "" for b in budgets)))
    return Table(("method", "16\u00a0bits", *(f"{b:g}\u00a0bits" for b in budgets)), rows)
