"""Launch tables and the search that writes them, without a GPU: a made-up device and made-up times."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from gemq.errors import DeviceError
from gemq.ops import launch_search, measuring
from gemq.ops.launch_search import Shape
from gemq.triton_kernels import launch_parameters as launches
from gemq.triton_kernels import launch_tables

DEVICE = "Imaginary GPU 80GB"
MIXTRAL = launch_search.PRESETS["mixtral-8x7b"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's cache of its own, read anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch_tables.forget()
    yield tmp_path
    launch_tables.forget()


def entry(kind: str = "decode.ffn", shape: Shape = MIXTRAL, up_to: float = 1, **parameters) -> dict:
    return {"kind": kind, **shape.product(kind), "up_to": up_to, "parameters": parameters, "us": 1.0}


def write(*entries: dict) -> Path:
    path = launch_tables.user_table(DEVICE)
    launch_search.write_table(path, DEVICE, list(entries))
    return path


def launch(tokens: int = 1, shape: Shape = MIXTRAL, kind: str = "ffn"):
    product = shape.product(f"decode.{kind}")
    return launches.decode_launch(
        DEVICE, kind, tokens, product["experts"], product["top_k"], product["n"], product["k"]
    )


def test_the_users_table_is_where_launches_look(cache_folder: Path) -> None:
    assert write(entry(warps=8)) == cache_folder / "gemq" / "tuned" / "imaginary_gpu_80gb.json"
    assert launch().warps == 8
    assert launches.decode_launch("default", "ffn", 1, 8, 2, 14336, 4096).warps == 4


def test_the_nearest_shape_and_amount_serve() -> None:
    qwen = launch_search.PRESETS["qwen3-30b-a3b"]
    write(entry(warps=2, up_to=1), entry(warps=8, up_to=8), entry(shape=qwen, warps=4, columns=16, up_to=16))
    assert [launch(t).warps for t in (1, 2, 8, 16)] == [2, 8, 8, 8]
    # another width of the hidden state, the same experts: Mixtral is nearer
    assert launch(1, Shape(6144, 16384, 8, 2)).warps == 2
    near = launch(1, Shape(2048, 1024, 64, 8))
    assert (near.warps, near.columns) == (4, 16)


def test_prefill_is_looked_up_by_tokens_per_expert() -> None:
    product = MIXTRAL.product("prefill")
    write(entry("prefill", up_to=16, line=2), entry("prefill", up_to=256, line=4))
    found = [
        launches.prefill_launch(DEVICE, tokens, product["experts"], product["top_k"], product["n"], product["k"])
        for tokens in (64, 65, 10_000)
    ]
    assert [(f.method, f.columns) for f in found] == [("packed", 64), ("dense", 128), ("dense", 128)]


def test_a_miss_names_the_command_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert launch() == launches.decode_launch("default", "ffn", 1, 8, 2, 14336, 4096)
            launch(kind="gemm")
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and caplog.records[0].levelno == logging.WARNING
    assert "`gemq tune --shape 4096x14336x8x2`" in said[0] and DEVICE in said[0]
    assert launch_search.parse_shape(said[0].split("--shape ")[1].split("`")[0]) == MIXTRAL


def test_a_far_shape_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    write(entry(warps=8))
    assert launch(1, Shape(512, 1024, 8, 2)) == launches.decode_launch("default", "ffn", 1, 8, 2, 1024, 512)
    assert "gemq tune --shape 512x1024x8x2" in caplog.text


def test_a_dense_matrix_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    launch(1, Shape(4096, 4096, 1, 1), "gemm")
    assert not caplog.records


@pytest.mark.parametrize("content, reason", [
    ("{", "Expecting"),
    ('{"version": 7, "entries": []}', "version 1"),
    ("[]", "version 1"),
    (json.dumps({"version": 1, "entries": [entry(warps=3)]}), "warps=3"),
    (json.dumps({"version": 1, "entries": [entry(warps=True)]}), "warps=True"),
    (json.dumps({"version": 1, "entries": [entry(stages=2)]}), "stages=2"),
    (json.dumps({"version": 1, "entries": [entry("decode.other")]}), "decode.other"),
    (json.dumps({"version": 1, "entries": [entry(warps=4) | {"n": 0}]}), "n must be"),
    (json.dumps({"version": 1, "entries": [3]}), "int"),
])  # fmt: skip
def test_a_table_that_cannot_be_used_is_said_and_left_out(content: str, reason: str, caplog) -> None:
    path = launch_tables.user_table(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert launch().warps == 4
    assert str(path) in caplog.text and reason in caplog.text


def test_forced_parameters_win_and_end() -> None:
    write(entry(warps=8))
    with launch_tables.forced({"decode.ffn": {"warps": 2}}):
        assert launch().warps == 2
    assert launch().warps == 8


def test_a_search_says_no_miss(caplog: pytest.LogCaptureFixture) -> None:
    with launch_tables.forced({}):
        launch()
    assert not caplog.records
    launch()
    assert len(caplog.records) == 1


def test_every_candidate_of_the_search_space_makes_a_launch() -> None:
    space = launch_tables.search_space()
    assert set(space) == {"decode.ffn", "decode.gemm", "prefill"}
    for kind, options in space.items():
        for name, values in options.items():
            assert len(values) > 1
            for value in values:
                launch_tables.check_entry(entry(kind, **{name: value}))
                phase, _, part = kind.partition(".")
                product = MIXTRAL.product(kind)
                with launch_tables.forced({kind: {name: value}}):
                    if phase == "decode":
                        made = launch(kind=part)
                    else:
                        made = launches.prefill_launch(DEVICE, 64, 8, 2, product["n"], product["k"])
                if hasattr(made, name):
                    assert getattr(made, name) == value


SPACE = {"a": {"warps": [4, 2, 8], "prefetch": [False, True]}, "b": {"columns": [8, 16]}}


def cost(parameters: dict) -> float:
    a = {"warps": 4, "prefetch": False} | parameters.get("a", {})
    b = {"columns": 8} | parameters.get("b", {})
    return 100 + 10 * abs(a["warps"] - 8) + (5 if a["prefetch"] else 0) - (20 if b["columns"] == 16 else 0)


def test_the_search_finds_the_best_of_separable_costs() -> None:
    calls = []

    def measure(parameters: dict) -> float:
        calls.append(json.dumps(parameters, sort_keys=True))
        return cost(parameters)

    best, us, start, count = launch_search.descend(SPACE, measure)
    assert best == {"a": {"warps": 8}, "b": {"columns": 16}}
    assert (us, start) == (80, 140)
    assert len(calls) == count == len(set(calls)) < 24


def test_noise_does_not_change_the_defaults() -> None:
    assert launch_search.descend(SPACE, lambda p: 100 - 0.5 * len(json.dumps(p)) / 50)[0] == {}


def test_what_cannot_be_launched_is_no_candidate() -> None:
    def timer(shape, tokens, parameters):
        if parameters.get("decode.ffn", {}).get("warps") == 8:
            raise RuntimeError("out of resource: shared memory")
        return 50.0 if parameters.get("decode.ffn", {}).get("warps") == 2 else 60.0

    _, found = launch_search.tune([MIXTRAL], timer=timer, device_name=DEVICE)
    assert found[0].parameters == {"decode.ffn": {"warps": 2}}
    with pytest.raises(RuntimeError, match="broken"):
        launch_search.tune(
            [MIXTRAL], timer=lambda *_: (_ for _ in ()).throw(RuntimeError("broken")), device_name=DEVICE
        )


def test_tune_writes_what_launches_then_use(tmp_path: Path) -> None:
    def timer(shape, tokens, parameters):
        warps = parameters.get("decode.ffn", {}).get("warps", 4)
        return 100.0 / warps if tokens > 1 else 100.0 * warps

    qwen = launch_search.PRESETS["qwen3-30b-a3b"]
    seen = []
    path, found = launch_search.tune(
        [MIXTRAL, qwen], timer=timer, device_name=DEVICE, report=lambda *stage: seen.append(stage)
    )
    assert path == launch_tables.user_table(DEVICE)
    assert [launch(t).warps for t in (1, 4, 16)] == [2, 8, 8]
    assert launch(1, qwen).warps == 2
    content = json.loads(path.read_text())
    # decode has two launches, prefill one kind
    assert content["device"] == DEVICE and len(found) == len(seen)
    assert len(content["entries"]) == sum(2 if f.tokens <= 16 else 1 for f in found)
    assert not list(path.parent.glob("*.tmp"))
    # a second run replaces its own entries and keeps the others
    launch_search.tune([MIXTRAL], timer=lambda s, t, p: 7.0, device_name=DEVICE)
    again = json.loads(path.read_text())["entries"]
    assert len(again) == len(content["entries"])
    assert launch(1).warps == 4 and launch(1, qwen).warps == 2


def test_the_budget_starts_nothing_new(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    _, found = launch_search.tune([MIXTRAL], out, timer=lambda *_: 1.0, device_name=DEVICE, budget=0)
    assert found == [] and not out.exists()


def test_amounts_keep_the_two_phases_apart() -> None:
    for shape in launch_search.PRESETS.values():
        for phase, up_to, tokens in launch_search.amounts(shape, 16):
            assert (tokens <= 16) == (phase == "decode")
            per_expert = tokens * shape.top_k / shape.experts
            assert up_to == (tokens if phase == "decode" else pytest.approx(per_expert, rel=0.1))


@pytest.mark.parametrize("text", ["mixtral", "4096x14336x8", "4096x14336x8x9", "0x1x1x1", "100x64x4x2", "axbxcxd", ""])
def test_bad_shapes_are_one_error(text: str) -> None:
    with pytest.raises(ValueError, match="--shape must be one of mixtral-8x7b"):
        launch_search.parse_shape(text)


def test_no_gpu_is_one_clear_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemq.cli.run import run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["tune", "--shape", "mixtral-8x7b"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.strip() == (
        "error: gemq tune needs a CUDA device, and torch finds none on this machine"
    )
    assert run(["tune", "--shape", "nonsense"]) == 2
    assert "HIDDENxFFNxEXPERTSxTOPK" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(DeviceError, match="TRITON_INTERPRET"):
        launch_search.check_device()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tuning_on_a_gpu(tmp_path: Path) -> None:
    shape = Shape(256, 128, 4, 2)
    path, found = launch_search.tune([shape], tmp_path / "table.json")
    assert path.exists() and len(found) == len(launch_search.amounts(shape, 16))
    assert all(0 < f.us <= f.default_us for f in found)


@pytest.mark.parametrize("layout", ["canonical", "cpu_tile", "gpu_tile"])
def test_random_stacks_have_sane_weights(layout: str) -> None:
    from gemq import reference

    bits, n, k = [1, 2, 3, 4, 8], 64, 512
    stack = measuring.random_stack(bits, n, k, 128, layout, "cpu", torch.Generator().manual_seed(0))
    x = torch.randn(8, k, generator=torch.Generator().manual_seed(1))
    for e in range(len(bits)):
        ids = torch.full((8, 1), e)
        out = reference.moe_lowbit_gemm(x, *stack, ids, n=n, layout=layout)
        # weights are uniform over a range of 3.5 / sqrt(k), or two-valued at its ends
        assert 0.7 < float(out.std()) < 2.2, bits[e]


def test_random_routing_names_distinct_experts() -> None:
    ids, weights = measuring.random_routing(50, 6, 3, "cpu", torch.Generator().manual_seed(0))
    assert ids.shape == weights.shape == (50, 3) and ids.min() == 0 and ids.max() == 5
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert torch.allclose(weights.sum(-1), torch.ones(50))
