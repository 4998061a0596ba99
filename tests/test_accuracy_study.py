"""The accuracy study at a tiny scale: every table runs, resumes, and says what the cells hold; training resumes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import random_windows, tiny_model
from tiny_text import words
from torch import nn

from gemq.algorithms.method import MethodConfig
from gemq.algorithms.perplexity import perplexity
from gemq.algorithms.perturbation import Perturbation
from gemq.engine.progression import measure_importance, quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.models import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "accuracy"))

import architectures
import cells
import eq6
import render
import study
import tables
import temperature
import train

TINY = ["--limit", "2", "--samples", "2", "--length", "16", "--bits", "2.5,2", "--batch-size", "2"]


@pytest.fixture
def texts(tmp_path):
    """Two calibration texts and two to evaluate on."""
    for seed, name in enumerate(("one", "two", "held", "other")):
        (tmp_path / f"{name}.txt").write_text(words(6000, seed), encoding="utf-8")
    given = [["--calibration", f"{n}={tmp_path / n}.txt"] for n in ("one", "two")]
    given += [["--text", f"{n}={tmp_path / n}.txt"] for n in ("held", "other")]
    return [word for pair in given for word in pair]


def arguments(model_folder, texts, out, *more):
    return [str(model_folder), *texts, *TINY, "--out", str(out), *more]


def test_every_table_runs_and_a_second_run_computes_nothing(model_folder, texts, tmp_path, capsys) -> None:
    out = tmp_path / "study"
    # the slow ends of the scales are the same code as the rest
    given = arguments(model_folder, texts, out, "--seeds", "0")
    few = [key for key in tables.PRIORITY if key not in ("16", "19", "20", "tuning")]
    study.main([*given, "--table", ",".join(few)])
    text = (out / "study.md").read_text()
    for title in ("Table 1.", "Table 2.", "Table 3.", "Table 5.", "Table 6.", "Table 15.", "Table 17.", "Table 18.",
                  "Table 21.", "Eq. 6 against", "Bit maps", "Importance under", "Tokens whose experts changed"):
        assert f"### {title}" in text
    assert render.REPLAYED in text and "The paper's order:" in text and "only orders are reported" in text
    assert {p.name for p in out.glob("*.png")} == {f"tiny-mixtral-{n}.png" for n in ("pareto", "maps", "eq6")}
    merged = json.loads((out / "study.json").read_text())
    files = sorted((out / "cells").glob("*.json"))
    assert len(merged["cells"]) == len(files) > 25
    assert not any(str(tmp_path) in p.read_text() for p in files), "no path of this machine in results"
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in files}
    study.main([*given, "--table", ",".join(few)])
    said = capsys.readouterr().out
    assert f"{len(files)} cells, 0 to compute" in said and "seed 0" not in said
    assert before == {p: p.stat().st_mtime_ns for p in files}


def test_an_interrupted_study_goes_on(model_folder, texts, tmp_path, capsys) -> None:
    given = arguments(model_folder, texts, tmp_path / "study", "--seeds", "0", "--table", "5")
    study.main([*given, "--cells", "2"])
    assert "5 cells, 5 to compute" in capsys.readouterr().out
    study.main([*given, "--dry-run"])
    said = capsys.readouterr().out
    assert "5 cells, 3 to compute, time left: 0" in said
    study.main(given)
    assert "5 cells, 3 to compute" in capsys.readouterr().out
    whole = arguments(model_folder, texts, tmp_path / "whole", "--seeds", "0", "--table", "5")
    study.main(whole)
    for path in (tmp_path / "study" / "cells").glob("*.json"):
        one, two = (json.loads(p.read_text()) for p in (path, tmp_path / "whole" / "cells" / path.name))
        assert [s["perplexity"] for s in one["stages"]] == [s["perplexity"] for s in two["stages"]]


def test_a_cell_is_the_method_it_names(model_folder, texts, tmp_path) -> None:
    """A cell's perplexity is that of a model quantized by the library with the same options."""
    options = study.parse(arguments(model_folder, texts, tmp_path, "--seeds", "3"))
    session = cells.Session(str(model_folder), 3, study.settings_of(options), tmp_path)
    run = cells.Run(budgets=(2.5, 2.0), routers="loss", estimate="tuned", per_layer="c2c3")
    found = cells.run_cell(session, run, {})["stages"]
    source = ResidentSource(tiny_model("mixtral"))
    config = MethodConfig(budgets=(2.5, 2.0), batch_size=2, per_layer="c2c3")
    for stage, cell in zip(quantize_progressively(source, session.calibrating(run), config), found, strict=True):
        assert [stage.widths.experts[i] for i in (0, 1)] == cell["bits"]
        for name, windows in session.texts.items():
            assert perplexity(stage.weights.whole().model, windows) == pytest.approx(cell["perplexity"][name], rel=1e-4)


