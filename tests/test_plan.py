"""Predictions against the real thing: files to the byte, memory of packed modules, and refusals with numbers."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest
import torch
from packed_models import quantized
from tiny_models import FAMILIES, tiny_model
from transformers import AutoConfig

from gemq.algorithms.method import MethodConfig
from gemq.bench.architectures import PUBLISHED, load_config
from gemq.checkpoint import save_packed
from gemq.choices import Keep
from gemq.cli.run import run
from gemq.errors import ResourceError
from gemq.models import describe, packed_modules
from gemq.planning import Machine, Plan, PlanConfig, Rates, check, make_plan, other_machine, planned_widths
from gemq.planning.machine import free_disk_bytes, measure_rates, this_machine
from gemq.planning.memory import Work, gptq_bytes, layerwise, peak, resident
from gemq.planning.model_parts import count_parts, located
from gemq.planning.output import output_size, resident_bytes
from gemq.planning.seconds import forward, stage_operations

RATES = Rates(1e12, 1e11, 1e8, 1e11, "a test")


def saved_bytes(result, folder, **options) -> int:
    path = save_packed(result.packed, result.config, folder, dtype=torch.bfloat16, **options)
    return sum(f.stat().st_size for pattern in ("*.safetensors", "*.index.json") for f in path.glob(pattern))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [
    {"shared_bits": 3}, {"shared_bits": 16, "attention_bits": 16, "candidates": (1, 2, 4), "per_layer": "none"},
], ids=["packed", "plain"])  # fmt: skip
def test_the_file_of_every_family(family, options, tmp_path):
    result = quantized(family, 2.0, tune=False, perturbation="rtn", **options)
    moe = located(result.dense.config)
    widths = planned_widths(moe, MethodConfig(budgets=(2.0,), **options), 2.0)
    found = output_size(moe, widths, torch.bfloat16)
    # offsets of tensors have as many digits as their experts' order makes them
    assert found.files == pytest.approx(saved_bytes(result, tmp_path / "out"), abs=16)
    assert found.count == 1 and found.tensors < found.files


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe"])
def test_the_file_where_the_program_chooses_the_shared_width(family, tmp_path):
    result = quantized(family, 2.5, tune=False, perturbation="rtn")
    moe = located(result.dense.config)
    real = saved_bytes(result, tmp_path / "out")
    planned = planned_widths(moe, MethodConfig(), 2.5)
    # here a shared expert weighs half as much as all others; in the published models a thirtieth
    assert output_size(moe, planned, torch.bfloat16).files == pytest.approx(real, rel=0.03)
    assert output_size(located(result.dense.config), result.config, torch.bfloat16).files == pytest.approx(real, abs=16)


@pytest.mark.parametrize("method, budget", [("uniform", 2.5), ("pmq", 2.25)])
def test_the_file_of_the_baselines(method, budget, tmp_path):
    result = quantized("mixtral", budget, method=method, tune=False, perturbation="rtn")
    moe = located(result.dense.config)
    widths = planned_widths(moe, MethodConfig(budgets=(budget,), method=method), budget)
    assert output_size(moe, widths, torch.bfloat16).files == pytest.approx(saved_bytes(result, tmp_path / "o"), abs=16)


def test_a_larger_model_in_several_files(tmp_path):
    result = quantized("qwen3_moe", 2.0, layers=6, experts=24, tune=False, perturbation="rtn")
    moe = located(result.dense.config)
    widths = planned_widths(moe, MethodConfig(), 2.0)
    found = output_size(moe, widths, torch.bfloat16, shard=200_000)
    real = saved_bytes(result, tmp_path / "out", max_shard_size=200_000)
    assert found.files == pytest.approx(real, rel=0.01)
    # where files end depends on the widths of each layer
    exact = output_size(located(result.dense.config), result.config, torch.bfloat16, shard=200_000)
    assert exact.count == len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert exact.files == pytest.approx(real, rel=0.002)


def test_a_budget_below_one_bit_is_of_empty_experts():
    moe = located(tiny_model("mixtral").config)
    options = MethodConfig(budgets=(0.5,), candidates=(0, 1, 2), per_layer="none")
    rows = planned_widths(moe, options, 0.5).widths.experts
    assert sum(map(sum, rows.values())) == 4 and {b for row in rows.values() for b in row} == {0, 1}
    with pytest.raises(ValueError, match=r"the budget must be in 1.75.*got 1"):
        planned_widths(moe, MethodConfig(budgets=(1.0,), per_layer="c2c3"), 1.0)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "qwen3_next"])
def test_memory_of_the_packed_model_ready_to_run(family):
    result = quantized(family, 2.0, tune=False, perturbation="rtn", shared_bits=4)
    moe = located(result.dense.config)
    output_size(moe, result.config, torch.bfloat16)
    tensors = [p.numel() * 2 for p in result.packed.parameters()]
    for _, module in packed_modules(result.packed):
        assert module.layout == "cpu_tile"
        # not the tables of offsets
        tensors += [b.nbytes for n, b in module.named_buffers() if n.rpartition("_")[2] in ("codes", "meta")]
    assert resident_bytes(moe.model, "cpu_tile", torch.bfloat16) == sum(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_model(family):
    model = tiny_model(family)
    moe, parts = describe(model), count_parts(located(model.config))
    assert parts == count_parts(moe)
    assert parts.parameters == sum(p.numel() for p in model.parameters())
    quantizable = sum(layer.experts.gate_up_proj.numel() * 3 // 2 + layer.router.weight.numel() for layer in moe.moe)
    quantizable += sum(m.weight.numel() for m in (moe.attention | moe.dense).values())
    if moe.shared_multiple:
        quantizable += sum(p.numel() for layer in moe.moe for p in layer.shared.parameters())
    assert parts.quantizable == quantizable
    assert all(layer.attention in (64, 128) for layer in parts.layers)
    assert [layer.routed for layer in parts.layers] == [hasattr(layer.mlp, "experts") for layer in moe.layers]


def test_published_models_by_hand():
    config = load_config("mixtral-8x7b")
    options = PlanConfig(MethodConfig(budgets=(2.5, 2.0)), keep="model")
    plan = make_plan(config, options, other_machine("h100", torch.bfloat16))
    experts, attention = 32 * 8 * 3 * 4096 * 14336, 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    rest = 2 * (2 * 32000 * 4096 + 32 * 8 * 4096 + 65 * 4096)
    for budget, size in plan.outputs.items():
        assert size.tensors == experts * (budget / 8 + 4 / 128) + attention * (4 / 8 + 4 / 128) + rest
        assert 0 < size.files - size.tensors < 1e-5 * size.tensors
    assert plan.inference[2.5].cache == 32 * 4096 * 2 * 8 * 128 * 2
    # a token reads two of eight experts, and no embeddings
    assert plan.inference[2.0].read == pytest.approx(
        experts / 4 * (2 / 8 + 4 / 128) + attention * (4 / 8 + 4 / 128) + rest - 2 * 31999 * 4096, rel=1e-6
    )
    assert not plan.to_dict()["fits"]
    assert plan.shortages()[0].place == "device memory"


def of_memory(free: int, **options) -> Plan:
    """The plan of two layers of Qwen3-30B-A3B on a GPU of ``free`` bytes."""
    config = PlanConfig(MethodConfig(per_layer="none", budgets=options.pop("budgets", (2.5,))), **options)
    return make_plan(load_config("qwen3-30b-a3b", 2), config, Machine("gpu", False, free, None, None, None))


@pytest.mark.parametrize("rows", [1, 8])
def test_the_longest_context_is_the_longest(rows):
    free = of_memory(10**12, rows=rows, context=12_345).inference[2.5].total
    found = of_memory(free, rows=rows).inference[2.5]
    # beyond a chunk of the prompt a token takes its keys and values alone
    assert found.longest == 12_345
    at, beyond = (of_memory(free, rows=rows, context=found.longest + more).inference[2.5] for more in (0, 1))
    assert at.fits and at.total <= free < beyond.total and not beyond.fits
    # with memory enough, the model's positions
    assert of_memory(10**12).inference[2.5].longest == 40960
    assert of_memory(10**9).inference[2.5].longest == 0


@pytest.mark.parametrize("bits", [None, 1.0, 1.75, 2.75])
def test_the_bits_that_run_are_the_highest(bits):
    whole = of_memory(10**12, budgets=(3.0, bits or 1.0)).inference
    free = whole[bits].total if bits else whole[1.0].total - 1
    plan = of_memory(free, budgets=(3.0, 2.875))
    assert not plan.runs and plan.runnable_bits == bits
    assert of_memory(whole[3.0].total, budgets=(3.0, 2.5)).runnable_bits is None


def test_a_result_that_does_not_run_is_said(capsys):
    """On the device alone: quantizing streams, and fits."""
    plan = ["plan", "qwen3-30b-a3b", "--constraints", "none", "--bits", "3", "--device", "rtx4090", "--rows", "16"]
    assert run([*plan, "--context", "8192"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"the result of 3 bits does not run on rtx4090: it needs [\d.]+ GB, 24.00 GB are free; "
                     r"(no budget|[\d.]+ bits) would run, or [\d,]+ tokens a row at these", out), out
    assert run([*plan, "--context", "8192", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["fits_quantizing"], found["fits_running"]) == (False, True, False)
    assert run([*plan, "--context", "1024", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["fits_running"] and found["runnable_bits"] is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layer_at_a_time_takes_less(name):
    config = load_config(name)
    parts = count_parts(located(config))
    work = Work(128, 2048, MethodConfig(), 2, False)
    stages = layerwise(parts, work, 0)
    whole, stream = peak(resident(stages, parts, work, 0)), peak(stages)
    assert stream["device"] < whole["device"] / 2 and whole["device"] > 2 * parts.parameters
    assert stream["scratch"] >= len(parts.layers) * 128 * 2048 * parts.hidden * 2
    # the layer three times over in 16 bits, and what depends on the batch alone
    batch = 4 * 2048 * (4 * 4 * max(parts.intermediate, parts.layers[-1].mlp) + 12 * parts.hidden) * 2
    assert stream["device"] < 1.1 * max(3 * 2 * parts.largest_layer + batch + 2e9, 8e9) + 5e8
    more = replace(work, samples=256)
    assert peak(layerwise(parts, more, 0))["scratch"] == 2 * stream["scratch"]
    for keep in Keep:
        once, twice = (stage_operations(parts, w, keep, 0, 2) for w in (work, more))
        assert once["measure"].products < twice["measure"].products < 2 * once["measure"].products
        assert once["quantize"].factors == twice["quantize"].factors
        assert all(o.seconds(RATES) > 0 for name, o in once.items() if name != "save")


def test_formulas_of_one_layer():
    parts = count_parts(located(load_config("mixtral-8x7b")))
    assert gptq_bytes(2, 3, 5) == 2 * (5 * 4 * 25 + 17 * 15)
    tokens, length = 10, 5
    weights = parts.parameters - 32000 * 4096 - 32 * 6 * 3 * 4096 * 14336 - 4096
    assert forward(parts, tokens, length) == tokens * (2 * weights + 32 * 4 * length * 4096)


def small_machine(**free) -> Machine:
    return Machine("cpu", True, **{"device_free": None, "host_free": None, "disk_free": None} | free, rates=None)


def test_a_shortage_says_what_would_fit():
    config = tiny_model("mixtral").config
    options = PlanConfig(MethodConfig(batch_size=1), samples=4096, length=512, keep="model")
    full = make_plan(config, options, small_machine(host_free=10**12))
    check(full, config)
    most = full.to_dict()["peak"]["host"]
    short = make_plan(config, options, small_machine(host_free=most - 1))
    with pytest.raises(ResourceError, match=r"measure needs .* GB of memory \(.*layer inputs .*GB are free"):
        check(short, config)
    free = most // 2
    with pytest.raises(ResourceError, match=r"--samples \d+ instead of 4096") as caught:
        check(make_plan(config, options, small_machine(host_free=free)), config)
    fitting = int(str(caught.value).partition("--samples ")[2].split()[0])
    for samples, fits in ((fitting, True), (fitting + 1, False)):
        changed = make_plan(config, replace(options, samples=samples), small_machine(host_free=free))
        assert (changed.shortages() == []) is fits
    with pytest.raises(ResourceError, match="No smaller calibration would fit; --no-check goes on"):
        check(make_plan(config, options, small_machine(host_free=1000)), config)
    with pytest.raises(ResourceError, match=r"save needs 0.00 GB of disk \(checkpoints 0.00\), 0.00 GB are free"):
        check(make_plan(config, options, small_machine(disk_free=1000)), config)


def test_activations_take_disk_or_memory():
    config, machine = tiny_model("mixtral").config, small_machine(host_free=10**12, disk_free=10**12)
    on_disk, held = (make_plan(config, PlanConfig(keep=keep), machine) for keep in ("layer", "activations"))
    size = peak(on_disk.stages)["scratch"]
    assert size == on_disk.disk["scratch"] >= 3 * 128 * 2048 * 64 * 4 and "scratch" not in held.disk
    assert peak(held.stages)["host"] == pytest.approx(peak(on_disk.stages)["host"] + size)


def test_processes_share_what_they_can():
    config, machine = tiny_model("mixtral").config, small_machine(host_free=10**12)
    alone, shared = (make_plan(config, PlanConfig(keep="model", ranks=n), machine).stages for n in (1, 4))
    # each has its own windows' activations, and the whole model
    assert shared["tune routers"].host["layer inputs"] == alone["tune routers"].host["layer inputs"]
    assert shared["quantize"].host["weights"] == alone["quantize"].host["weights"]


def test_this_machine(tmp_path):
    machine = this_machine(torch.device("cpu"), tmp_path / "not" / "there", torch.float32, rates=False)
    assert machine.on_cpu and machine.device_free is None and machine.rates is None
    assert machine.host_free > 10**8 and machine.disk_free == pytest.approx(free_disk_bytes("/"), rel=1) is not None
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert rates.source == "measured on this machine"
    assert min(rates.matmul, rates.factor, rates.bandwidth) > 1e8 and rates.rounding > 1e4


def test_bad_options():
    with pytest.raises(ValueError, match="keep must be one of layer, activations, model, got 'cloud'"):
        PlanConfig(keep="cloud")
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        PlanConfig(context=0)
    with pytest.raises(ValueError, match=r"device must be cpu, cuda, cuda:N or one of h100.*got 'abacus'"):
        other_machine("abacus", torch.bfloat16)


# the command line


def test_plan_prints_json(capsys):
    assert run(["plan", "qwen3-30b-a3b", "--bits", "2.5,2", "--device", "rtx4090", "--keep", "layer", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "qwen3-30b-a3b" and found["parameters"] == pytest.approx(30.5e9, rel=0.01)
    assert list(found["outputs"]) == ["2.5", "2"] and found["options"]["keep"] == "layer"
    assert set(found["stages"]) == set(found["seconds"]) == {"measure", "quantize", "tune routers", "save"}
    assert found["machine"]["rates"]["source"].startswith("estimated")
    assert found["peak"]["scratch"] == sum(found["stages"]["measure"]["scratch"].values())


@pytest.fixture
def printed(capsys):
    """Output of ``gemq plan`` for a machine that is always the same."""
    def call(form):
        assert run(["plan", "mixtral-8x7b", "--bits", "3,2.5", "--device", "h100", "--format", form]) == 0
        return capsys.readouterr()

    return call


def test_plan_prints_markdown(printed):
    out, err = printed("md")
    first, second, note = out.strip().split("\n\n")
    assert first.splitlines()[0] == "| stage | device | memory | scratch | time |" and err == ""
    assert first.splitlines()[1] == "|---|---:|---:|---:|---:|" and "| most (time: one budget) |" in first
    titles, _, *rows = second.splitlines()
    assert titles == "| bits | checkpoint | weights | cache | to run | longest context | tokens/s at most |"
    assert [row.split(" | ")[0] for row in rows] == ["| 3", "| 2.5"]
    assert note.startswith("times and tokens/s: estimated")


def test_plan_prints_rows_for_programs(printed):
    whole = json.loads(printed("json").out)
    lines = printed("jsonl").out.splitlines()
    assert len(lines) == 1 and json.loads(lines[0]) == whole
    rows = list(csv.DictReader(io.StringIO(printed("csv").out)))
    stages = {r["stage"]: r for r in rows if r["row"] == "stage"}
    assert set(whole["stages"]) < set(stages)
    for name, need in whole["stages"].items():
        assert int(stages[name]["memory"]) == sum(need["host"].values())
        assert float(stages[name]["seconds"]) == pytest.approx(whole["seconds"][name])
    results = [r for r in rows if r["row"] == "result"]
    assert [int(r["checkpoint"]) for r in results] == [o["files"] for o in whole["outputs"].values()]
    assert [int(r["total"]) for r in results] == [i["total"] for i in whole["inference"].values()]


def test_a_shortage_is_in_every_form(printed, monkeypatch):
    machine = replace(other_machine("h100", torch.bfloat16), host_free=10**6, device_free=10**6, disk_free=10**6)
    monkeypatch.setattr("gemq.planning.other_machine", lambda *_: machine)
    assert "does not fit: " in printed("table").out and "\n\ndoes not fit: " in printed("md").out
    assert json.loads(printed("json").out)["fits"] is False
    out, err = printed("csv")
    assert "does not fit" not in out and "does not fit: " in err


def test_plan_prints_tables(capsys, model_folder):
    assert run(["plan", str(model_folder), "--samples", "6", "--length", "24"]) == 0
    out, err = capsys.readouterr()
    for text in ("measure", "tune routers", "checkpoint", "tokens/s at most", "measured on this machine"):
        assert text in out
    assert "does not fit" not in out and err == ""


@pytest.mark.parametrize("arguments, message", [
    (["nowhere/model"], "no model in 'nowhere/model'"),
    (["mixtral-8x7b", "--bits", "0.5"], "the budget must be in 1..3 bits"),
    (["mixtral-8x7b", "--keep", "none"], "'none' is not one of 'layer'"),
    (["mixtral-8x7b", "--device", "tpu"], "device must be"),
    (["mixtral-8x7b", "--json", "--format", "csv"], "--json and --format csv ask for different things"),
])  # fmt: skip
def test_plan_fails_in_one_line(capsys, arguments, message):
    assert run(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.strip().splitlines()) == 1


def test_quantize_refuses_and_goes_on_when_told(capsys, model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("gemq.planning.machine.free_host_bytes", lambda: 10**6)
    arguments = ["quantize", str(model_folder), "-o", str(tmp_path / "out"), "--calibration", str(text_file),
                 "--samples", "4", "--length", "16", "--no-tune-routers"]
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "GB are free" in err and "--no-check" in err
    assert not (tmp_path / "out").exists()
    assert run([*arguments, "--no-check"]) == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_a_config_of_a_future_family_is_refused():
    with pytest.raises(NotImplementedError, match="is not supported yet"):
        located(AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32, vocab_size=32))
