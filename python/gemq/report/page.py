"""One self-contained HTML page: no script, no font and no picture from elsewhere."""

from __future__ import annotations

from html import escape

from gemq import __version__
from gemq.report import figures, pareto
from gemq.report.data import Checkpoint, ReportData
from gemq.report.figures import Figure, Table, size
from gemq.report.style import STYLE
from gemq.report.svg import element, number

# nothing but what the page itself holds may be loaded, and no script may run
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(data: ReportData, title: str = "gemq report") -> str:
    """The page of ``data`` as HTML text. Everything that came from files is escaped."""
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="color-scheme" content="light dark">', element("title", text=title),
        f"<style>{STYLE}</style></head><body>", "<header>", element("h1", text=title), _tiles(data), "</header>",
        "<main>", _comparison(data), *(_checkpoint(c, len(data.checkpoints) == 1) for c in data.checkpoints),
        "</main>", f"<footer>gemq {escape(__version__)}</footer></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _tiles(data: ReportData) -> str:
    """Render, as HTML, the figures that readers look for first."""
    if not data.checkpoints:
        return ""
    last = data.checkpoints[-1]
    smallest = len(data.checkpoints) > 1
    tiles = [("smallest checkpoint" if smallest else "checkpoint", last.name, last.base or ""),
             ("bits per expert", number(last.summary.expert_bits), _budget(last)),
             ("size", size(last.summary.tensor_bytes), _ratio(last))]
    if last.scores:
        tiles.append(("perplexity", pareto.score(last.scores[0].perplexity), pareto.label(last.scores[0].key)))
    elif last.seconds:
        tiles.append(("quantized in", figures.duration(sum(last.seconds.values())), ""))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><div class="what">{escape(what)}</div><div class="number">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></div>' for what, value, note in tiles
    ) + "</div>"


def _budget(checkpoint: Checkpoint) -> str:
    config = checkpoint.summary.config
    budget = "" if config.budget is None else f"budget {config.budget:g}"
    return ", ".join(filter(None, [budget, f"method {config.method}" if config.method else ""]))


def _ratio(checkpoint: Checkpoint) -> str:
    if not checkpoint.parameters:
        return ""
    return f"{number(2 * checkpoint.parameters / checkpoint.summary.tensor_bytes, 2)} times smaller than 16 bits"


def _comparison(data: ReportData) -> str:
    parts = []
    for where, points, lines in pareto.curves(data):
        found = pareto.figure(where, points, lines)
        if found is not None:
            parts.append(_figure(found))
    for name, table in (("Perplexity", pareto.perplexity_table(data)),
                        ("Perplexity on the demo's held-out text", pareto.demo_table(data))):
        if table is not None:
            parts.append(f'<section class="card"><h3>{escape(name)}</h3>{_table(table)}</section>')
    if not parts:
        return ""
    return f'<h2>Comparison</h2><div class="grid">{"".join(parts)}</div>'


def _checkpoint(checkpoint: Checkpoint, alone: bool) -> str:
    drawn = [
        *(figures.bit_map(rows, of) for of, rows in checkpoint.bits.items()),
        figures.bits_by_layer(checkpoint.mean_bits),
        figures.importance(checkpoint), figures.importance_by_layer(checkpoint), figures.router_shift(checkpoint.shift),
        figures.output_error(checkpoint), figures.run_times(checkpoint.seconds),
    ]
    always = [""] * (len(checkpoint.bits) + 1)
    names = (*always, "importance (no gemq_costs.json)", "", "router shift", "output errors", "run times")
    missing = [name for name, figure in zip(names, drawn, strict=True) if figure is None and name]
    body = "".join(_figure(f) for f in drawn if f is not None)
    note = f'<p class="note">Not recorded: {escape(", ".join(missing))}.</p>' if missing else ""
    config = checkpoint.summary.config
    facts = f"attention {config.widths.attention} bits, dense {config.widths.dense}, routers {config.widths.router}, " \
            f"head {config.widths.head}, embedding {config.widths.embedding}, groups of {config.group_size}"
    if checkpoint.calibration:
        facts += f", calibrated on {checkpoint.calibration}"
    head = f"{checkpoint.name}: {number(checkpoint.summary.expert_bits)} bits per expert, " \
           f"{size(checkpoint.summary.tensor_bytes)}"
    sizes = Table(("tensors", "size", "share"), [
        (kind, size(count), f"{100 * count / checkpoint.summary.tensor_bytes:.1f}%")
        for kind, count in checkpoint.summary.bytes_by_kind.items()
    ])
    card = f'<section class="card"><h3>Where the bytes are</h3>{_table(sizes)}</section>'
    inner = f'<p class="note">{escape(facts)}</p>{note}<div class="grid">{body}{card}</div>'
    if alone:
        return f"<h2>{escape(head)}</h2>{inner}"
    return f"<details open><summary><h2>{escape(head)}</h2></summary>{inner}</details>"


def _figure(figure: Figure) -> str:
    scroll = f'<div class="scroll" role="region" aria-label="{escape(figure.title)}" tabindex="0">{figure.svg}</div>'
    return (
        f'<section class="card{" span" if figure.span else ""}"><h3>{escape(figure.title)}</h3>'
        f"<p>{escape(figure.sentence)}</p>{scroll if figure.wide else figure.svg}"
        f"<details><summary>as a table</summary>{_table(figure.table)}</details></section>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="table of {escape(table.columns[0])}"><table>'
            f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>")
