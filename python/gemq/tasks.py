"""Zero-shot and few-shot tasks through EleutherAI's lm-evaluation-harness, on a model that is already loaded.

Needs the extra ``gemq[eval]``. A packed model is given to the harness as it is, so what is scored is the packed
kernels' output. Tasks can be the harness' own by name (their data then comes from the hub) or YAML files of yours whose
data are local files, which need no network::

    task: tiny_choice
    dataset_path: json
    dataset_kwargs: {data_files: {test: /data/questions.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"
    metric_list: [{metric: acc}, {metric: acc_norm}]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gemq.errors import CalibrationError


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise CalibrationError(f"tasks need the lm-evaluation-harness ({error}): pip install 'gemq[eval]'") from error
    return lm_eval


def evaluate_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, task_folder: str | os.PathLike | None = None,
    limit: int | None = None, few_shot: int | None = None, batch_size: int = 8, max_length: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Scores of a loaded causal language model, by task and metric, standard errors as ``metric_stderr``.

    ``model`` is a transformers model, packed or not, on its device; ``tokenizer`` its tokenizer. ``tasks`` are names:
    with ``task_folder`` those of the YAML files in that folder alone, otherwise the harness' own. ``limit`` bounds the
    documents of a task, ``few_shot`` None leaves it to the task, ``max_length`` is in tokens.

    Raises :class:`gemq.errors.CalibrationError` if the harness is not installed or a task is not known, and
    ``ValueError`` for empty ``tasks`` or bad numbers.
    """
    if not tasks or isinstance(tasks, str):
        raise ValueError(f"tasks must be a list of task names, at least one, got {tasks!r}")
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise CalibrationError(f"no folder of tasks {os.fspath(task_folder)!r}")
    harness = _harness()
    manager = harness.tasks.TaskManager(
        include_path=None if task_folder is None else os.fspath(task_folder), include_defaults=task_folder is None
    )
    missing = sorted(set(tasks) - set(manager.all_tasks))
    if missing:
        where = "the harness" if task_folder is None else os.fspath(task_folder)
        raise CalibrationError(f"{where} has no task {', '.join(missing)}")
    wrapped = harness.models.huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
    )
    found = harness.simple_evaluate(
        model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=few_shot, bootstrap_iters=0,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, log_samples=False,
    )
    return {task: _numbers(scores) for task, scores in found["results"].items()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The harness' ``"acc,none"`` as ``acc``; what is not a number is left out."""
    return {
        name.partition(",")[0]: float(value) for name, value in scores.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in name
    }
