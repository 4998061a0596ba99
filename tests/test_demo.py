"""The demo on a little of its text: every row, every file, and what the table must show."""

from __future__ import annotations

import json

import pytest

from gemq.checkpoint_summary import summarize
from gemq.cli.run import run
from gemq.demo.run import ASSETS, DemoConfig, run_demo
from gemq.loading import load_tokenizer


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory):
    return run_demo(DemoConfig(tmp_path_factory.mktemp("demo"), budgets=(2.0, 1.5), windows=12, samples=8))


def test_every_method_and_budget_is_in_the_table(result) -> None:
    methods = [(r.method, r.bits) for r in result.rows]
    expected = [("FP", None), ("FP, routers tuned", None)]
    expected += [(m, b) for m in ("uniform", "PMQ", "GEMQ, paper", "GEMQ", "GEMQ + routers") for b in (2.0, 1.5)]
    assert methods == expected
    saved = json.loads((result.picture.parent / "table.json").read_text())
    assert [r["perplexity"] for r in saved] == [r.perplexity for r in result.rows]


def test_the_checkpoint_scores_what_the_model_in_memory_scored(result) -> None:
    in_memory = next(r for r in result.rows if (r.method, r.bits) == ("GEMQ + routers", 1.5))
    # what stays unquantized went through bfloat16
    assert result.packed_perplexity == pytest.approx(in_memory.perplexity, rel=5e-3)


def test_sizes_are_what_the_bits_say(result) -> None:
    for budget, folder in result.checkpoints.items():
        summary = summarize(folder)
        row = next(r for r in result.rows if (r.method, r.bits) == ("GEMQ + routers", budget))
        assert summary.tensor_bytes == pytest.approx(row.bytes, rel=1e-6)
        assert summary.file_bytes == pytest.approx(row.bytes, rel=0.02)
        assert summary.expert_bits <= budget


def test_the_last_row_is_what_the_plain_command_gives(result, tmp_path) -> None:
    """README's table is of the defaults: the demo's checkpoints are those of the command, to the byte."""
    arguments = ["quantize", str(ASSETS / "model"), "-o", str(tmp_path / "out"), "--bits", "2,1.5", "--samples", "8",
                 "--length", "256", "--calibration", str(ASSETS / "text" / "calibration.txt")]
    assert run([*arguments, "-q"]) == 0
    for budget, folder in result.checkpoints.items():
        for name in ("model.safetensors", "config.json"):
            made = tmp_path / "out" / f"{budget:g}" / name
            assert made.read_bytes() == (folder / name).read_bytes(), (budget, name)


def test_picture_and_text_are_there(result) -> None:
    assert result.picture.read_bytes().startswith(b"\x89PNG") and result.picture.stat().st_size > 5000
    assert result.generation.new_tokens > 10 and len(result.generation.text.split()) > 5


def test_quantization_costs_and_global_allocation_pays(result) -> None:
    found = {(r.method, r.bits): r.perplexity for r in result.rows}
    assert found["FP", None] < found["GEMQ", 2.0] < found["GEMQ", 1.5]
    assert found["GEMQ", 1.5] < found["uniform", 1.5]


def test_the_assets_hold_real_text() -> None:
    tokenizer = load_tokenizer(str(ASSETS / "model"))
    for name in ("calibration", "heldout"):
        text = (ASSETS / "text" / f"{name}.txt").read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer(text[:500])["input_ids"]).strip() == text[:500].strip()
