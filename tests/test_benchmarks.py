"""The benchmark suite: what it runs is right, what it computes from times is right, and where pytest finds it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_modules import FOLDER, load

from gemq.ops import measuring

shapes, layers, baselines, measure = (load(name) for name in ("shapes", "layers", "baselines", "measure"))
plot, record, quantize_time = (load(name) for name in ("plot", "record", "quantize_time"))
ROOT = FOLDER.parent
PLAIN = shapes.Block("plain", 256, 128, 6, 2)
SHARED = shapes.Block("shared", 128, 256, 4, 3, 384)


def step_of(layer, block, tokens: int = 5) -> measure.Step:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, block.hidden, generator=generator)
    return measure.Step(layer, x, *measuring.random_routing(tokens, block.experts, block.top_k, "cpu", generator))


@pytest.mark.parametrize("block", [PLAIN, SHARED], ids=lambda b: b.name)
@pytest.mark.parametrize("provider", ["gemq", "dequantize"])
def test_packed_layers_multiply_by_their_weights(block, provider) -> None:
    layer = layers.packed_layer(shapes.Case(block, 5, provider, "2.0 mixed"), 3, "cpu")
    assert measure.relative_error(step_of(layer, block)) < 1e-5


@pytest.mark.parametrize("block", [PLAIN, SHARED], ids=lambda b: b.name)
@pytest.mark.parametrize("provider", shapes.UNQUANTIZED)
def test_unquantized_ways_multiply_by_their_weights(block, provider) -> None:
    held = baselines.Weights(block, 3, "cpu", torch.float32)
    way = baselines.Unquantized(held, provider, 5, False)
    assert measure.relative_error(step_of(way, block)) < 1e-5


def test_a_wrong_result_is_seen() -> None:
    held = baselines.Weights(PLAIN, 3, "cpu", torch.float32)
    way = baselines.Unquantized(held, "expert_loop", 5, False)
    step = step_of(way, PLAIN)
    held.weights = way.weights = lambda e: (held.gate_up[e] * 1.01, held.down[e])
    assert measure.relative_error(step) > 5e-3


def test_what_would_not_fit_is_said() -> None:
    held = SimpleNamespace(block=shapes.GPU_BLOCKS[0], gate_up=torch.zeros(1))
    with pytest.raises(layers.Unsupported, match="would gather 45 GB"):
        baselines.Unquantized(held, "batched_mm", 32, False)


class GemLiteLinear:
    """The part of gemlite's module that is used, with its meaning: ``(q - zeros) * scales``."""

    def __init__(self, W_nbits, group_size, in_features, out_features, input_dtype, output_dtype) -> None:
        assert W_nbits in (1, 2, 4, 8)
        self.shape, self.group, self.bits = (out_features, in_features), group_size, W_nbits

    def pack(self, W_q, scales, zeros, bias=None):
        assert W_q.dtype == torch.uint8 and W_q.shape == self.shape and int(W_q.max()) < 1 << self.bits
        assert scales.shape == zeros.shape == (self.shape[0], self.shape[1] // self.group)
        grouped = W_q.float().view(self.shape[0], -1, self.group)
        self.weight = ((grouped - zeros.float()[..., None]) * scales.float()[..., None]).view(self.shape)
        return self

    def __call__(self, x):
        return x @ self.weight.to(x.dtype).T


@pytest.mark.parametrize("block", [PLAIN, SHARED], ids=lambda b: b.name)
def test_gemlite_gets_the_weights_it_should(block, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(layers.Unsupported, match=r"not installed|runs on CUDA"):
        layers.GemLite(block, "2.5", 0, "cpu")
    fake = SimpleNamespace(DType=SimpleNamespace(FP16="fp16"), GemLiteLinear=GemLiteLinear)
    monkeypatch.setitem(sys.modules, "gemlite", fake)
    with pytest.raises(layers.Unsupported, match="runs on CUDA"):
        layers.GemLite(block, "2.5", 0, "cpu")
    # past the check of the device, on the CPU
    monkeypatch.setattr(layers.Packed, "__init__", lambda self, b, m, s, d, o, init=layers.Packed.__init__:
                        init(self, b, m, s, "cpu", o))  # fmt: skip
    layer = layers.GemLite(block, "2.5", 0, "cuda")
    # its zero points are rounded to float16
    assert measure.relative_error(step_of(layer, block)) < 1e-3


def test_a_peer_gets_plain_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemq import reference

    def make(gate_up, down, *, bits, hidden, intermediate, group_size):
        assert bits == gate_up[2].tolist() == down[2].tolist() and hidden == SHARED.hidden
        return lambda x, ids, weights: reference.moe_lowbit_ffn(
            x, gate_up, down, ids, weights, intermediate=intermediate, group_size=group_size
        )

    monkeypatch.setitem(sys.modules, "their_kernels", SimpleNamespace(make=make))
    layer = layers.packed_layer(shapes.Case(SHARED, 5, "their_kernels:make", "2.5"), 0, "cpu")
    assert measure.relative_error(step_of(layer, SHARED)) < 1e-5


def test_bytes_are_those_of_the_touched_experts() -> None:
    layer = layers.packed_layer(shapes.Case(PLAIN, 1, "gemq", "3.0"), 0, "cpu")
    held = sum(t.numel() * t.element_size() for stack in (layer.gate_up, layer.down) for t in stack[:2])
    assert layer.bytes_of(list(range(6))) == held
    assert layer.bytes_of([1, 4]) * 3 == held
    dense = baselines.Weights(SHARED, 0, "cpu", torch.bfloat16)
    assert dense.bytes_of([0, 1, 2, 3]) == 2 * sum(
        t.numel() for t in (dense.gate_up, dense.down, *dense.shared)
    )


def test_mixes_have_the_bits_of_their_names() -> None:
    for mix in shapes.MIXES:
        for block in (*shapes.GPU_BLOCKS, *shapes.CPU_BLOCKS):
            bits = shapes.widths(mix, block.experts)
            assert sum(bits) / len(bits) == float(mix.split()[0])
    assert len(set(shapes.widths("2.0 mixed", 8))) == 3


def test_cases_cover_the_grid_and_begin_with_what_matters() -> None:
    cases = shapes.gpu_cases(("m:f",))
    packed = {(c.block.name, c.mix, c.tokens, c.provider) for c in cases if c.mix}
    assert len(packed) == 4 * 6 * 8 * 4
    assert (cases[0].block.name, cases[0].tokens, cases[0].provider) == ("mixtral-8x7b", 1, "gemq")
    first = cases[: 4 * (1 + 5)]
    assert {c.tokens for c in first} == {1} and {c.provider for c in first} == {"gemq", *shapes.UNQUANTIZED}
    assert len({str(c) for c in cases}) == len(cases)
    assert {c.tokens for c in shapes.gpu_cases(budgeted=True) if c.compiled} == {1, 16}
    assert {c.tokens for c in cases if c.compiled} == set(shapes.GPU_TOKENS)
    assert len({str(c) for c in shapes.cpu_cases()}) == len(shapes.cpu_cases())


def rows_of(tmp_path: Path | None = None) -> measure.Rows:
    conditions = {"machine": "2 cores of X, CPU only", "commit": "abc", "date": "2026-01-02", "torch": "2.13.0",
                  "command": "pytest --benchmark-only"}  # fmt: skip
    limits = {"copy_gb_s": 100.0, "matmul_tflop_s": 1.0, "matmul_dtype": "float32"}
    rows = measure.Rows(conditions, limits, tmp_path and tmp_path / "rows.json")
    for tokens in (1, 16):
        for mix in ("2.0", "2.5"):
            case = shapes.Case(PLAIN, tokens, "gemq", mix)
            rows.add(case, p20_us=9.0, p50_us=10.0 * tokens, p80_us=11.0, bytes=500_000, flops=2_000_000, bits=2.0)
        for way, us in (("grouped_mm", 50.0), ("expert_loop", 40.0)):
            rows.add(shapes.Case(PLAIN, tokens, way, None, "float32"), p50_us=us, bytes=4_000_000, flops=2_000_000)
    rows.add(shapes.Case(PLAIN, 16, "batched_mm", None, "float32"), unsupported="too large")
    return rows


def test_rows_are_written_whole_with_rates_and_ratios(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["rows"] == rows.rows and [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    first = found["rows"][0]
    assert (first["gb_s"], first["percent_of_copy"], first["ideal_us"], first["tflop_s"]) == (50.0, 50.0, 5.0, 0.2)
    assert (first["strongest_unquantized"], first["ratio"]) == ("expert_loop", 4.0)
    slow = next(r for r in found["rows"] if r["tokens"] == 16 and r["mix"])
    assert slow["ratio"] == 0.25
    assert "ratio" not in found["rows"][-1] and found["rows"][-1]["unsupported"] == "too large"


def test_percentiles() -> None:
    watch = measure.Stopwatch([], "cpu")
    watch.samples = [float(v) for v in range(100, -1, -1)]
    assert watch.percentiles() == {"p20_us": 20.0, "p50_us": 50.0, "p80_us": 80.0}


def test_rotation_exceeds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 32 << 20)
    assert measure.copies(20 << 20, 40 << 20, "cpu") == 4
    assert measure.copies(1 << 30, 1 << 30, "cpu") == 2
    assert measure.copies(1 << 10, 1 << 20, "cpu") == 12
    assert measure.copies(1 << 10, 3 << 30, "cpu") == 1


def test_pictures_are_drawn(tmp_path: Path) -> None:
    content = rows_of().content()
    written = plot.draw(content, tmp_path)
    assert [p.name for p in written] == ["moe-cpu-roofline.png", "moe-cpu-speedup.png"]
    gpu = {"kind": "gpu", "conditions": content["conditions"] | {"machine": "NVIDIA H100 80GB HBM3"}, "moe": {
        key: content[key] for key in ("rows", "limits")}}  # fmt: skip
    written += plot.draw(gpu, tmp_path)
    assert written[2].name == "nvidia-h100-80gb-hbm3-roofline.png"
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("content", [{}, {"kind": "gpu", "stages": []}, {"kind": "moe", "rows": [{"tokens": 1}]}])
def test_nothing_to_draw_is_one_error(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    done = subprocess.run([sys.executable, str(FOLDER / "plot.py"), str(path), "--out", str(tmp_path / "out")],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 1 and done.stderr.strip() == f"error: {path}: holds no measured expert blocks"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tables(tmp_path: Path) -> dict:
    """docs/update_tables.py on a folder of results of its own."""
    scope: dict = {"__file__": str(ROOT / "docs" / "update_tables.py"), "__name__": "update_tables"}
    exec(compile((ROOT / "docs" / "update_tables.py").read_text(), "update_tables.py", "exec"), scope)
    scope["RESULTS"] = tmp_path
    return scope


def test_tables_come_from_the_newest_results(tables: dict, tmp_path: Path) -> None:
    text = "a\n<!-- begin moe-cpu -->\n<!-- end moe-cpu -->\nb\n<!-- begin moe-gpu -->\n<!-- end moe-gpu -->\n"
    assert tables["updated"](text) == text
    content = rows_of().content()
    (tmp_path / "moe-cpu-2026-01-02.json").write_text(json.dumps(content))
    shown = tables["updated"](text)
    assert "| gemq, 2.0 | 10 µs, 50 GB/s (4×) | 160 µs, 3.12 GB/s (0.25×) |" in shown
    assert "| strongest unquantized | 40 µs, float32 expert_loop | 40 µs, float32 expert_loop |" in shown
    assert "commit abc, 2026-01-02" in shown and "moe-gpu -->\n<!-- end moe-gpu" in shown
    assert tables["updated"](shown) == shown
    for date, machine in (("2026-02-01", "NVIDIA H100"), ("2026-03-01", "NVIDIA H200")):
        gpu = {"kind": "gpu", "conditions": content["conditions"] | {"machine": machine, "date": date},
               "moe": {key: content[key] for key in ("rows", "limits", "conditions")}}  # fmt: skip
        (tmp_path / f"{machine.lower().replace(' ', '-')}-{date}.json").write_text(json.dumps(gpu))
    (tmp_path / "nvidia-b200-2026-04-01.json").write_text(json.dumps(gpu | {"moe": {"rows": []}}))
    shown = tables["updated"](shown)
    assert "NVIDIA H200; commit abc, 2026-03-01" in shown and "H100" not in shown
    assert tables["updated"]("no markers") == "no markers"


def test_a_record_has_its_conditions() -> None:
    made = record.recorded("demo", [{"x": 1}], "make demo")
    given = made["conditions"]
    assert made["rows"] == [{"x": 1}] and given["command"] == "make demo" and given["torch"] == torch.__version__
    assert {"machine", "commit", "date", "python", "threads", "load"} <= set(given)
    assert record.file_name("demo", made) == f"demo-{given['date']}.json"
    own = rows_of().content()
    kept = record.recorded("moe-cpu", own, None, commit="def")
    assert kept["conditions"] == own["conditions"] | {"commit": "def"} and kept["kind"] == "moe-cpu"
    gpu = {"kind": "gpu", "conditions": own["conditions"] | {"machine": "NVIDIA H100 80GB HBM3"}}
    assert record.file_name("gpu", record.recorded("gpu", gpu, None)) == "nvidia-h100-80gb-hbm3-2026-01-02.json"
    with pytest.raises(ValueError, match="--command"):
        record.recorded("demo", [], None)


def test_the_commit_says_when_it_is_not_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = record.commit()
    assert len(clean) >= 7 and not clean.endswith("+")
    (tmp_path / "file").write_text("2")
    assert record.commit() == clean + "+"


@pytest.mark.parametrize("options, found", [
    ([], "tests/test_a.py"), (["--benchmark-only"], "benchmarks/bench_b.py"),
    (["benchmarks/bench_b.py"], "benchmarks/bench_b.py"), (["--benchmark-only", "tests"], "tests/test_a.py"),
])  # fmt: skip
def test_pytest_collects_tests_or_benchmarks(options: list[str], found: str, tmp_path: Path) -> None:
    """The repository's own conftest and settings, on a small tree."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("tests/test_a.py", "benchmarks/bench_b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("def test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "::" in line]
    assert lines == [f"{found}::test_it"], done.stdout + done.stderr


def bench(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_moe.py",
               "--benchmark-only", *options]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's cases")
def test_the_benchmark_runs(tmp_path: Path) -> None:
    (tmp_path / "their_kernels.py").write_text(
        "from gemq import ops\n"
        "def make(gate_up, down, *, bits, hidden, intermediate, group_size):\n"
        "    def run(x, ids, weights):\n"
        "        out = ops.moe_lowbit_ffn(x, gate_up, down, ids, weights, intermediate=intermediate)\n"
        "        return out * run.factor\n"
        "    run.factor = 1.0 if x_is_right else 1.1\n"
        "    return run\n"
        "x_is_right = False\n"
    )
    path = tmp_path / "rows.json"
    done = bench(
        tmp_path, "--rows-json", str(path), "--peer", "their_kernels:make", "-k",
        "mixtral and t1- and (2.0-gemq or their_kernels or bfloat16-grouped_mm) and not compiled",
    )  # fmt: skip
    rows = json.loads(path.read_text())["rows"]
    assert [r["way"] for r in rows] == ["gemq", "their_kernels:make", "grouped_mm"], done.stdout
    assert done.returncode == 1 and "1 failed, 2 passed" in done.stdout
    assert rows[1]["unsupported"].startswith("wrong result") and "p50_us" not in rows[1]
    gemq = rows[0]
    assert gemq["p20_us"] <= gemq["p50_us"] <= gemq["p80_us"] and gemq["strongest_unquantized"] == "grouped_mm"
    assert gemq["relative_error"] < 1e-3 and gemq["rotated"] >= 2 and gemq["bits"] == 2
    assert str(tmp_path) not in path.read_text()


def test_a_spent_budget_starts_nothing(tmp_path: Path) -> None:
    done = bench(tmp_path, "--budget", "0", "-k", "t1-2.0-gemq")
    assert done.returncode == 0 and "passed" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("options, message", [
    (["--budget", "soon"], "--budget must be a number of seconds, got 'soon'"),
    (["--peer", "kernels"], "--peer must be module:function, got 'kernels'"),
])  # fmt: skip
def test_bad_options_of_the_benchmark(options: list[str], message: str, tmp_path: Path) -> None:
    done = bench(tmp_path, *options)
    assert done.returncode == 4 and message in done.stderr


def cpu_decode(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/cpu_decode.py", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_decoding_beside_llama(tmp_path: Path) -> None:
    """Both steps give the same tokens; llama.cpp's figures are matched by format."""
    theirs = tmp_path / "theirs.json"
    run = {"model_filename": "m.gguf", "n_prompt": 0, "n_gen": 64}
    theirs.write_text(json.dumps([
        run | {"model_type": "llama 8x Q2_K - Medium", "avg_ts": 1.0}, run | {"model_type": "Q2_K", "avg_ts": 0.001},
        run | {"model_type": "Q2_K", "avg_ts": 5.0, "n_prompt": 64, "n_gen": 0},
    ]))
    out = tmp_path / "rows.json"
    done = cpu_decode(
        "--bits", "2,1.5", "--hidden", "256", "--ffn", "256", "--layers", "1", "--vocabulary", "64", "--tokens", "9",
        "--repeats", "1", "--llama-bench", str(theirs), "--llama", "1.5=1e9", "--output", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    two, less = found["rows"]
    assert two["same_tokens"] and less["same_tokens"]
    assert two["llama.cpp"] == 1.0 and two["ratio"] == two["native"]["p50"] and two["target"] == 1.5 and two["met"]
    assert less["llama.cpp"] == 1e9 and not less["met"] and "MISSED" in done.stdout
    assert 0 < two["inside"] < 1 and 0 < two["experts_gb_s"] < 1000
    assert two["native"]["best"] >= two["native"]["p50"] > 0
    assert str(tmp_path) not in done.stdout + out.read_text()


@pytest.mark.parametrize("options, message", [
    (["--llama", "4:616"], "--llama must be like 4=616,3=353, got '4:616'"),
    (["--llama-bench", "nothing.json"], "error: [Errno 2] No such file or directory: 'nothing.json'"),
    (["--tokens", "3"], "--tokens must be at least 7, got 3"),
])  # fmt: skip
def test_bad_options_of_the_decode_benchmark(options: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu_decode.py", *options])
    with pytest.raises(SystemExit) as caught:
        load("cpu_decode").main()
    assert caught.value.code and message in f"{caught.value}{capsys.readouterr().err}"


def test_quantizing_is_timed_from_a_few_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "model_type": "deepseek_v2", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64,
        "moe_intermediate_size": 32, "num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 2,
        "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    small = ["--layers", "3", "--device", "cpu", "--windows", "2", "--length", "16", "--refine", "0"]
    target = tmp_path / "times.json"
    monkeypatch.setattr("sys.argv", ["quantize_time.py", str(tmp_path), *small, "--json", str(target)])
    quantize_time.main()
    rows = {row["stage"]: row for row in json.loads(target.read_text())["rows"]}
    for stage in ("measure", "quantize"):
        # two of the model's six MoE layers ran, of which the first is left out
        assert len(rows[stage]["layers"]) == 2
        assert rows[stage]["whole_model_seconds"] == pytest.approx(6 * rows[stage]["layers"][1], abs=0.06)
    assert rows["allocate"]["layers"] == [] and "whole_model_seconds" not in rows["allocate"]
