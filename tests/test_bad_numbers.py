"""NaN, infinity and numbers out of range: found where they enter, named, and never written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from packed_models import quantized
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model

from gemq.algorithms import router_tuning
from gemq.algorithms.layer_costs import LayerCosts
from gemq.checkpoint import save_packed
from gemq.engine.disk_source import DiskSource
from gemq.engine.numbers import Numbers
from gemq.errors import CheckpointError, NumberError
from gemq.integrity import WEIGHTS_FILE, read_header
from gemq.interchange import export
from gemq.loading import check_model

BAD = [float("nan"), float("inf"), -float("inf")]


def put(folder, name, value, at=-1):
    """Put one number into a tensor of a folder of one file."""
    tensors = load_file(folder / WEIGHTS_FILE)
    flat = tensors[name].flatten()
    flat[at] = value
    tensors[name] = flat.view(tensors[name].shape)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read(folder):
    source = DiskSource(str(folder), check_model(str(folder)), torch.float32, torch.device("cpu"))
    return source.watch.read(numbers=source.numbers())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family(family, tmp_path):
    """One tensor at a time holds a bad number, quantized or not; each is named with its file."""
    folder = tmp_path / "model"
    model = tiny_model(family)
    # what a model keeps in float32 is part of a 16-bit one
    model.to(torch.bfloat16).save_pretrained(folder)
    read(folder)
    whole = (folder / WEIGHTS_FILE).read_bytes()
    for turn, name in enumerate(sorted(load_file(folder / WEIGHTS_FILE))):
        put(folder, name, BAD[turn % 3], at=[0, -1][turn % 2])
        with pytest.raises(CheckpointError) as raised:
            read(folder)
        message = str(raised.value)
        assert f"the tensor {name} " in message and WEIGHTS_FILE in message, message
        assert ("NaN" if turn % 3 == 0 else "infinity") in message
        (folder / WEIGHTS_FILE).write_bytes(whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [0, 7, 100_000, 999_999])
def test_places_in_a_large_tensor(tmp_path, dtype, at):
    """Across the pieces in which a file is read."""
    file = tmp_path / WEIGHTS_FILE
    value = torch.zeros(1_000_000, dtype=dtype)
    value[at] = float("nan")
    save_file({"a": torch.ones(3, dtype=torch.float16), "b": value, "c": torch.ones(5)}, file)
    numbers = Numbers({file: read_header(file)}, lambda name: torch.float32)
    message = rf"tensor b of .* holds NaN at index {at:,}:"
    with file.open("rb") as handle, pytest.raises(CheckpointError, match=message):
        numbers.read(file, handle)


def test_the_sum_is_that_of_the_file(tmp_path):
    import hashlib

    file = tmp_path / WEIGHTS_FILE
    save_file({"a": torch.randn(700_000), "b": torch.arange(9), "e": torch.ones(0)}, file, metadata={"format": "pt"})
    numbers = Numbers({file: read_header(file)}, lambda name: torch.float32)
    with file.open("rb") as handle:
        assert numbers.read(file, handle) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("stored, name, value, message", [
    ("float32", "model.norm.weight", 3.4e38, "beyond 3.38953e.38, the largest number of bfloat16"),
    ("float16", "model.norm.weight", 1e5, "beyond 65504, the largest number of float16"),
    ("float16", "model.embed_tokens.weight", -7e4, "beyond 65504"),
    ("float32", "model.layers.0.self_attn.q_proj.weight", 1e6, "beyond 65504, the largest number of float16"),
    ("float32", "model.layers.1.mlp.experts.2.down_proj.weight", 1e6, "beyond 65504"),
])  # fmt: skip
def test_what_16_bits_do_not_hold(tmp_path, stored, name, value, message):
    """After rounding; scales and offsets are float16."""
    folder = tmp_path / "model"
    tiny_model("qwen3_moe").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": stored}
    (folder / "config.json").write_text(json.dumps(config))
    read(folder)
    put(folder, name, value)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_tensors_that_are_not_used_may_hold_anything(tmp_path):
    folder = tmp_path / "model"
    tiny_model("mixtral").save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors | {"mtp.x": torch.full((3,), float("nan"))}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    read(folder)


@pytest.mark.parametrize("stream", ["--keep=layer", "--keep=model"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"])
def test_at_the_terminal_before_any_work(gemq_run, model_folder, quick, tmp_path, stream, name):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    put(folder, name, float("nan"))
    code, out, err = gemq_run("quantize", folder, "-o", tmp_path / "out", "--bits", "2", *quick, stream)
    assert (code, out) == (2, "") and name in err and "Traceback" not in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run" / "stages").exists()


def test_coefficients_that_overflow():
    costs = LayerCosts.zeros(3, 2, matrices=True)
    costs.check(4)
    for name in ("routed", "error", "shared", "matrices"):
        value = getattr(costs, name).copy()
        getattr(costs, name).flat[1] = np.inf if name == "error" else np.nan
        with pytest.raises(NumberError, match=rf"coefficients of decoder layer 4 are not finite \({name}\)"):
            costs.check(4)
        setattr(costs, name, value)


def test_a_model_that_overflows(gemq_run, model_folder, quick, tmp_path):
    """Weights that are finite, activations that are not: an error that says where, and no checkpoint."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(folder / WEIGHTS_FILE)
    for name in tensors:
        if "experts" in name:
            tensors[name] = torch.full_like(tensors[name], 3e4)
        elif name.endswith("norm.weight"):
            tensors[name] = torch.full_like(tensors[name], 1e15)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    for stream in ("--keep=layer", "--keep=model"):
        code, out, err = gemq_run("quantize", folder, "-o", tmp_path / "out", "--bits", "2", *quick, stream)
        assert (code, out) == (2, "") and "not finite" in err, err
        assert not (tmp_path / "out").exists()


