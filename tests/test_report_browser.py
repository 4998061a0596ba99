"""The report in a real browser: quiet, drawn from itself alone, as wide as the screen, in the reader's colours.

Skipped where there is no Chromium (Debian: chromium). ``GEMQ_REPORT_PICTURES=FOLDER`` keeps a PNG of each view.
"""

from __future__ import annotations

import os
from pathlib import Path

import browser
import numpy as np
import pytest

from gemq.algorithms.costs import Costs
from gemq.checkpoint_summary import Summary
from gemq.evaluations import Score
from gemq.packed_config import PackedConfig
from gemq.report import render
from gemq.report.data import Checkpoint, ReportData, RouterShift
from gemq.report.style import DARK, LIGHT
from gemq.widths import Widths

SHAPES = {"qwen3-30b-a3b": (48, 128), "deepseek-v2-lite": (26, 64), "mixtral-8x7b": (32, 8)}
# what runs past the right edge, box or text, and is not inside a box that scrolls by itself
OVERFLOW = """[...document.querySelectorAll('body *:not(svg *)')].filter(e => !e.parentElement.closest('.scroll')
    && Math.max(e.getBoundingClientRect().right, e.getBoundingClientRect().left
        + (e.matches('.scroll') ? 0 : e.scrollWidth)) > document.documentElement.clientWidth + 1)
    .map(e => e.outerHTML.slice(0, 80))"""


def checkpoint(name: str, layers: int, experts: int) -> Checkpoint:
    """A made-up checkpoint of a real model's shape with everything that is ever recorded."""
    rng = np.random.default_rng(layers)
    places = range(layers)
    bits = {i: [int(b) for b in rng.choice([1, 2, 3], experts)] for i in places}
    costs = np.exp(rng.normal(-6, 1.5, (layers, experts, 1))) / np.array([1, 5, 30])
    sizes = {"experts codes": 9_000_000_000, "experts meta": 10**9, "unquantized": 5 * 10**8}
    return Checkpoint(
        f"{name}-2.5", Path(name),
        Summary(PackedConfig(Widths(bits), budget=2.5, method="gemq"), sizes, 10_500_000_000, 2.5),
        base=f"somebody/{name}-with-a-rather-long-name", calibration="wikitext-2", parameters=30_500_000_000,
        seconds={"measure": 4000.0, "allocate": 12.0, "quantize": 5400.0, "tune routers": 900.0},
        error={i: float(rng.uniform(0.01, 0.1)) for i in places},
        tokens={i: int(rng.integers(300, 5000)) for i in places},
        shift={i: RouterShift(float(rng.uniform(0.001, 0.01)), float(rng.uniform(0.01, 0.1))) for i in places},
        costs=Costs((1, 2, 3), costs, tuple(places)),
        scores=(Score("a/folder/with/a/long/name/wiki.test.raw", 2048, 5.0 + 0.01 * layers, 280_000),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of three large models."""
    made = ReportData(tuple(checkpoint(name, *shape) for name, shape in SHAPES.items()))
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(made, "Three large models"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser for all views."""
    program = browser.find()
    if program is None:
        pytest.skip("there is no Chromium on PATH")
    with browser.Browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_in_a_browser(chromium, page, width, dark):
    chromium.events.clear()
    chromium.open(page, width, dark)
    assert chromium.evaluate("document.documentElement.clientWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") == width, chromium.evaluate(OVERFLOW)
    assert chromium.evaluate(OVERFLOW) == []
    # every drawing has a place, and its letters are not squeezed below what can be read
    boxes = chromium.evaluate("[...document.querySelectorAll('svg')].map(e => [e.clientWidth, e.clientHeight])")
    assert len(boxes) == 1 + 7 * len(SHAPES) and all(w > 100 and h > 30 for w, h in boxes)
    ground = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    wanted = (DARK if dark else LIGHT)["page"]
    assert ground == "rgb({}, {}, {})".format(*(int(wanted[i : i + 2], 16) for i in (1, 3, 5)))
    asked = [p["request"]["url"] for method, p in chromium.events if method == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]
    said = [(m, p) for m, p in chromium.events
            if m in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]
    assert said == []
    if os.environ.get("GEMQ_REPORT_PICTURES"):
        name = f"report-{width}-{'dark' if dark else 'light'}.png"
        chromium.picture(Path(os.environ["GEMQ_REPORT_PICTURES"]) / name)


def test_the_browser_notices_what_the_report_must_not_do(chromium, tmp_path):
    """The checks above can fail: a page that is too wide, asks for a file and has an error."""
    bad = tmp_path / "bad.html"
    (tmp_path / "other.css").write_text("")
    bad.write_text(
        "<link rel=stylesheet href=other.css><div style='width:900px'>x</div><script>console.error(1)</script>"
    )
    chromium.events.clear()
    chromium.open(bad, 360, False)
    assert chromium.evaluate("document.documentElement.scrollWidth") > 360 and len(chromium.evaluate(OVERFLOW)) == 1
    methods = [method for method, _ in chromium.events]
    assert methods.count("Network.requestWillBeSent") == 2 and "Runtime.consoleAPICalled" in methods