def test_what_a_cell_was_computed_from_is_in_its_name(model_folder, texts, tmp_path) -> None:
    options = study.parse(arguments(model_folder, texts, tmp_path))
    settings, model = study.settings_of(options), str(model_folder)
    print_of = cells.fingerprint(model)
    base = cells.cell_name(model, print_of, 0, tables.GEMQ, settings)
    assert base == cells.cell_name(model, print_of, 0, tables.GEMQ, settings)
    from dataclasses import replace

    other = [
        cells.cell_name(model, print_of, 1, tables.GEMQ, settings),
        cells.cell_name(model, "x", 0, tables.GEMQ, settings),
        cells.cell_name(model, print_of, 0, tables.PMQ, settings),
        cells.cell_name(model, print_of, 0, replace(tables.GEMQ, calibration="two"), settings),
        cells.cell_name(model, print_of, 0, tables.GEMQ, replace(settings, samples=3)),
        cells.cell_name(model, print_of, 0, tables.GEMQ, replace(settings, length=8)),
    ]
    (tmp_path / "held.txt").write_text(words(6000, 77))
    other.append(cells.cell_name(model, print_of, 0, tables.GEMQ, settings))
    assert len({base, *other}) == len(other) + 1
    # the default calibration text, named or not, and the default number of windows are the same cell
    same = replace(tables.GEMQ, calibration="one", samples=2)
    assert cells.cell_name(model, print_of, 0, same, settings) == other[-1]


@pytest.mark.parametrize("given, message", [
    (["--table", "1,99"], r"error: --table must be all or of .*; got 99"),
    (["--text", "held"], r"error: --text must be NAME=SOURCE, each name once, got held"),
    (["--calibration", "a=x", "--calibration", "a=y"], "error: --calibration must be NAME=SOURCE, each name once"),
])  # fmt: skip
def test_bad_options_of_a_study(given, message, model_folder, tmp_path) -> None:
    with pytest.raises(SystemExit, match=message):
        study.main([str(model_folder), "--out", str(tmp_path / "o"), *given])
    assert not (tmp_path / "o").exists()


def made_up(stages: dict) -> render.Study:
    """A study of hand-made perplexities ``{run: {budget: [one a seed]}}`` on one text."""
    results = {}
    for run, budgets in stages.items():
        for seed in range(3):
            cell = [{"budget": b, "perplexity": {"held": v[seed]}} for b, v in budgets.items()]
            results["m", seed, run] = {"stages": cell}
    return render.Study(["m"], [0, 1, 2], results)


def test_orders_are_said_as_they_are() -> None:
    one, two = tables.UNIFORM, tables.PMQ
    table = tables.Table("1", "t", (("a", one), ("b", two)), (("b", "a"),))
    found = made_up({
        one: {2.5: [10.0, 11.0, 12.0], 2.0: [20.0, 21.0, 22.0], 1.5: [30.0, 31.0, 32.0]},
        two: {2.5: [7.0, 8.0, 9.0], 2.0: [19.0, 20.0, 21.0], 1.5: [33.0, 34.0, 35.0]},
    })
    (line,) = render._orders(found, "m", table)[2:]
    assert line == "* b below a: holds at held 2.5; within the spread at held 2; does not hold at held 1.5."
    rows = render._perplexity(found, "m", table)
    assert "| 2.5 | a | 11.00 ± 1.00 | — |" in rows and "| 1.5 | b | 34.00 ± 1.00 | — |" in rows


def test_the_gap_is_over_full_precision_tuned_alike() -> None:
    table = tables.Table("1", "t", (("plain", tables.GEMQ), ("tuned", tables.TUNED)))
    stages = {2.5: [20.0] * 3}
    found = made_up({tables.FP: {16.0: [10.0] * 3}, tables.FP_TUNED: {16.0: [8.0] * 3}, tables.GEMQ: stages,
                     tables.TUNED: stages})
    rows = [line for line in render._perplexity(found, "m", table) if line.startswith("| 2.5")]
    assert f"{100 * math.log(2):+.1f}%" in rows[0] and f"{100 * math.log(2.5):+.1f}%" in rows[1]
    assert "claims are made" in render._standing(found, "m")


