"""``gemq bench``: architectures, random models, baselines, what is counted and written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from gemq.bench import PUBLISHED, BenchConfig, baseline, measuring, random_model, run_bench
from gemq.bench.architectures import load_config, parameters
from gemq.bench.roofline import copy_bandwidth, expert_bytes_per_step, expert_sizes, other_bytes
from gemq.cli.run import run
from gemq.errors import CheckpointError, OutOfMemoryError, UnsupportedModelError
from gemq.generation import Decoding, GenerationOptions
from gemq.models import packed_modules, prepare

# the counts that are published with the models
BILLIONS = {"mixtral-8x7b": 46.7, "deepseek-v2-lite": 15.7, "qwen1.5-moe": 14.3, "qwen3-30b-a3b": 30.5}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """config.json of the tiny model of every family."""
    folder = tmp_path_factory.mktemp("configs")
    found = {}
    for name in FAMILIES:
        found[name] = folder / f"{name}.json"
        found[name].write_text(tiny_model(name).config.to_json_string())
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures(name):
    assert parameters(load_config(name)) / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)


def test_fewer_layers():
    config = load_config("deepseek-v2-lite", layers=3)
    assert config.num_hidden_layers == 3
    full, layer = parameters(load_config("deepseek-v2-lite")), parameters(load_config("deepseek-v2-lite", layers=4))
    assert full == parameters(config) + 24 * (layer - parameters(config))
    assert load_config("qwen1.5-moe", layers=2).layer_types == ["full_attention"] * 2
    with pytest.raises(ValueError, match=r"layers must be in 2..27 for this model, got 1"):
        load_config("deepseek-v2-lite", layers=1)
    with pytest.raises(ValueError, match=r"layers must be in 1..32 for this model, got 33"):
        load_config("mixtral-8x7b", layers=33)


def test_configs_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"must be one of mixtral-8x7b, .* or a config.json, got 'mixtral'"):
        load_config("mixtral")
    file = tmp_path / "config.json"
    for text, message in [("{", "is not valid JSON"), ("[1]", "must hold a JSON object"), ("{}", "model_type")]:
        file.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_config(str(tmp_path))
    file.write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match="'gpt2' is not supported yet"):
        load_config(str(file))


@pytest.mark.parametrize("mix, experts, counts", [
    (random_model.mix_for(2), 8, {2: 8}),
    (random_model.mix_for(2.5), 8, {2: 4, 3: 4}),
    (random_model.mix_for(1.5), 60, {1: 30, 2: 30}),
    (random_model.mix_for(2.25), 8, {2: 6, 3: 2}),
    (((1, 0.3), (2, 0.4), (3, 0.3)), 8, {1: 3, 2: 3, 3: 2}),
    (((0, 0.5), (8, 0.5)), 2, {0: 1, 8: 1}),
])  # fmt: skip
def test_widths_of_a_mix(mix, experts, counts):
    found = random_model.widths(mix, experts, seed=1)
    assert {w: found.count(w) for w in set(found)} == counts
    assert found == random_model.widths(mix, experts, seed=1)


@pytest.mark.parametrize("mix, message", [
    (((9, 1.0),), "mix: the width must be an integer in 0..8, got 9"),
    (((2, 0.5), (3, 0.4)), "must sum to 1, got 0.9"),
    (((2, 1.5), (3, -0.5)), "the share of 3 bits must be positive, got -0.5"),
    (((2, 0.5), (2, 0.5)), "shares of different widths"),
])  # fmt: skip
def test_mixes_that_are_none(mix, message):
    with pytest.raises(ValueError, match=message):
        random_model.check_mix(mix)


def packed(configs, family, bits=2.5, dtype=torch.float32, attention=4):
    config = load_config(str(configs[family]))
    plan = random_model.packed_plan(config, random_model.mix_for(bits), attention, 3)
    return random_model.build_packed(config, plan, dtype, CPU), plan


@pytest.mark.parametrize("attention", [4, 16])
def test_random_models_run(configs, family, attention):
    model, plan = packed(configs, family, attention=attention)
    assert plan.widths.bits_per_expert == 2.5
    # what a checkpoint of these widths holds, nothing on the meta device, finite logits of some spread
    assert not [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    logits = model(random_windows(2, 12)).logits
    assert logits.isfinite().all() and 0.01 < float(logits.std()) < 100
    kinds = [path for path, _ in packed_modules(model)]
    assert any("self_attn" in path for path in kinds) == (attention == 4)
    again, _ = packed(configs, family, attention=attention)
    assert torch.equal(again(random_windows(2, 12)).logits, logits)


def test_random_weights_have_the_spread_of_fresh_ones(configs):
    model, _ = packed(configs, "mixtral")
    for _, module in packed_modules(model):
        weights = [module.weight()] if hasattr(module, "weight") else module.dense("gate_up_proj").unbind()
        for weight in weights:
            assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(weight.mean())) < 0.002


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is not on the meta device."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes())
        return out


def test_no_unquantized_expert_is_ever_made(configs):
    config = load_config(str(configs["mixtral"]))
    config.intermediate_size, config.hidden_size = 512, 256
    plan = random_model.packed_plan(config, random_model.mix_for(2), 4, 4)
    with Largest() as largest:
        random_model.build_packed(config, plan, torch.bfloat16, CPU)
    stack = config.num_local_experts * 2 * config.intermediate_size * config.hidden_size
    # gate and up of a layer: 2 bits a weight and 32 a group of 128, against 16; and even one expert is smaller
    assert largest.elements <= stack * (2 + 0.25) / 8 + 1024 < 2 * stack / 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_process(tmp_path):
    """The peak of a process that builds a model whose 16-bit experts are 1 GiB."""
    config = {
        "model_type": "mixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2,
        "num_local_experts": 21, "num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": 64, "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import sys; from gemq.bench import BenchConfig, run_bench\n"
        "from gemq.bench.architectures import load_config, parameters\n"
        "from gemq.generation.text import peak_resident_bytes as peak\n"
        "before = peak()\n"
        "r = run_bench(BenchConfig(sys.argv[1], 2, tokens=4, prompt_length=4, profile_steps=0))\n"
        "print(peak() - before, parameters(load_config(sys.argv[1])), r.runs['gemq'].memory.weights)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout
    grown, count, weights = map(int, out.split())
    assert 2 * count > 1e9 and weights < count / 3
    # the packed weights, the two tensors of 256 MiB that measure the copy bandwidth, and the rest of a process
    assert grown < weights + 2 * 2**28 + 2.5e8 < 2 * count + 2 * 2**28


@pytest.mark.parametrize("implementation", baseline.IMPLEMENTATIONS)
def test_baselines_compute_alike(configs, family, implementation):
    config = load_config(str(configs[family]))
    model = random_model.build_unquantized(config, torch.float32, CPU)
    ids = random_windows(2, 9)
    baseline.use_experts(model, "eager")
    expected = model(ids).logits
    baseline.use_experts(model, implementation)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_bytes_that_a_step_reads(configs, family):
    model, _ = packed(configs, family)
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    experts = [m for p, m in packed_modules(model) if p.endswith(".experts")]
    sizes = [expert_sizes(m) for m in experts]
    for module, found in zip(experts, sizes, strict=True):
        stored = (module.gate_up_codes, module.gate_up_meta, module.down_codes, module.down_meta)
        assert sum(found) == sum(t.numel() * t.element_size() for t in stored)
        assert len({s for s, b in zip(found, module.bits["down_proj"], strict=True) if b == 2}) == 1
    # with all experts, and all rows of the embedding, everything is read but tables of offsets and of frequencies
    everything = sum(map(sum, sizes)) + other_bytes(model, model.config.vocab_size)
    small = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "_proj_" in n and "._" in n)
    small += sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "inv_freq" in n)
    assert everything == sum(held.values()) - small
    # one row of two experts a layer; 64 rows reach all four
    options = GenerationOptions(6, ignore_eos=True)
    one = expert_bytes_per_step(model, Decoding(model, random_windows(1, 5), None, options, compile="none"))
    assert sum(2 * min(s) for s in sizes) <= one <= sum(2 * max(s) for s in sizes)
    many = expert_bytes_per_step(model, Decoding(model, random_windows(64, 5), None, options, compile="none"))
    assert one < many <= sum(map(sum, sizes))
    prepare(model)


def test_unquantized_bytes(configs):
    config = load_config(str(configs["mixtral"]))
    model = random_model.build_unquantized(config, torch.bfloat16, CPU)
    sizes = expert_sizes(model.model.layers[0].mlp.experts)
    assert sizes == [3 * 64 * 96 * 2] * 4
    total = sum(p.numel() * 2 for p in model.parameters())
    assert 2 * sum(sizes) + other_bytes(model, 96) == total


def test_copy_bandwidth_is_plausible():
    assert 1e8 < copy_bandwidth(CPU, repeats=2) < 1e13


@pytest.fixture
def quick(monkeypatch):
    """No large copies."""
    monkeypatch.setattr(measuring, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr("gemq.bench.run.copy_bandwidth", lambda device: 1e10)


def test_measurement(configs, quick, family):
    result = run_bench(BenchConfig(str(configs[family]), 2.5, tokens=12, batch=3, prompt_length=7, shared_bits=3))
    found = result.runs["gemq"]
    assert result.strongest == "gemq" and result.bits_per_expert == 2.5 and result.widths == {"2": 0.5, "3": 0.5}
    assert found.step == "native"
    assert found.mode == "none" and found.batch == 3 and result.dtype == "bfloat16"
    steps, rate = found.step_seconds, found.tokens_per_second
    assert 0 < steps["p20"] <= steps["p50"] <= steps["p80"]
    assert rate["p50"] == pytest.approx(3 / steps["p50"]) and rate["p20"] == pytest.approx(3 / steps["p80"])
    assert found.first_token_seconds > 0
    assert found.roofline.share == pytest.approx(found.roofline.bytes_per_step / 1e10 / steps["p50"])
    assert found.memory.resident > found.memory.weights > 10_000 and found.memory.reserved is None
    assert sum(k.share for k in found.kernels) == pytest.approx(1) and found.kernels[0].microseconds > 0
    moe = next(k for k in found.kernels if k.name == "gemq::decode_step experts")
    assert moe.calls == 2


@pytest.fixture
def gemq_run(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = run(["bench", *(str(a) for a in arguments)])
        return code, *capsys.readouterr()

    return call


SMALL = ["--random-weights", "--tokens", "6", "--prompt-length", "4", "--profile-steps", "2"]


def test_the_command(configs, quick, gemq_run, tmp_path):
    file = tmp_path / "out.json"
    code, out, err = gemq_run("--model-config", configs["mixtral"], "--bits", "1.5", *SMALL, "--output", file)
    assert code == 0 and "tokens/s" in out and "gemq::decode_step experts" in out and "copy bandwidth 10.0 GB/s" in out
    assert "mixtral, 2 layers" in err
    found = json.loads(file.read_text())
    assert found["schema"] == 1 and found["strongest"] == "gemq" and found["config"]["bits"] == 1.5
    assert found["widths"] == {"1": 0.5, "2": 0.5}
    assert found["parameters"] == parameters(load_config(configs["mixtral"]))
    run_ = found["runs"]["gemq"]
    assert set(run_) >= {"tokens_per_second", "step_seconds", "first_token_seconds", "memory", "roofline", "kernels"}
    assert set(run_["tokens_per_second"]) == {"p50", "p20", "p80"} and len(run_["kernels"]) > 5
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_on_a_baseline(configs, quick, gemq_run, monkeypatch, tmp_path):
    def broken(model, name):
        if name == "batched_mm":
            raise RuntimeError("no such kernel\nat all")
        plain(model, name)

    plain = baseline.use_experts
    monkeypatch.setattr(baseline, "use_experts", broken)
    file = tmp_path / "out.json"
    code, out, _ = gemq_run("--model-config", configs["qwen2_moe"], "--bits", "16", *SMALL, "--output", file)
    assert code == 0 and "strongest: " in out and "batched_mm could not run: no such kernel" in out
    found = json.loads(file.read_text())
    assert set(found["runs"]) == {"grouped_mm", "gather", "eager"} and list(found["failures"]) == ["batched_mm"]
    rates = {name: r["tokens_per_second"]["p50"] for name, r in found["runs"].items()}
    assert found["strongest"] == max(rates, key=rates.get) and found["dtype"] == "bfloat16"
    code, _, err = gemq_run(
        "--model-config", configs["qwen2_moe"], "--bits", "16", "--baseline", "batched_mm", *SMALL
    )
    assert code == 1 and "no such kernel" in err


def test_mixes_on_the_command_line(configs, quick, gemq_run, tmp_path):
    file = tmp_path / "out.json"
    code, *_ = gemq_run(
        "--model-config", configs["qwen3_moe"], "--mix", "1:0.25,2:0.5,4:0.25", *SMALL, "-o", file, "--layers", "1"
    )
    found = json.loads(file.read_text())
    assert code == 0 and found["bits_per_expert"] == 2.25 and found["widths"] == {"1": 0.25, "2": 0.5, "4": 0.25}


@pytest.mark.parametrize("options, message", [
    (["--bits", "2"], "say --random-weights"),
    (["--random-weights"], "give bits or a mix of widths"),
    (["--random-weights", "--bits", "2", "--mix", "2:1"], "give bits or a mix of widths"),
    (["--random-weights", "--bits", "9"], "bits must be in 1..8 (or 16"),
    (["--random-weights", "--bits", "0.5"], "bits must be in 1..8 (or 16"),
    (["--random-weights", "--mix", "2=1"], "--mix must be like"),
    (["--random-weights", "--bits", "2", "--batch", "65"], "batch must be in 1..64, got 65"),
    (["--random-weights", "--bits", "2", "--tokens", "1"], "tokens must be in 2.."),
    (["--random-weights", "--bits", "2", "--tokens", "125"],
     "prompt_length 128, tokens 125 and profile_steps 4 must be at most 128 together"),
    (["--random-weights", "--bits", "2", "--attention-bits", "9"], "attention_bits must be in 1..8 or 16, got 9"),
    (["--random-weights", "--bits", "16", "--baseline", "x"], "baseline must be one of grouped_mm"),
    (["--random-weights", "--bits", "2", "--output", "/nowhere/at/all.json"], "cannot be written"),
    (["--random-weights", "--bits", "2", "--layers", "3"], "layers must be in 1..2 for this model, got 3"),
])  # fmt: skip
def test_what_the_command_refuses(configs, quick, gemq_run, options, message):
    code, _, err = gemq_run("--model-config", configs["mixtral"], *options)
    assert code == 2 and message in " ".join(err.split())


@pytest.mark.parametrize("bits", [2, 16])
def test_a_model_that_does_not_fit(configs, monkeypatch, bits):
    monkeypatch.setattr(random_model, "free_bytes", lambda device: 2**30)
    with pytest.raises(OutOfMemoryError, match=r"the weights need \d+\.\d GiB .*, 1\.0 GiB free on cpu"):
        run_bench(BenchConfig("mixtral-8x7b", bits))


def test_a_half_written_result_is_not_left(configs, quick, tmp_path, monkeypatch):
    from gemq.bench import write_json

    result = run_bench(BenchConfig(str(configs["mixtral"]), 2, tokens=4, prompt_length=4, profile_steps=0))
    file = tmp_path / "out.json"
    file.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(result, file)
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", [2.5, 16])
def test_measurement_on_cuda(configs, family, bits):
    result = run_bench(BenchConfig(str(configs[family]), bits, tokens=12, batch=2, prompt_length=7))
    for name, found in result.runs.items():
        assert found.mode == {"gemq": "graph", "eager": "none"}.get(name, "compile")
        assert found.memory.reserved >= found.memory.allocated >= found.memory.weights
        assert found.kernels and sum(k.share for k in found.kernels) == pytest.approx(1)
    assert not result.failures
