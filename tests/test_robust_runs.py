"""Runs that meet hostile templates, full disks, odd names and ids out of range: one clear error."""

from __future__ import annotations

import copy
import os
import resource
import time
from contextlib import contextmanager

import pytest
import torch
from hostile_checkpoints import a_folder, a_gemq_run, a_made, a_saved, a_sharded  # noqa: F401
from safetensors.torch import load_file, save_file
from stacks import random_stack
from tiny_models import tiny_model

import gemq
from gemq import ops
from gemq.algorithms import conversations
from gemq.checkpoint import check_output, save_packed
from gemq.errors import CheckpointError
from gemq.generation.chat import render
from gemq.integrity import WEIGHTS_FILE
from gemq.models import packed_modules
from gemq.time_limit import TimeLimitError, time_limit


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0]['content'].nothing.at.all }}",
        "{% if",
    ],
)
def test_a_chat_template_cannot_reach_python(tokenizer, template):
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = template
    with pytest.raises(CheckpointError, match="chat template of the tokenizer failed"):
        render(mine, [{"role": "user", "content": "it"}])


LOOP = "{% for i in range(90000) %}"


@pytest.mark.parametrize("template", [
    LOOP * 3 + "{% endfor %}" * 3, LOOP * 2 + "x{% endfor %}{% endfor %}", LOOP + "{{ messages | tojson }}" * 9
    + "{% endfor %}" + LOOP + LOOP + "{% endfor %}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}", "{% set x = 7 %}{{ x **x**x**x }}", "{{ (10**9)**(10 ** 9) }}",
])  # fmt: skip
@pytest.mark.timeout(60)
def test_a_chat_template_that_never_ends(tokenizer, template, monkeypatch):
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = template
    monkeypatch.setattr(conversations, "SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"took more than 0\.3 seconds|raises to a power"):
        render(mine, [{"role": "user", "content": "it"}])
    assert time.monotonic() - started < 10
    # the next one is not interrupted
    mine.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ dict(**{'a': 1}).a }}"
    time.sleep(0.4)
    assert render(mine, [{"role": "user", "content": "it"}] * 3) == "ititit1"


def test_time_limits_in_threads():
    """In a thread of its own, and where the block ends in time."""
    from concurrent.futures import ThreadPoolExecutor

    def spin(seconds, limit):
        end = time.monotonic() + seconds
        try:
            with time_limit(limit):
                while time.monotonic() < end:
                    pass
        except TimeLimitError:
            return "interrupted"
        return "ended"

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(spin, [0.02, 5.0, 0.02, 5.0], [5.0, 0.1, 5.0, 0.1]))
    assert found == ["ended", "interrupted"] * 2
    for _ in range(200):
        # limit and end fall together: either, and never later
        assert spin(0.002, 0.002) in ("ended", "interrupted")
    time.sleep(0.05)


# output