# --- Eq. 6 against the true loss ---


def test_true_increases_are_those_of_quantizing_one_expert() -> None:
    model = tiny_model("mixtral")
    moe, windows = describe(model), random_windows(4, 16)
    rounding = Perturbation("rtn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = eq6.true_increases(moe, windows, (0, 2), rounding, batch_size=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def loss() -> float:
        with torch.no_grad():
            return sum(float(nn.functional.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:]))
                       for w in windows)

    base, experts = loss(), moe.moe[1].experts
    experts.gate_up_proj.data[2], experts.down_proj.data[2] = 0, 0
    assert found[1, 2, 0] == pytest.approx(loss() - base, rel=1e-3, abs=1e-5)


def test_eq6_is_calibrated_where_its_theory_holds() -> None:
    """For data that the model itself generates, the Fisher information is the Hessian: the predicted rise of the loss
    is the true one, for a small change and many tokens."""
    torch.manual_seed(0)
    model = tiny_model("mixtral", layers=1)
    moe = describe(model)
    with torch.no_grad():
        ids = torch.randint(0, 96, (256, 1))
        for _ in range(23):
            ids = torch.cat([ids, torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1)], 1)
    rounding = Perturbation("rtn")
    predicted = measure_importance(ResidentSource(model), ids, (3,), perturbation=rounding, batch_size=64).costs.routed
    true = eq6.true_increases(moe, ids, (3,), rounding, batch_size=64)
    ratio = true.sum() / eq6.calibrated(predicted, 24).sum()
    assert 0.6 < ratio < 1.8


def test_the_first_order_term_is_the_true_rise_of_a_small_change() -> None:
    torch.manual_seed(1)
    moe, windows = describe(tiny_model("mixtral", layers=1)), random_windows(6, 16)
    how = (moe, windows, (6,), Perturbation("rtn"), 4)
    first, true = eq6.first_order(*how), eq6.true_increases(*how)
    assert (true != 0).any()
    np.testing.assert_allclose(first, true, atol=0.05 * np.abs(true).max())


def test_the_multiple_of_eq6_beside_the_first_order_term_is_fitted() -> None:
    predicted, first = np.array([1.0, 2.0, 4.0]), np.array([-3.0, 1.0, 5.0])
    both, multiple = eq6.with_first_order(predicted, first, first + 3 * eq6.calibrated(predicted, 9), 9)
    assert multiple == pytest.approx(3)
    np.testing.assert_allclose(both, first + 12 * predicted)


def test_spearman_is_pearson_of_ranks() -> None:
    assert eq6.spearman(np.array([1, 2, 3, 4.0]), np.array([1, 4, 9, 100.0])) == pytest.approx(1)
    assert eq6.spearman(np.array([1, 2, 3, 4.0]), np.array([4, 3, 2, 1.0])) == pytest.approx(-1)
    np.testing.assert_array_equal(eq6.ranks(np.array([5, 1, 5, 0.0])), [2.5, 1, 2.5, 0])


# --- training ---


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_architectures_are_of_the_size_that_is_promised(architecture: str) -> None:
    with torch.device("meta"):
        model = architectures.build(architecture, architectures.Size())
    moe = describe(model)
    assert 10e6 <= sum(p.numel() for p in model.parameters()) <= 60e6
    assert 8 <= moe.num_experts <= 64 and len(moe.moe) >= 5
    assert (moe.moe[0].shared is not None) == (architecture in ("deepseek_v2", "qwen2_moe"))


def test_the_balance_loss_is_of_each_layer() -> None:
    even = torch.eye(4).repeat(8, 1) * 20
    assert float(train.balance_loss([even], 1)) == pytest.approx(1, rel=1e-3)
    # two layers that each use half of their experts look even together, and are not
    first = torch.tensor([[20.0, 0, 0, 0], [0, 20.0, 0, 0]]).repeat(8, 1)
    assert float(train.balance_loss([first, first.roll(2, 1)], 1)) == pytest.approx(2, rel=1e-3)
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    share = np.bincount(logits.topk(2).indices.flatten().numpy(), minlength=6) / 100
    expected = float(6 * share @ logits.softmax(-1).mean(0).numpy())
    assert float(train.balance_loss([logits], 2)) == pytest.approx(expected)


