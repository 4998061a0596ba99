"""16-bit export: transformers without gemq loads the dequantized weights, whatever the family."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from packed_models import logits, quantized, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gemq
from gemq.algorithms.given_allocation import GivenAllocation
from gemq.checkpoint import save_packed
from gemq.cli.run import run
from gemq.errors import CheckpointError
from gemq.integrity import INDEX_FILE, WEIGHTS_FILE, weight_files
from gemq.interchange import export
from gemq.models import packed_modules
from gemq.nn import LowBitExperts
from gemq.shards import ShardWriter, parse_size
from gemq.staging import new_folder

# every width, none included; the families whose structure differs
WIDTHS = GivenAllocation("widths", ((0, 1, 3, 2), (5, 8, 4, 0)))
FAMILIES = ("mixtral", "deepseek_v2_groups", "qwen2_moe", "glm4_moe", "qwen3_next")


def given(family):
    return quantized(family, budget=8, given=WIDTHS, shared_bits=3 if family != "mixtral" else None, tune=False)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    made = given("mixtral")
    path = tmp_path_factory.mktemp("export") / "packed"
    return save_packed(made.packed, made.config, path, dtype=torch.bfloat16, tokenizer=tokenizer)


def dense_weights(packed):
    """Weights of the packed modules as float32, by module path and name."""
    found = {}
    for path, module in packed_modules(packed):
        if isinstance(module, LowBitExperts):
            found |= {f"{path}.{name}": module.dense(name) for name in ("gate_up_proj", "down_proj")}
        else:
            found[f"{path}.weight"] = module.weight()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_the_dequantized_weights(family, tmp_path):
    made = given(family)
    source = save_packed(made.packed, made.config, tmp_path / "packed", dtype=torch.bfloat16)
    done = export(source, tmp_path / "dense")
    config = json.loads((done.path / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16" and done.dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(done.path)
    plain, expected = loaded.state_dict(), dense_weights(made.packed)
    assert expected
    for name, weight in expected.items():
        assert torch.equal(plain[name], weight.bfloat16()), name
    for name, tensor in made.packed.state_dict().items():
        if name in plain:
            assert torch.equal(plain[name].float(), tensor.to(plain[name].dtype).float()), name
    assert set(plain) == set(made.dense.state_dict())


def test_a_process_without_gemq_computes_the_same(checkpoint, tmp_path):
    done = export(checkpoint, tmp_path / "dense", dtype=torch.float16)
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(5))\n"
        "torch.save(model(input_ids=ids, use_cache=False).logits.detach(), sys.argv[2])\n"
        "assert len(AutoTokenizer.from_pretrained(sys.argv[1])) == 96\n"
        "assert 'gemq' not in sys.modules\n"
    )
    # an empty path entry for gemq's name shows that nothing tries
    (tmp_path / "gemq.py").write_text("raise RuntimeError('imported')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", program, str(done.path),
                          str(tmp_path / "logits.pt")], env=environment, capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    expected = logits(gemq.from_pretrained(checkpoint, dtype=torch.float32))
    assert relative_error(torch.load(tmp_path / "logits.pt"), expected) < 1e-3  # float16 weights: 2 ** -11 each


def test_shards_and_their_index(checkpoint, tmp_path):
    whole = export(checkpoint, tmp_path / "whole")
    steps = []
    parts = export(checkpoint, tmp_path / "parts", shard_bytes=40_000, progress=lambda *step: steps.append(step))
    files = weight_files(parts.path)
    assert len(files) > 3 and [f.name for f in weight_files(whole.path)] == [WEIGHTS_FILE]
    assert all(f.stat().st_size < 60_000 for f in files)
    together = {}
    for file in files:
        together |= load_file(file)
    single = load_file(whole.path / WEIGHTS_FILE)
    assert set(single) == set(together) and all(torch.equal(single[k], together[k]) for k in single)
    index = json.loads((parts.path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == parts.bytes == sum(t.nbytes for t in single.values())
    assert parts.tensors == len(single) and steps[-1][0] == steps[-1][1] == len(steps)
    assert not any(p.name.startswith((".", "gemq_")) for p in parts.path.iterdir())


def test_what_lies_beside_the_weights_comes_along(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "packed")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "README.md").write_text("a card of the packed model")
    names = {p.name for p in export(source, tmp_path / "dense").path.iterdir()}
    assert {"tokenizer.json", "generation_config.json", "additional_chat_templates", "config.json"} <= names
    assert "README.md" not in names and not any(name.startswith("gemq_") for name in names)


def test_what_is_refused(checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        export(checkpoint, tmp_path / "full")
    with pytest.raises(CheckpointError, match="is the model itself"):
        export(checkpoint, checkpoint)
    with pytest.raises(ValueError, match="dtype must be auto, float16 or bfloat16, got float32"):
        export(checkpoint, tmp_path / "out", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="not a gemq checkpoint"):
        export(export(checkpoint, tmp_path / "dense").path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "full"]


def test_a_checkpoint_that_does_not_fit_writes_nothing(checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS_FILE)
    name = "model.layers.0.block_sparse_moe.experts.gate_up_codes"
    save_file({**tensors, name: tensors[name][:-1].clone()}, broken / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} has shape"):
        export(broken, tmp_path / "out")
    # a scale that float16 holds, and a weight that it does not
    meta = name.replace("codes", "meta")
    tensors[meta][-2] = 60000.0
    save_file(tensors, broken / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mlp.experts.gate_up_proj has weights that are not finite in float16"):
        export(broken, tmp_path / "out", dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_the_command(checkpoint, tmp_path, capsys):
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "dense"), "--shard-size", "50KB"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").dtype == torch.bfloat16
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "dense")]) == 2
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "more"), "--shard-size", "5XB"]) == 2
    assert "a shard's size must be like 5GB" in capsys.readouterr().err


# writing


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("whole")
        assert not (tmp_path / "a").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]


def test_the_writer_refuses_names_twice(tmp_path):
    for size in (1, 10**6):
        writer = ShardWriter(tmp_path, size)
        writer.add("a", torch.ones(3))
        writer.add("b", torch.ones(3))
        with pytest.raises(ValueError, match="the tensor a comes twice"):
            writer.add("a", torch.ones(3))
    with pytest.raises(ValueError, match="shard_bytes must be at least 1"):
        ShardWriter(tmp_path, 0)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("30kb", 30_000), (" 2MB ", 2 * 10**6), ("9B", 9)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.5GB", "5BB", "5GBB", "5TB", "0", "GB5"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="a shard's size must be like 5GB"):
        parse_size(text)
