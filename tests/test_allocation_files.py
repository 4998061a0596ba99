"""Bit allocations of others: read without running anything, fitted to the model or refused in one line."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import pickletools
import random

import numpy as np
import pytest
import torch
from packed_models import quantized
from safetensors.torch import load_file
from tiny_models import tiny_model

from gemq.algorithms.given_allocation import GivenAllocation
from gemq.algorithms.method import MethodConfig
from gemq.checkpoint import load_packed_config
from gemq.cli.run import run
from gemq.interchange import read_allocation
from gemq.interchange.plain_pickles import PickleError, read_plain_pickle
from gemq.models import describe

# as gemq/allocate_bits.py of the authors writes them: {decoder layer: {expert: bits}}, the merged shared expert last
MIXTRAL = {0: {0: 2, 1: 3, 2: 1, 3: 2}, 1: {0: 1, 1: 3, 2: 2, 3: 2}}
DEEPSEEK = {1: {0: 1, 1: 3, 2: 2, 3: 1, 4: 3}, 2: {0: 2, 1: 3, 2: 1, 3: 1, 4: 2}}


def pickled(tmp_path, value, protocol=4, name="allocation.pkl"):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def rows(value):
    return tuple(tuple(row.values()) for row in value.values())


@pytest.fixture(scope="module")
def mixtral():
    return describe(tiny_model("mixtral"))


@pytest.fixture(scope="module")
def deepseek():
    return describe(tiny_model("deepseek_v2"))


# files


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_authors_layout(tmp_path, protocol):
    found = read_allocation(pickled(tmp_path, DEEPSEEK, protocol))
    assert found.layers == (1, 2) and found.rows == rows(DEEPSEEK) and found.shared is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", [
    lambda: np.array(rows(MIXTRAL)),
    lambda: np.asfortranarray(np.array(rows(MIXTRAL), dtype=">i2")),
    lambda: np.array(rows(MIXTRAL), dtype=np.uint8),
    lambda: np.array(rows(MIXTRAL), dtype=np.float32),
    lambda: [list(row) for row in rows(MIXTRAL)],
    lambda: [np.array(row) for row in rows(MIXTRAL)],
    lambda: tuple(tuple(np.int64(w) for w in row) for row in rows(MIXTRAL)),
], ids=["int64", "fortran-int16", "uint8", "float", "lists", "arrays", "scalars"])  # fmt: skip
def test_arrays_and_lists_have_no_layer_numbers(tmp_path, make, protocol):
    found = read_allocation(pickled(tmp_path, make(), protocol))
    assert found.layers is None and found.rows == rows(MIXTRAL)


@pytest.mark.parametrize("make", [
    lambda: collections.OrderedDict((k, [v[e] for e in v]) for k, v in reversed(MIXTRAL.items())),
    lambda: {np.int64(k): np.array(list(v.values())) for k, v in MIXTRAL.items()},
    lambda: {k: {np.int64(e): np.int8(w) for e, w in v.items()} for k, v in MIXTRAL.items()},
])
def test_layers_are_ordered_by_their_numbers(tmp_path, make):
    found = read_allocation(pickled(tmp_path, make()))
    assert found.layers == (0, 1) and found.rows == rows(MIXTRAL)


def test_our_own_json(tmp_path):
    record = {"budget": 2.0, "expert_bits": {"0": [2, 3], "1": [1, 2]}, "shared_bits": None, "gap": 0.0}
    other = {**record, "budget": 1.5, "shared_bits": [3, 4]}
    path = tmp_path / "found.json"
    path.write_text(json.dumps([record, other]))
    assert read_allocation(path, 2.0).rows == ((2, 3), (1, 2)) and read_allocation(path, 2.0).budget == 2.0
    assert read_allocation(path, 1.5).shared == (3, 4)
    with pytest.raises(ValueError, match=r"found.json: it holds allocations for the budgets \[2.0, 1.5\]; say which"):
        read_allocation(path)
    path.write_text(json.dumps({"0": [2, 3], "1": {"0": 1, "1": 2}}))
    assert read_allocation(path).rows == ((2, 3), (1, 2))
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"expert_bits": {"1": [1, 2]}, "shared_bits": {"1": 4}, "budget": 1.5}})
    )
    found = read_allocation(tmp_path)
    assert (found.rows, found.layers, found.shared, found.budget) == (((1, 2),), (1,), (4,), 1.5)


@pytest.mark.parametrize("content, message", [
    ("nothing", "maps no layers"), ({}, "maps no layers"), (3, "maps no layers"), ([3], "row 0 must be widths"),
    ({"a": [1]}, "layers must be numbered, got 'a'"), ({0: {1: 2}}, "layer 0 has no width for expert 0"),
    ({0: [1.5]}, "layer 0 must have whole numbers of bits, got 1.5"), ({0: ["2"]}, "whole numbers of bits, got '2'"),
    ({0: [True]}, "whole numbers"), ({0: [17]}, r"widths in 0..16, got 17"), ({0: [-1]}, "in 0..16"), ({0: []}, "be"),
    ({-1: [1]}, "layers must be numbered"), ({0: [1], "0": [1]}, "a layer comes twice"),
    ({0: np.zeros((2, 2))}, "must be widths"), ({0: [None]}, "whole"), ({0: [float("nan")]}, "whole"),
    (np.array(3), "maps no layers"),
    ({0: np.array(3)}, "layer 0 must be widths"), (np.zeros(3), "maps no layers"),
])  # fmt: skip
def test_malformed_contents_are_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_allocation(pickled(tmp_path, content))
    assert "allocation.pkl" in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_neither_json_nor_pickle(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x.json: neither JSON nor a pickle \(.pkl\)"):
        read_allocation(path)
    with pytest.raises(FileNotFoundError):
        read_allocation(tmp_path / "none.pkl")


# pickles are never run


class _Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("evil", [
    lambda flag: _Runs(os.system, f"touch {flag}"), lambda flag: _Runs(eval, f"open({str(flag)!r}, 'w')"),
    lambda flag: _Runs(np.load, "/etc/hostname"), lambda flag: _Runs(getattr, np, "load"),
    lambda flag: {0: _Runs(print, 1)},
    lambda flag: np.array([_Runs(os.system, f"touch {flag}")], dtype=object), lambda flag: pytest,
    lambda flag: os.system,
], ids=["system", "eval", "np.load", "getattr", "inside", "object array", "module", "function"])  # fmt: skip
def test_nothing_in_a_pickle_is_run(tmp_path, evil, capfd):
    flag = tmp_path / "ran"
    try:
        content = pickle.dumps(evil(flag))
    except TypeError:
        content = b"cos\nsystem\n(S'touch " + str(flag).encode() + b"'\ntR."
    (tmp_path / "evil.pkl").write_bytes(content)
    with pytest.raises(PickleError, match=r"evil.pkl: (it names|arrays of|it holds)"):
        read_plain_pickle(tmp_path / "evil.pkl")
    assert not flag.exists() and capfd.readouterr().out == ""


@pytest.mark.parametrize("program", [
    b"\x80\x04\x82\x01.", b"\x80\x04Pid\n.", b"i__builtin__\neval\n.", b"\x80\x02c__builtin__\ngetattr\n.",
    b"\x80\x04r\xff\xff\xff\xff.", b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", b"", b"\x80\x09.", b"garbage",
    b"\x80\x04]\x94h\x00a.", b"\x80\x04" + b"]" * 20 + b"a" * 19 + b".", b"\x80\x04\x8c\x03cos\x8c\x06system\x93.",
])
def test_odd_programs_are_refused(tmp_path, program):
    (tmp_path / "odd.pkl").write_bytes(program)
    with pytest.raises(PickleError, match=r"odd.pkl: "):
        read_plain_pickle(tmp_path / "odd.pkl")


def test_mutated_pickles_give_plain_values_or_one_error(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "mutated.pkl"
    source = pickle.dumps({"a": np.arange(6).reshape(2, 3), "b": DEEPSEEK, "c": np.float64(2)}, 4)
    survived = 0
    for _ in range(1500):
        content = bytearray(source)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randint(len(content) // 2, len(content))] if draw.random() < 0.2 else content)
        try:
            json.dumps(read_plain_pickle(path), default=np.ndarray.tolist, skipkeys=True)
            survived += 1
        except PickleError as error:
            assert "mutated.pkl" in str(error)
    assert 50 < survived < 1450


def test_a_pickle_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gemq.interchange.plain_pickles.LARGEST", 10)
    with pytest.raises(PickleError, match="are more than a bit allocation takes"):
        read_plain_pickle(pickled(tmp_path, MIXTRAL))


def test_no_opcode_reaches_past_the_stand_ins():
    """Every opcode that can make an object goes through ``find_class`` or ``get_extension``, or makes a plain value."""
    makers = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
    assert makers <= {op.name for op in pickletools.opcodes}
    for name, value in (("PERSID", b"Px\n."), ("BINPERSID", b"Nq\x00Q.")):
        with pytest.raises(pickle.UnpicklingError, match="persistent"):
            pickle._Unpickler(io.BytesIO(value)).load()
        assert name in makers


# fitting to a model


def test_fit_takes_shape_and_mean_from_the_model(mixtral, deepseek):
    found = GivenAllocation("f", rows(MIXTRAL), (0, 1)).fit(mixtral)
    assert found.bits.tolist() == [[2, 3, 1, 2], [1, 3, 2, 2]] and found.bits_per_expert == found.budget == 2.0
    assert found.solver == "file" and found.shared_bits is None
    with_shared = GivenAllocation("f", rows(DEEPSEEK), (1, 2)).fit(deepseek)
    assert with_shared.shared_bits.tolist() == [3, 2] and with_shared.bits.shape == (2, 4)
    # two shared experts merged into one: 14 bits of 8 routed experts and twice 3 + 2 of the shared
    assert with_shared.bits_per_expert == (14 + 2 * 5) / (8 + 4)
    overridden = GivenAllocation("f", rows(DEEPSEEK), (1, 2)).fit(deepseek, shared_bits=4)
    assert overridden.shared_bits is None and overridden.bits_per_expert == 14 / 8


@pytest.mark.parametrize("given, budget, message", [
    (GivenAllocation("f", rows(MIXTRAL), (1, 2)), None, "f allocates layers 1, 2, but .* layers are 0, 1"),
    (GivenAllocation("f", rows(MIXTRAL)[:1]), None, "f allocates 1 layers, but the model has 2"),
    (GivenAllocation("f", rows(DEEPSEEK)), None, "f has 5 widths a layer, the model 4"),
    (GivenAllocation("f", ((1, 2, 3, 4), (1, 2))), None, "f has 2, 4 widths a layer"),
    (GivenAllocation("f", ((1, 2, 3, 9),) * 2), None, r"f gives an expert 9 bits; allowed are 0..8"),
    (GivenAllocation("f", rows(MIXTRAL), shared=(1, 1)), None, "the model has none"),
    (GivenAllocation("f", rows(MIXTRAL)), 1.9, "f takes 2 bits per expert, more than the budget of 1.9"),
])
def test_a_misfit_is_refused(mixtral, given, budget, message):
    with pytest.raises(ValueError, match=message):
        given.fit(mixtral, budget)


def test_a_shared_expert_of_no_bits_is_refused(deepseek):
    with pytest.raises(ValueError, match=r"f gives a shared expert 0 bits; allowed are 1..8 and 16"):
        GivenAllocation("f", ((1, 2, 3, 4, 0),) * 2).fit(deepseek)
    with pytest.raises(ValueError, match="f has 3 widths a layer, the model 4 routed experts, or 5 with the"):
        GivenAllocation("f", ((1, 2, 3),) * 2).fit(deepseek)


# the command


def test_quantize_by_a_file(tmp_path, model_folder, text_file, capsys):
    options = ["--calibration", str(text_file), "--samples", "6", "--length", "24", "--no-tune-routers"]
    path = pickled(tmp_path, MIXTRAL)
    target = tmp_path / "out"
    assert run(["quantize", str(model_folder), "-o", str(target), "--allocation", str(path), *options]) == 0
    packed = load_packed_config(target)
    assert packed.widths.experts == {0: [2, 3, 1, 2], 1: [1, 3, 2, 2]}
    assert (packed.method, packed.budget) == ("given", 2.0)
    report = json.loads((target / "gemq_report.json").read_text())
    assert report["solver"] == "file" and report["options"]["method"]["given"]["source"] == str(path)
    assert not (target / "gemq_costs.json").exists()
    capsys.readouterr()
    assert run(["quantize", str(model_folder), "-o", str(tmp_path / "again"), "--allocation", str(target), "--bits",
                "1.5", *options]) == 2  # fmt: skip
    assert "takes 2 bits per expert, more than the budget of 1.5" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert run(["quantize", str(model_folder), "-o", str(tmp_path / "again"), "--allocation", str(path), "--bits",
                "2,1.5", *options]) == 2  # fmt: skip
    assert "--allocation is for one budget" in capsys.readouterr().err


def test_streamed_and_in_memory_and_resumed_are_one(tmp_path, model_folder, text_file, capsys):
    """The widths of a file are part of what a run directory remembers."""
    options = ["--calibration", str(text_file), "--samples", "6", "--length", "24", "--no-tune-routers"]
    path = pickled(tmp_path, MIXTRAL)
    quantize = ["quantize", str(model_folder), "--allocation", str(path), *options]
    assert run([*quantize, "-o", str(tmp_path / "memory"), "--keep=model"]) == 0
    assert run([*quantize, "-o", str(tmp_path / "disk"), "--keep-run"]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "disk"))
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
    assert run(["quantize", "--resume", str(tmp_path / "disk.run")]) == 0
    other = pickled(tmp_path, {0: MIXTRAL[1], 1: MIXTRAL[0]}, name="other.pkl")
    capsys.readouterr()
    assert run(["quantize", "--resume", str(tmp_path / "disk.run"), "--allocation", str(other)]) == 2
    assert "--allocation" in capsys.readouterr().err


def test_a_plan_has_the_given_widths(mixtral, deepseek):
    from gemq.planning import check_budgets, planned_widths

    given = GivenAllocation("f", rows(DEEPSEEK), (1, 2))
    planned = planned_widths(deepseek, MethodConfig(budgets=(8,), given=given), 8)
    assert planned.widths.experts == {1: [1, 3, 2, 1], 2: [2, 3, 1, 1]} and planned.widths.shared == {1: 3, 2: 2}
    with pytest.raises(ValueError, match="f allocates layers 1, 2"):
        check_budgets(mixtral, MethodConfig(budgets=(8,), given=given))


def test_given_widths_are_what_is_quantized():
    given = GivenAllocation("f", rows(DEEPSEEK), (1, 2))
    made = quantized("deepseek_v2", budget=8, given=given, tune=False)
    widths = made.config.widths
    assert widths.experts == {1: [1, 3, 2, 1], 2: [2, 3, 1, 1]} and widths.shared == {1: 3, 2: 2}
    assert made.stage.statistics is None