def test_every_window_of_a_pass_comes_once() -> None:
    ids = torch.arange(1000)
    starts = torch.cat([train.batch_at(ids, step, 4, 16, 5)[:, 0] for step in range(15)])
    assert len(starts.unique()) == 60 and len((starts % 16).unique()) <= 2
    assert not torch.equal(train.batch_at(ids, 0, 4, 16, 5), train.batch_at(ids, 15, 4, 16, 5))
    with pytest.raises(ValueError, match="the text has 20 tokens"):
        train.batch_at(torch.arange(20), 0, 4, 16, 5)


def options(tmp_path, architecture, out, *more):
    return train.parse([
        architecture, str(tmp_path / "text.txt"), "--out", str(tmp_path / out), "--hidden", "32", "--layers", "2",
        "--heads", "2", "--experts", "4", "--top-k", "2", "--vocabulary", "300", "--steps", "6", "--batch", "2",
        "--window", "16", "--save-every", "3", "--log-every", "3", "--least-share", "0", "--warmup", "2", *more,
    ])


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_training_that_was_cut_off_ends_with_the_same_weights(architecture, tmp_path, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text(words(3000), encoding="utf-8")
    train.run(options(tmp_path, architecture, "whole"))
    original, calls = train.batch_at, []

    def cut(*given):
        calls.append(given)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "batch_at", cut)
        train.run(options(tmp_path, architecture, "cut"))
    assert not (tmp_path / "cut" / "model").exists()
    with pytest.raises(ValueError, match="was begun with other options"):
        train.run(options(tmp_path, architecture, "cut", "--lr", "1e-4"))
    train.run(options(tmp_path, architecture, "cut"))
    one, two = ((tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert one == two
    assert not (tmp_path / "cut" / ".training").exists() and (tmp_path / "cut" / "text" / "heldout.txt").is_file()


def test_a_dead_expert_is_refused(tmp_path) -> None:
    (tmp_path / "text.txt").write_text(words(3000), encoding="utf-8")
    with pytest.raises(ValueError, match=r"of an even load, below --least-share 1\.5"):
        train.run(options(tmp_path, "mixtral", "out", "--least-share", "1.5"))


def test_a_merged_study_can_be_recorded(model_folder, texts, tmp_path) -> None:
    from benchmark_modules import load

    out = tmp_path / "study"
    study.main(arguments(model_folder, texts, out, "--seeds", "0", "--table", "maps"))
    merged = json.loads((out / "study.json").read_text())
    found = load("record").recorded("accuracy", merged, None)
    assert found["kind"] == "accuracy" and found["conditions"]["commit"] and found["cells"] == merged["cells"]
    assert all("conditions" not in cell for cell in merged["cells"])
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- begin study -->\nold\n<!-- end study -->\nlast\n")
    given = arguments(model_folder, texts, out, "--seeds", "0", "--table", "maps", "--into", str(page))
    study.main([*given, "--command", "make study TABLE=maps", "--commit", "abc"])
    text = page.read_text()
    assert "old" not in text and text.startswith("# Page\n") and text.endswith("<!-- end study -->\nlast\n")
    assert "### tiny-mixtral" in text and "commit abc" in text and "`make study TABLE=maps`" in text
    assert "](images/accuracy-tiny-mixtral-maps.png)" in text
    assert (tmp_path / "images" / "accuracy-tiny-mixtral-maps.png").is_file()


def test_perplexity_by_temperature_is_that_of_divided_logits() -> None:
    model, windows = tiny_model("mixtral"), random_windows(5, 12)
    with torch.no_grad():
        # sharper than it is: a temperature above 1 must be the best on random tokens
        model.lm_head.weight.mul_(50)
        logits = model(input_ids=windows).logits[:, :-1].double()
    found = temperature.by_temperature(model, windows, 2)
    for t in (0.8, 1.0, 1.5):
        logs = torch.log_softmax(logits / t, -1).gather(-1, windows[:, 1:, None])
        assert found[t] == pytest.approx(math.exp(-float(logs.mean())), rel=1e-4)
    assert min(found, key=found.get) == max(temperature.TEMPERATURES)
