"""The page's colours and its style sheet.

Series are told apart by dash as well as by colour (Okabe and Ito's hues, darkened or lightened until they stand out 3
to 1 from the page). Widths go from light to dark in one order that survives every colour blindness.
"""

from __future__ import annotations

LIGHT = {"page": "#ffffff", "card": "#f6f8fa", "text": "#1b1f24", "faint": "#57606a", "grid": "#d8dee4"}
DARK = {"page": "#0d1117", "card": "#161b22", "text": "#e6edf3", "faint": "#9aa5b1", "grid": "#30363d"}
SERIES_LIGHT = ("#0072b2", "#b84a00", "#00785a", "#a33c7f", "#7d5c00", "#5a4fcf")
SERIES_DARK = ("#56b4e9", "#ff9a52", "#35d0a2", "#f09fcb", "#f0c04a", "#aba6ff")
# cell, digit on it; yellow to blue as the width grows
WIDTHS = (
    ("#b5b9be", "#000000"), ("#f7dc6f", "#000000"), ("#a8dcb5", "#000000"), ("#43b3c4", "#000000"),
    ("#2475b4", "#ffffff"), ("#2459a2", "#ffffff"), ("#253f96", "#ffffff"), ("#24307f", "#ffffff"),
    ("#1a2160", "#ffffff"),
)


def _variables(theme: dict[str, str], series: tuple[str, ...]) -> str:
    values = theme | {f"s{index}": colour for index, colour in enumerate(series)}
    return "".join(f"--{name}:{value};" for name, value in values.items())


def _series() -> str:
    rules = [f".s{i}{{fill:var(--s{i})}}.line.s{i}{{stroke:var(--s{i});fill:none}}" for i in range(len(SERIES_LIGHT))]
    rules += [f".w{i}{{fill:{cell}}}.d{i}{{fill:{digit}}}" for i, (cell, digit) in enumerate(WIDTHS)]
    return "".join(rules)


STYLE = (
    f":root{{{_variables(LIGHT, SERIES_LIGHT)}}}"
    f"@media (prefers-color-scheme: dark){{:root{{{_variables(DARK, SERIES_DARK)}}}}}"
    """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:16px;background:var(--page);color:var(--text);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:22px;margin:4px 0 12px}h2{font-size:18px;margin:26px 0 6px;display:inline-block}
h3{font-size:15px;margin:0 0 2px}h1,h2,h3,p,.note{overflow-wrap:anywhere}
p{margin:0 0 10px;color:var(--faint);max-width:75ch}
.note,footer{color:var(--faint);font-size:13px}footer{margin-top:28px}
.tiles{display:grid;gap:10px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.tile,.card{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px}
.what{color:var(--faint);font-size:13px}.number{font-size:26px;font-weight:650;overflow-wrap:anywhere}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));align-items:start}
.card{min-width:0}.span{grid-column:1/-1}.card svg{display:block;margin:0 auto}
.scroll{overflow-x:auto}.scroll svg{margin:0}.scroll:focus-visible{outline:2px solid var(--s0)}
summary{cursor:pointer;color:var(--faint);font-size:13px;padding:4px 0}summary h2{color:var(--text);display:inline}
main>details{margin-top:22px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;margin-top:4px}
th,td{padding:3px 10px 3px 0;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child{text-align:left;font-weight:500}
thead th{color:var(--faint);font-weight:500;white-space:normal;vertical-align:bottom}
svg text{fill:var(--text);font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg .tick{fill:var(--faint);font-size:11px}svg .label{fill:var(--faint);font-size:12px}svg .value{font-size:11px}
svg .digit{font-size:11px}
svg .rule{stroke:var(--grid);stroke-width:1}svg .axis{stroke:var(--faint);stroke-width:1}
.line{stroke-width:2;stroke-linejoin:round}
.dot{stroke:var(--card);stroke-width:1}
@media print{details{display:block}}
"""
    + _series()
)
