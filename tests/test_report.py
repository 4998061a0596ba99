"""The report's page: what it shows, that it holds everything it needs, and what it does with bad files."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from tiny_models import tiny_model

import gemq
from gemq.checkpoint import load_packed_config
from gemq.cli.run import run
from gemq.errors import CheckpointError
from gemq.evaluations import Score, read_evaluations, record
from gemq.report import load, render
from gemq.report.pareto import Point, frontier
from gemq.report.style import DARK, LIGHT, SERIES_DARK, SERIES_LIGHT, WIDTHS
from gemq.report.svg import Scale, log_ticks, number, ticks

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Elements, texts and ids of a page; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder, text_file):
    """Two budgets of the tiny model, as `gemq quantize` leaves them, by costs that tell gate and up from down."""
    folder = tmp_path_factory.mktemp("report") / "tiny"
    # without constraints per layer many widths of down differ, whatever the last bits of this machine's sums are
    options = ["--constraints", "none", "--calibration", str(text_file), "--samples", "6", "--length", "24"]
    assert run(["quantize", str(model_folder), "-o", str(folder), "--bits", "2.5,2", *options, "-q"]) == 0
    for name in ("2.5", "2"):
        arguments = ["eval", str(folder / name), "--data", str(text_file), "--length", "32", "--limit", "4", "--record"]
        assert run([*arguments, "-q"]) == 0
    return folder


def test_the_page_stands_alone_and_shows_everything(made):
    text = render(load([made]))
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"""(src|href|url)\s*[=(]""", text), "something is loaded from elsewhere"
    policy = next(m for m in page.all("meta") if m.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")
    shown = " ".join(page.texts)
    for words in ("Bits of gate and up by layer and expert", "Bits of down by layer and expert", "Bits by layer",
                  "Importance of experts", "Importance of layers",
                  "Router shift", "Run time by stage", "Size against perplexity", "Perplexity", "bits per expert"):
        assert words in shown
    assert "prefers-color-scheme: dark" in text and "Not recorded" not in shown
    for path in ("2.5", "2"):
        assert f"{read_evaluations(made / path)[0].perplexity:.2f}" in shown


def test_every_drawing_has_a_title_a_description_and_a_table(made):
    page = Page(render(load([made])))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    drawings = page.all("svg")
    maps = sum(2 if load_packed_config(made / path).widths.down else 1 for path in ("2.5", "2"))
    assert len(drawings) == 1 + 2 * 6 + maps
    for drawing in drawings:
        assert drawing["role"] == "img" and set(drawing["aria-labelledby"].split()) <= set(ids)
    # tables: one for each drawing, the perplexities, the bytes of each checkpoint
    assert len(page.all("table")) == len(drawings) + 1 + 2
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))


def test_the_bit_map_is_the_configs(made):
    config = load_packed_config(made / "2")
    text = render(load([made / "2"]))
    digits = [int(d) for d in re.findall(r'class="digit d\d">(\d)<', text)]
    maps = [config.widths.experts, config.widths.down]
    assert digits == [b for rows in maps for row in rows.values() for b in row] and maps[0] != maps[1]
    rows = re.findall(r'<tr><th scope="row">(\d+)</th><td>([\d ]+)</td><td>[\d.]+</td></tr>', text)
    assert [(int(n), [int(b) for b in row.split()]) for n, row in rows] == [pair for m in maps for pair in m.items()]


def test_what_comes_from_files_is_escaped(made, tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    folder = shutil.copytree(made / "2", tmp_path / "x<img src=q>")
    report = json.loads((folder / "gemq_report.json").read_text())
    report["options"]["calibration"], report["options"]["model"] = evil, "a/<b>bold"
    (folder / "gemq_run.json").write_text(json.dumps({"seconds": {evil: 3.0}}))
    (folder / "gemq_report.json").write_text(json.dumps(report))
    record(folder, Score(evil, 32, 20.0, 100))
    text = render(load([folder]), title=evil)
    assert "<script" not in text and "<img" not in text and "<b>bold" not in text
    page = Page(text)
    assert any(evil in part for part in page.texts)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "b"}


def test_older_checkpoints_are_shown_with_what_they_have(made, tmp_path):
    folder = shutil.copytree(made / "2", tmp_path / "old")
    for name in ("gemq_report.json", "gemq_run.json", "gemq_costs.json", "gemq_evaluations.json"):
        (folder / name).unlink()
    shown = " ".join(Page(render(load([folder]))).texts)
    assert "Bits of down by layer and expert" in shown
    assert "Not recorded: importance (no gemq_costs.json), router shift, output errors, run times." in shown


def test_router_shift_is_what_the_files_say(made, model_folder):
    recorded = load([made / "2"]).checkpoints[0].shift
    found = load([made / "2"], source=model_folder).checkpoints[0].shift
    assert recorded.keys() == found.keys() == {0, 1}
    for layer, shift in found.items():
        # the checkpoint's routers went through bfloat16
        assert shift.weights == pytest.approx(recorded[layer].weights, rel=0.3, abs=3e-3) and shift.weights > 0
        assert shift.selected == recorded[layer].selected and 0 < shift.selected < 1
    with pytest.raises(CheckpointError, match="is not the original of"):
        load([made / "2"], source=_other_model(model_folder.parent))


def _other_model(folder):
    path = folder / "other-original"
    if not path.exists():
        tiny_model("olmoe", layers=1).save_pretrained(path)
    return path


def test_scores_of_other_models_are_lines_and_rows(made, model_folder, text_file, tmp_path, capsys):
    arguments = ["eval", str(model_folder), "--data", str(text_file), "--length", "32", "--limit", "4", "-q"]
    assert run([*arguments, "--format", "json"]) == 0
    scores = tmp_path / "original.json"
    scores.write_text(capsys.readouterr().out)
    data = load([made], scores=[scores])
    assert [s.model for s in data.others] == ["tiny-mixtral"]
    own = json.loads(scores.read_text())[0]
    text = render(data)
    assert f"tiny-mixtral: {own['perplexity']:.2f}" in text
    scores.write_text(json.dumps(own | {"model": str(made / "2"), "perplexity": 12.25}))
    again = load([made], scores=[scores])
    assert next(c for c in again.checkpoints if c.name == "2").scores[-1].perplexity == 12.25 and not again.others


def test_the_command_writes_the_page_and_pictures(made, tmp_path, capsys):
    page, pictures = tmp_path / "r.html", tmp_path / "png"
    assert run(["report", str(made), "-o", str(page), "--png", str(pictures)]) == 0
    written = capsys.readouterr().out.split()
    assert written[0] == str(page) and Page(page.read_text()).all("svg")
    names = {p.name for p in pictures.iterdir()}
    kinds = {"importance", "routers", "times"}
    apart = {n: bool(load_packed_config(made / n).widths.down) for n in ("2", "2.5")}
    maps = {n: {"bits-gate-up", "bits-down"} if two else {"bits"} for n, two in apart.items()}
    assert names == {"pareto.png"} | {f"{n}-{k}.png" for n, own in maps.items() for k in kinds | own}
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 3000 for p in pictures.iterdir())
    assert run(["report", str(made), "-o", str(page)]) == 2
    assert "exists; choose another or pass --overwrite" in " ".join(capsys.readouterr().err.split())
    assert run(["report", str(made), "-o", str(page), "--overwrite"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["png", "r.html"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("gemq_report.json", "{", "is not valid JSON"),
    ("gemq_run.json", '{"seconds": {"a": "long"}}', "is malformed: seconds: expected a finite number"),
    ("gemq_run.json", '{"seconds": [1]}', "is malformed"),
    ("gemq_report.json", '{"matrices": {"a.experts.b": {}}}', "is malformed"),
    ("gemq_costs.json", "{}", "not a gemq-costs file"),
    ("gemq_evaluations.json", '{"version": 2, "evaluations": []}', "not a list of evaluations of version 1"),
    ("gemq_evaluations.json", '{"version": 1, "evaluations": [{"data": "x", "length": 8, "tokens": 9}]}',
     "perplexity must be given"),
    ("config.json", "{}", "not a gemq checkpoint"),
])  # fmt: skip
def test_bad_files_are_named(made, tmp_path, capsys, name, content, message):
    folder = shutil.copytree(made / "2", tmp_path / "bad")
    (folder / name).write_text(content)
    assert run(["report", str(folder), "-o", str(tmp_path / "r.html")]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and line.count("\n") == 0
    assert not (tmp_path / "r.html").exists()


def test_folders_that_hold_nothing_are_refused(made, tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        load([tmp_path / "none"])
    with pytest.raises(CheckpointError, match="is no checkpoint and holds none"):
        load([tmp_path])
    with pytest.raises(CheckpointError, match="named twice"):
        load([made, made / "2"])


def test_evaluations_are_replaced_not_doubled_and_leave_verify_alone(made, tmp_path):
    folder = shutil.copytree(made / "2", tmp_path / "copy")
    before = read_evaluations(folder)
    record(folder, Score(before[0].data, before[0].length, 7.5, before[0].tokens))
    record(folder, Score("other", 64, 8.5, 640))
    assert [(s.data, s.perplexity) for s in read_evaluations(folder)] == [(before[0].data, 7.5), ("other", 8.5)]
    (folder / "README.md").write_text("my own words")
    gemq.verify(folder)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "series"), [(LIGHT, SERIES_LIGHT), (DARK, SERIES_DARK)], ids=["light", "dark"])
def test_colours_have_contrast(theme, series):
    for ground in ("page", "card"):
        assert contrast(theme["text"], theme[ground]) >= 7
        assert contrast(theme["faint"], theme[ground]) >= 4.5
        assert all(contrast(colour, theme[ground]) >= 3 for colour in series)
    assert all(contrast(cell, digit) >= 4.5 for cell, digit in WIDTHS)


def test_the_frontier_is_what_nothing_beats():
    a, b, c, d = Point("x", "a", 10, 5.0), Point("x", "b", 8, 6.0), Point("x", "c", 9, 7.0), Point("y", "d", 10, 5.0)
    assert frontier([a, b, c, d]) == {a, b, d}


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.25, "0.25"), (2, "2"), (12345.6, "12,346"), (1e-5, "1.00e-5"), (3.14159, "3.14"), (-0.5, "-0.5"),
])
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_scales_and_ticks():
    assert ticks(0, 10, 5) == [0, 2.5, 5, 7.5, 10] and ticks(3, 3) == [3]
    assert log_ticks(27, 90) == [30, 40, 50, 60, 80] and log_ticks(1e-6, 1) == [10.0**e for e in range(-6, 1)]
    scale = Scale(1, 100, 0, 200, log=True)
    assert [scale(v) for v in (1, 10, 100)] == pytest.approx([0, 100, 200]) and scale(0) == 0
