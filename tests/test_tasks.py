"""Tasks of the lm-evaluation-harness on a packed model, from local files."""

from __future__ import annotations

import json
import random

import pytest
import torch
from packed_models import quantized
from tiny_text import WORDS

from gemq import tasks
from gemq.errors import CalibrationError

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path):
    """A folder with one multiple-choice task of twelve questions, and the questions."""
    drawn = random.Random(0)
    questions = [
        {"question": " ".join(drawn.choices(WORDS, k=6)), "choices": drawn.choices(WORDS, k=3), "answer": i % 3}
        for i in range(12)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(path=tmp_path / "questions.jsonl"))
    return tmp_path / "tasks", questions


def expected(model, tokenizer, questions) -> float:
    """Accuracy by hand: the choice with the highest probability after the question."""
    right = 0
    for q in questions:
        ids = tokenizer(q["question"], return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        own = [float(scores[tokenizer(c, add_special_tokens=False).input_ids[0]]) for c in q["choices"]]
        right += own.index(max(own)) == q["answer"]
    return right / len(questions)


@pytest.mark.filterwarnings("ignore")  # the harness' own
def test_a_packed_model_is_scored_as_by_hand(task, tokenizer, monkeypatch, tmp_path) -> None:
    pytest.importorskip("lm_eval", reason="the extra gemq[eval] is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, questions = task
    packed = quantized("mixtral", 2.5, tune=False).packed
    found = tasks.evaluate_tasks(packed, tokenizer, ["tiny_choice"], task_folder=folder, batch_size=4)
    assert found["tiny_choice"]["acc"] == pytest.approx(expected(packed, tokenizer, questions))
    assert 0 < found["tiny_choice"]["acc"] < 1
    few = tasks.evaluate_tasks(packed, tokenizer, ["tiny_choice"], task_folder=folder, limit=5)
    assert few["tiny_choice"]["acc"] == pytest.approx(expected(packed, tokenizer, questions[:5]))
    with pytest.raises(CalibrationError, match="has no task no_such"):
        tasks.evaluate_tasks(packed, tokenizer, ["no_such"], task_folder=folder)


def test_without_the_harness_one_line_says_what_to_install(task, tokenizer, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CalibrationError, match=r"pip install 'gemq\[eval\]'"):
        tasks.evaluate_tasks(torch.nn.Linear(1, 1), tokenizer, ["x"], task_folder=task[0])


@pytest.mark.parametrize("given, message", [
    ({"tasks": []}, r"tasks must be a list of task names, at least one, got \[\]"),
    ({"tasks": "arc_easy"}, "tasks must be a list of task names, at least one, got 'arc_easy'"),
    ({"tasks": ["x"], "limit": 0}, "limit must be at least 1, got 0"),
    ({"tasks": ["x"], "batch_size": -1}, "batch_size must be at least 1, got -1"),
    ({"tasks": ["x"], "task_folder": "/no/such/folder"}, "no folder of tasks '/no/such/folder'"),
])  # fmt: skip
def test_bad_arguments(given, message, tokenizer) -> None:
    with pytest.raises((ValueError, CalibrationError), match=message):
        tasks.evaluate_tasks(torch.nn.Linear(1, 1), tokenizer, **given)
