"""The comparison of ``make serve-check``: what it calls a difference, and what it asks of the server."""

from __future__ import annotations

import copy
import json

import pytest
import serve_check
import serve_compare
import serve_environment
import serve_http
import torch
from serve_models import FAMILIES, checkpoint, prompts, reference

from gemq.checkpoint import load_packed_config


def own(tokens=(2, 0, 1)):
    """gemq's answers to two prompts."""
    choices = [[-3.0, -2.0, -0.5], [-0.1, -4.0, -0.1004], [-2.0, -0.3, -5.0]]
    one = {"tokens": list(tokens), "logprobs": [c[t] for c, t in zip(choices, tokens, strict=True)],
           "prompt_logprobs": [-1.0, -2.0], "choices": choices}  # fmt: skip
    return [one, copy.deepcopy(one)]


def row(change=None, limit=1e-3, exact=True):
    theirs = [{name: list(answer[name]) for name in ("tokens", "logprobs", "prompt_logprobs")} for answer in own()]
    again = copy.deepcopy(theirs)
    for answer in again:
        answer["prompt_logprobs"] = []
    if change:
        change(theirs, again)
    return serve_compare.compared([theirs, again], own(), limit, exact)


def test_equal_answers_are_the_same():
    assert row() == {"tokens": 12, "of": 12, "prompt": 0.0, "new": 0.0, "mean": 0.0, "allowed": 1e-3, "same": True}


@pytest.mark.parametrize("change", [
    lambda first, again: first[1]["prompt_logprobs"].__setitem__(0, -1.01),
    lambda first, again: first[0]["logprobs"].__setitem__(2, -0.31),
    lambda first, again: again[1]["logprobs"].__setitem__(0, -0.4),
    # another token where gemq's own are far apart
    lambda first, again: again[0]["tokens"].__setitem__(0, 0),
    lambda first, again: [answer["prompt_logprobs"].clear() for answer in first],
])  # fmt: skip
def test_differences(change):
    assert not row(change)["same"]


def test_another_token_at_a_near_tie_is_no_difference():
    def change(first, again):
        first[0]["tokens"][1:] = [2, 2]
        first[0]["logprobs"][1:] = [-0.1, -9.0]  # another text from there on

    found = row(change)
    assert found["same"] and found["tokens"] == 10 and found["new"] == pytest.approx(4e-4)


def test_sixteen_bits_are_judged_by_the_mean():
    def change(first, again):
        first[0]["prompt_logprobs"][0] = -1.5  # one of 16 distances

    assert row(change, 0.5 / 15, exact=False)["same"] and not row(change, 0.5 / 17, exact=False)["same"]
    ours = own()
    ours[0]["prompt_logprobs"] = [-1.1, -2.0]
    assert serve_compare.allowed("bfloat16", own(), ours) == pytest.approx(2 * 0.1 / 4)
    assert serve_compare.allowed("float32", own(), ours) == 1e-3


def test_rows_are_printed_under_their_heading():
    head = {"way": "eager", "family": "deepseek_v2_groups", "dtype": "bfloat16", "streams": 8}
    good = serve_compare.line(head | row())
    assert good.endswith("same") and serve_compare.HEADING.index("result") == good.index("same")
    assert "FAILED: why" in serve_compare.line(head | {"same": False, "error": "why"})


def test_requirements_of_the_wheel():
    asked = ["numpy", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "ray; extra == 'ray'", "torchvision",
             "six>=1.16; python_version > '3.11'", "mistral_common[image]>=1.11.6", "setuptools==78.1.1"]  # fmt: skip
    assert serve_environment.requirements(asked) == [
        "numpy", "six>=1.16; python_version > '3.11'", "mistral_common[image]>=1.11.6",
    ]


def test_options_as_the_program_takes_them():
    words = serve_http.arguments({"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False,
                                  "compilation_config": {"custom_ops": ["none"]}})  # fmt: skip
    assert words == ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--compilation-config",
                     '{"custom_ops": ["none"]}']  # fmt: skip


def test_jobs(tmp_path):
    assert set(serve_check.FEW) <= set(serve_check.WAYS) and set(sum(serve_check.FEW.values(), ())) <= set(FAMILIES)
    asked = prompts()
    assert len(asked) == 8 and asked[6][:32] == asked[7][:32] and asked[6] != asked[7]
    assert max(map(len, asked)) + serve_check.TOKENS <= serve_check.COMMON["max_model_len"]
    (job,) = serve_check.jobs_of("chunked", ["deepseek_v2"], ["float32"], tmp_path)
    assert job["options"]["enable_prefix_caching"] and job["options"]["compilation_config"] == {"custom_ops": ["none"]}
    # chunks that are smaller than prompts, so that prompts are cut
    assert job["options"]["max_num_batched_tokens"] < max(map(len, asked))
    (job,) = serve_check.jobs_of("eager", ["mixtral"], ["bfloat16"], tmp_path)
    assert job["fork"] and not job["options"]["enable_prefix_caching"]


def test_a_failed_job_is_a_difference(tmp_path):
    (job,) = serve_check.jobs_of("eager", ["mixtral"], ["float32"], tmp_path)
    (tmp_path / "mixtral.float32.eager.json").write_text('{"error": "no memory"}')
    (found,) = serve_check.rows_of(job, {})
    assert not found["same"] and found["error"] == "no memory"


@pytest.mark.parametrize("cached", [0, 32])
def test_a_cache_that_was_not_read_is_no_comparison(tmp_path, cached):
    (job,) = serve_check.jobs_of("chunked", ["mixtral"], ["float32"], tmp_path)
    plain = [{name: answer[name] for name in ("tokens", "logprobs", "prompt_logprobs")} for answer in own()]
    again = [answer | {"prompt_logprobs": [], "cached": cached} for answer in plain]
    found = {"1": plain, "1 again": again, "8": plain, "8 again": again}
    (tmp_path / "mixtral.float32.chunked.json").write_text(json.dumps(found))
    rows = serve_check.rows_of(job, {("mixtral", "float32"): own()})
    assert [row["same"] for row in rows] == ([True, True] if cached else [False])


@pytest.mark.parametrize("family", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_checkpoints_hold_every_width_and_answer(family, tmp_path):
    place = checkpoint(family, tmp_path)
    packed = load_packed_config(place)
    assert {w for row in packed.widths.experts.values() for w in row} == {0, 1, 2, 3, 4, 5, 8}
    made = (place / "config.json").stat().st_mtime_ns
    assert checkpoint(family, tmp_path) == place and (place / "config.json").stat().st_mtime_ns == made
    (answer,) = reference(place, prompts()[:1], 3, torch.float32)
    assert len(answer["tokens"]) == 3 and len(answer["prompt_logprobs"]) == 4 and max(answer["logprobs"]) < 0