def test_routers_whose_loss_is_lost(gemq_run, model_folder, quick, tmp_path, monkeypatch):
    losses = router_tuning._accumulate
    monkeypatch.setattr(router_tuning, "_accumulate", lambda *given: losses(*given) * float("inf"))
    for stream in ("--keep=layer", "--keep=model"):
        code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--bits", "2", *quick, stream)
        assert (code, out) == (2, "") and "tuning the routers" in err and "router_lr" in " ".join(err.split()), err
        assert not (tmp_path / "out").exists()


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    made = quantized("mixtral", tune=False)
    packed = made.packed
    weight = packed.model.norm.weight
    before = weight.detach().clone()
    try:
        weight.data[3] = float("inf")
        with pytest.raises(NumberError, match=r"model\.norm\.weight is not finite"):
            save_packed(packed, made.config, tmp_path / "out")
    finally:
        weight.data.copy_(before)
    assert not list(tmp_path.iterdir())


def test_nothing_that_is_not_finite_is_exported(tmp_path):
    made = quantized("mixtral", tune=False)
    folder = save_packed(made.packed, made.config, tmp_path / "packed")
    put(folder, "model.norm.weight", float("nan"))
    with pytest.raises(NumberError, match=r"model\.norm\.weight is not finite"):
        export(folder, tmp_path / "plain")
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_evaluating_such_a_model_says_so(gemq_run, tmp_path, tokenizer, text_file):
    made = quantized("mixtral", tune=False)
    folder = save_packed(made.packed, made.config, tmp_path / "packed", tokenizer=tokenizer)
    put(folder, "model.norm.weight", float("nan"))
    code, out, err = gemq_run("eval", folder, "--data", text_file, "--length", 16, "--limit", 2, "--record", "--json")
    assert (code, out) == (2, "") and ("NaN" in err or "nan" in err or "not finite" in err)
    assert not (folder / "gemq_evaluations.json").exists()