@contextmanager
def no_file_above(size):
    """Writing beyond ``size`` bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_in_the_middle_of_the_weights(made, folder, tmp_path, size):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with no_file_above(size), pytest.raises((CheckpointError, OSError), match=r"could not be written|too large"):
        save_packed(made.packed, made.config, folder, overwrite=True)
    with no_file_above(size), pytest.raises((CheckpointError, OSError)):
        save_packed(made.packed, made.config, tmp_path / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_at_the_terminal(gemq_run, model_folder, text_file, tmp_path):
    quick = ["--calibration", text_file, "--samples", 2, "--length", 16, "--bits", 2, "--method", "uniform"]
    with no_file_above(20_000):
        code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--no-tune-routers", *quick)
    assert (code, out) == (2, "")
    assert "could not be written" in err[-1] and "internal" not in err[-1]
    # no checkpoint, only what the same command continues from
    assert os.listdir(tmp_path) == ["out.run"]


def test_an_output_that_may_not_be_written(tmp_path, monkeypatch):
    """Also for root, to whom a folder's mode says nothing but a file system that is mounted read-only does."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    with pytest.raises(CheckpointError, match=rf"cannot be written: {tmp_path} is not a writable folder"):
        check_output(tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_output(tmp_path / "a" / "b" / "out")


# at the terminal


def test_names_in_errors_are_escaped(gemq_run, folder):
    """Markup, colours, cursor movements and line ends of a stranger's tensor name."""
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "[red]a[/red]\x1b[2J\x1b]0;title\x07\r\nerror: b\u202e" + "x" * 5000
    tensors[name] = torch.zeros(3)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    code, out, err = gemq_run("eval", folder, "--data", folder / "config.json", "--length", 2)
    assert (code, out) == (2, "")
    code, out, err = gemq_run("generate", folder, "it")
    assert (code, out, len(err)) == (2, "", 1)
    with pytest.raises(CheckpointError):
        gemq.from_pretrained(folder)


def test_an_error_is_one_printable_line_of_bounded_length(capsys):
    from gemq.cli.run import _fail

    _fail("the tensor [red]a[/red]\x1b[2J\x1b]0;title\x07\u202e " + "x" * 100_000 + " is missing")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(r"error: the tensor [red]a[/red]\x1b[2J\x1b]0;title\x07\u202e xxx")
    assert line.endswith("xxx is missing") and len(line) < 2100 and line.isprintable()


# expert ids, and debug mode

STACK = random_stack((2, 0, 3), 64, 64, 32, "cpu_tile", 0)
OUTSIDE = [-1, 3, 4, -(2**31), 2**31 - 1]


@pytest.fixture
def debug():
    ops.set_debug(True)
    yield
    ops.set_debug(False)


def products(layout, ids):
    """Both products with experts on the ids."""
    stack, x, weights = random_stack((2, 0, 3), 64, 64, 32, layout, 0), torch.ones(len(ids), 64), torch.ones(ids.shape)
    down = random_stack((2, 0, 3), 64, 32, 32, layout, 1)
    return (
        lambda: ops.moe_lowbit_gemm(x, *stack, ids, weights, n=64, group_size=32, layout=layout),
        lambda: ops.moe_lowbit_ffn(x, stack, down, ids, weights, intermediate=32, group_size=32, layout=layout),
    )


@pytest.mark.parametrize("layout", ["canonical", "cpu_tile"])
@pytest.mark.parametrize("bad", OUTSIDE)
def test_debug_mode_raises_on_ids_outside(layout, bad, debug):
    ids = torch.tensor([[0, 2], [1, bad], [bad, 0]])
    for call in products(layout, ids):
        with pytest.raises(ValueError, match=rf"topk_ids\[1, 1\] is {bad}, but the experts are 0\.\.2: 2 of 6 ids"):
            call()
        ops.set_debug(False)
        assert torch.isfinite(call()).all()
        ops.set_debug(True)
    for call in products(layout, ids.clamp(0, 2)):
        call()


def test_debug_mode_reaches_modules(made, debug):
    """They call their kernels without the op."""
    experts = next(module for _, module in packed_modules(made.packed) if hasattr(module, "num_experts"))
    x, weights = torch.ones(2, experts.hidden), torch.ones(2, 2)
    with torch.no_grad():
        experts(x, torch.tensor([[0, 1], [2, 3]]), weights)
        with pytest.raises(ValueError, match=r"topk_ids\[1, 0\] is 4, but the experts are 0\.\.3"):
            experts(x, torch.tensor([[0, 1], [4, 3]]), weights)


# more than 2^31 packed elements


@pytest.mark.parametrize("layout", ["canonical", "cpu_tile"])
@pytest.mark.parametrize("at", [2**31 - 64, 2**32 + 64])
def test_experts_beyond_32_bits(layout, at):
    """An expert whose codes begin beyond what 32 bits count. Memory that is not touched is not taken."""
    small = random_stack((3,), 64, 64, 32, layout, 1)
    qweight, size = torch.empty(at + small[0].numel(), dtype=torch.uint8), small[0].numel()
    qweight[at:] = small[0]
    meta_at = at // 2
    meta = torch.empty(meta_at + small[1].numel(), dtype=torch.float16)
    meta[meta_at:] = small[1]
    assert qweight.numel() == at + size
    tables = (torch.tensor([3], dtype=torch.int32), torch.tensor([at]), torch.tensor([meta_at]))
    x, ids = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1, dtype=torch.int64)
    options = {"n": 64, "group_size": 32, "layout": layout}
    got = ops.moe_lowbit_gemm(x, qweight, meta, *tables, ids, **options)
    assert torch.equal(got, ops.moe_lowbit_gemm(x, *small, ids, **options)) and got.any()


def test_a_full_precision_tiny_model_still_saves(tmp_path):
    """The limit of :func:`no_file_above` is lifted again."""
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / WEIGHTS_FILE).stat().st_size > 20_000
