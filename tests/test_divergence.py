"""KL divergence from a reference: against numpy on the same logits, from a file as from a model, at the terminal."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from tiny_models import random_windows, tiny_model

import gemq
from gemq.algorithms.divergence import Positions, counted, divergence, window_logits
from gemq.algorithms.perplexity import perplexity
from gemq.errors import CheckpointError, GemqError
from gemq.evaluations import DIVERGENCE, read_evaluations
from gemq.logits_file import save_logits, stored_logits


def by_numpy(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    q, p = (x.double().numpy().reshape(-1, x.shape[-1]) for x in (logits, reference))
    q, p = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (q, p))
    each = (np.exp(p) * (p - q)).sum(1)
    at = np.arange(len(p)), labels.numpy().ravel()
    return {
        "mean": each.mean(), "median": np.median(each), "p99": np.quantile(each, 0.99),
        "p999": np.quantile(each, 0.999), "largest": each.max(), "same_top": (q.argmax(1) == p.argmax(1)).mean(),
        "probability": math.sqrt(((np.exp(q[at]) - np.exp(p[at])) ** 2).mean()),
        "perplexity": math.exp(-q[at].mean()), "reference_perplexity": math.exp(-p[at].mean()), "tokens": len(each),
    }


@pytest.mark.parametrize("half", [False, True])
def test_the_statistics(half, monkeypatch):
    """On two models that differ, a few positions at a time."""
    monkeypatch.setattr("gemq.algorithms.divergence._AT_ONCE", 96 * 7)
    one, other = (tiny_model("mixtral", seed=seed) for seed in (0, 1))
    windows, where = random_windows(5, 24), counted(24, half)
    found, losses = divergence(one, lambda a, b: window_logits(other, windows[a:b], where), windows, 2, half)
    with torch.no_grad():
        logits, reference = (window_logits(m, windows, where) for m in (one, other))
    wanted = by_numpy(logits, reference, windows[:, 1:][:, where])
    assert found.tokens == 5 * (11 if half else 23)
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    # of all positions, whichever are compared
    assert losses.perplexity() == perplexity(one, windows, 2) and losses.seconds > 0
    if not half:
        assert found.perplexity == pytest.approx(perplexity(one, windows), rel=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_a_model_runs_once_a_batch(half, text_file, tokenizer):
    """With a reference as without: the same perplexity, and no window twice."""
    one, other = (tiny_model("mixtral", seed=seed) for seed in (0, 1))
    options = {"length": 16, "limit": 5, "batch_size": 2, "tokenizer": tokenizer, "device": "cpu"}
    alone = gemq.evaluate(one, str(text_file), **options)
    calls = []
    one.register_forward_pre_hook(lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    both = gemq.evaluate(one, str(text_file), reference=other, second_half=half, **options)
    assert calls == [2, 2, 1]
    assert both.perplexity == alone.perplexity and both.tokens == alone.tokens == 75
    assert both.divergence.tokens == (35 if half else 75)


def test_the_same_model_diverges_by_nothing():
    model, windows = tiny_model("qwen2_moe"), random_windows(3, 16)
    found, _ = divergence(model, lambda a, b: window_logits(model, windows[a:b], counted(16, False)), windows)
    assert found.mean == found.largest == found.probability == 0 and found.same_top == found.ratio == 1


def test_excluded_tokens_count_as_nothing_and_nan_is_an_error():
    logits = torch.randn(1, 4, 9)
    reference = logits.clone()
    reference[..., 3] = -math.inf
    found = Positions()
    found.add(logits, reference, torch.zeros(1, 4, dtype=torch.long))
    assert 0 < found.summary().mean < 1
    found.add(torch.full((1, 1, 9), math.nan), reference[:, :1], torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(GemqError, match="divergence of position 5 is not finite"):
        found.summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_what_the_model_gives(tmp_path, dtype):
    model, reference = tiny_model("mixtral"), tiny_model("mixtral", seed=1).to(dtype)
    windows, file = random_windows(5, 16), tmp_path / "base.logits"
    save_logits(reference, windows, file, batch_size=2)
    assert list(tmp_path.iterdir()) == [file]
    direct, _ = divergence(model, lambda a, b: window_logits(reference, windows[a:b], counted(16, False)), windows, 2)
    assert divergence(model, stored_logits(file, windows), windows, 2)[0] == direct
    with pytest.raises(CheckpointError, match="was made of other windows"):
        stored_logits(file, windows + 1)
    with pytest.raises(CheckpointError, match=r"holds 15 positions of a window, 7 are compared"):
        stored_logits(file, windows, second_half=True)
    with pytest.raises(ValueError, match="other vocabularies or windows"):
        divergence(model, lambda a, b: torch.zeros(b - a, 15, 40), windows)


def test_a_write_that_fails_leaves_no_file(tmp_path):
    model, windows = tiny_model("mixtral"), random_windows(3, 16)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_logits(model, windows, tmp_path / "x", batch_size=1, progress=fail)
    assert not list(tmp_path.iterdir())


def test_at_the_terminal(gemq_run, quick, model_folder, text_file, tmp_path):
    """Together, from a file, recorded with the checkpoint and shown in its card."""
    folder = tmp_path / "packed"
    assert gemq_run("quantize", model_folder, "-o", folder, "--method", "uniform", "--bits", "2", *quick,
                    "--no-tune-routers", "-q")[0] == 0
    text = ["--data", text_file, "--length", "32", "--limit", "4"]
    code, out, _ = gemq_run("eval", folder, *text, "--reference", model_folder, "--json", "--record")
    found = json.loads(out)["divergence"]
    assert code == 0 and found["mean"] > 0 and found["tokens"] == 4 * 31 and 0 < found["same_top"] <= 1
    (score,) = read_evaluations(folder)
    assert score.divergence == {name: found[name] for name in DIVERGENCE} and score.reference == model_folder.name
    assert f"{found['mean']:.5f}" in (folder / "README.md").read_text()
    assert gemq_run("eval", model_folder, *text, "--save-logits", tmp_path / "base")[0] == 0
    code, out, _ = gemq_run("eval", folder, *text, "--reference", tmp_path / "base", "--json")
    assert code == 0 and json.loads(out)["divergence"]["mean"] == pytest.approx(found["mean"], rel=1e-6)
    code, out, _ = gemq_run("eval", folder, *text, "--reference", model_folder)
    assert code == 0 and "mean" in out and "99.9%" in out
    code, _, err = gemq_run("eval", folder, *text, "--reference", text_file)
    assert code and "error: " in err and "Traceback" not in err


def test_another_tokenizer(model_folder, tmp_path, text_file):
    other = shutil.copytree(model_folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[5:7]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="makes other tokens of"):
        gemq.evaluate(str(model_folder), str(text_file), length=32, limit=4, reference=str(other))
