"""Coefficients: what is refused, and their file."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
from random_costs import make_costs

from gemq.algorithms.costs import Costs

GOOD = {"candidates": (1, 2), "routed": np.ones((1, 2, 2)), "layers": (0,), "shared": None, "shared_multiple": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": (2, 1)}, "candidates must be ascending"),
        ({"candidates": (2, 2)}, "candidates must be ascending"),
        ({"candidates": (True, 2)}, "candidates must be ascending"),
        ({"candidates": (1.0, 2.0)}, "candidates must be ascending"),
        ({"candidates": ()}, "candidates must be ascending"),
        ({"candidates": (2, 9)}, "candidates must be an integer in 0..8, got 9"),
        ({"candidates": (1, 2, 3)}, r"routed must be \[L, E, 3\]"),
        ({"routed": np.ones((2, 2))}, "routed must hold numbers in 3 dimensions"),
        ({"routed": np.ones((1, 0, 2))}, "routed must hold numbers in 3 dimensions"),
        ({"routed": [[[1.0, 2.0], [1.0]]]}, "rows of different lengths"),
        ({"routed": [[["1", "2"]]]}, "routed must hold numbers"),
        ({"routed": [[[1.0, math.nan]]]}, r"routed\[0, 0, 1\] must be finite and >= 0, got nan"),
        ({"routed": [[[1.0, math.inf]]]}, "must be finite"),
        ({"routed": [[[1.0, -1e-9]]]}, "must be finite and >= 0"),
        ({"layers": (0, 1)}, "layers must name the 1 layers"),
        ({"layers": (-1,)}, "layers must be ascending"),
        ({"shared": np.ones((1, 3)), "shared_multiple": 2.0}, r"shared must be \[L, B\] = \(1, 2\)"),
        ({"shared": [[math.nan, 1.0]], "shared_multiple": 2.0}, "shared"),
        ({"shared": np.ones((1, 2))}, "shared_multiple must be > 0"),
        ({"shared_multiple": -1.0}, "shared_multiple must"),
        ({"shared_multiple": math.nan}, "shared_multiple must"),
        ({"shared_multiple": "2"}, "shared_multiple must"),
        ({"matrices": np.ones((1, 2, 2))}, "matrices must hold numbers in 4 dimensions"),
        ({"matrices": np.ones((1, 2, 3, 2))}, r"matrices must be \[L, E, 2, B\] = \(1, 2, 2, 2\), got \(1, 2, 3, 2\)"),
        ({"matrices": -np.ones((1, 2, 2, 2))}, r"matrices\[0, 0, 0, 0\] must be finite and >= 0, got -1"),
    ],
)
def test_costs_are_validated(change, message):
    with pytest.raises(ValueError, match=message):
        Costs(**(GOOD | change))


def test_costs_do_not_alias_their_input():
    routed = np.ones((1, 2, 2))
    costs = Costs((1, 2), routed, (0,))
    routed[:] = 7
    assert (costs.routed == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        costs.routed[:] = 7


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("multiple", [0.0, 2.0])
def test_json_round_trip(tmp_path, multiple, matrices):
    costs = make_costs(0, 3, 4, (0, 4, 8), multiple=multiple, decades=12, matrices=matrices)
    path = tmp_path / "costs.json"
    path.write_text("old")
    costs.save(path)
    loaded = Costs.load(path)
    np.testing.assert_array_equal(loaded.routed, costs.routed)
    assert (loaded.candidates, loaded.layers, loaded.shared_multiple) == ((0, 4, 8), (1, 2, 3), multiple)
    assert (loaded.shared is None) == (multiple == 0)
    if multiple:
        np.testing.assert_array_equal(loaded.shared, costs.shared)
    assert (loaded.matrices is None) == (not matrices)
    if matrices:
        np.testing.assert_array_equal(loaded.matrices, costs.matrices)
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]


def test_files_without_matrices_are_read(tmp_path):
    path, costs = tmp_path / "costs.json", make_costs(0)
    costs.save(path)
    content = json.loads(path.read_text())
    assert content["version"] == 2 and content.pop("matrices") is None
    path.write_text(json.dumps(content | {"version": 1}))
    loaded = Costs.load(path)
    np.testing.assert_array_equal(loaded.routed, costs.routed)
    assert loaded.matrices is None
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="missing or unknown keys: \\['matrices'\\]"):
        Costs.load(path)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_costs(0).save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 3},
        {"version": 0},
        {"matrices": [[1.0]]},
        {"version": "1"},
        {"version": True},
        {"routed": None},
        {"routed": [[[1.0, math.nan, 1.0]]]},
        {"candidates": 3},
        {"candidates": "123"},
        {"extra": 1},
        {"shared": [[[]]]},
        {"shared_multiple": None},
        {"shared_multiple": 10**400},
        {"routed": [[[1, 2, 10**400]]]},
    ],
    ids=str,
)
def test_malformed_costs_name_the_file(tmp_path, change):
    path = tmp_path / "costs.json"
    make_costs(0).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"costs\.json: "):
        Costs.load(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": "gemq-costs"}'])
def test_corrupt_costs_name_the_file(tmp_path, content):
    path = tmp_path / "costs.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"costs\.json: "):
        Costs.load(path)


def test_truncated_costs_are_refused(tmp_path):
    path = tmp_path / "costs.json"
    make_costs(0).save(path)
    content = path.read_bytes()
    for end in range(0, len(content) - 2, 37):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"costs\.json: "):
            Costs.load(path)
