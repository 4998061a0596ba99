"""Edited configs of packed checkpoints: widths, models and methods that do not fit are refused in one line."""

from __future__ import annotations

import json

import pytest
from broken_checkpoints import (  # noqa: F401
    LOADERS,
    a_folder,
    a_made,
    a_saved,
    a_sharded,
    edit_config,
    edit_json,
    refused,
)
from tiny_models import tiny_model

from gemq.checkpoint import load_packed_config
from gemq.packed_config import STORED, PackedConfig
from gemq.widths import Widths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 5}, "format version 5, this gemq .* reads up to 4; upgrade"),
        ({"version": "1"}, "version must be a positive integer, got '1'"),
        ({"version": None}, "version must be a positive integer, got None"),
        ({"version": True}, "version must be a positive integer"),
        ({"expert_bits": {"0": [9, 1, 2, 3], "1": [1, 1, 2, 3]}}, r"expert_bits\[0\] must be bits in 0\.\.8, got 9"),
        ({"expert_bits": {"0": [-1, 1, 2, 3], "1": [1, 1, 2, 3]}}, "got -1"),
        ({"expert_bits": {"0": [2.5, 1, 2, 3], "1": [1, 1, 2, 3]}}, "got 2.5"),
        ({"expert_bits": {"0": ["2", 1, 2, 3], "1": [1, 1, 2, 3]}}, "got '2'"),
        ({"expert_bits": {"0": [[[]]], "1": [1, 1, 2, 3]}}, r"got \[\[\]\]"),
        ({"expert_bits": {"0": [1, 2, 2, 3]}}, "does not match its digest"),
        ({"expert_bits": {"0": [], "1": [2]}}, r"expert_bits\['0'\] is malformed"),
        ({"expert_bits": {}}, "expert_bits names no layer"),
        ({"expert_bits": {"x": [2, 2, 2, 2]}}, r"expert_bits\['x'\] is malformed"),
        ({"expert_bits": {"9" * 5000: [2]}}, r"expert_bits\[.*\] is malformed"),
        ({"expert_bits": {"0": 3}}, r"expert_bits\['0'\] is malformed: 3"),
        ({"expert_bits": [[1, 2]]}, "expert_bits must map layers to bits, got list"),
        ({"expert_bits": None}, "expert_bits must map layers to bits, got NoneType"),
        ({"shared_bits": {"0": 0}}, r"shared_bits\[0\] must be bits in 1\.\.8 or 16, got 0"),
        ({"attention_bits": 9}, r"attention_bits must be bits in 1\.\.8 or 16, got 9"),
        ({"dense_bits": True}, "dense_bits must be bits"),
        ({"attention_bits": 8}, "does not match its digest"),
        ({"group_size": 48}, r"group_size must be one of \(32, 64, 128\), got 48"),
        ({"group_size": 64}, "does not match its digest"),
        ({"budget": float("nan")}, "budget must be a number, got nan"),
        ({"method": 3}, "method must be a string, got 3"),
        ({"digest": "0" * 64}, "does not match its digest"),
        ({"digest": None}, "does not match its digest"),
        ({"down_bits": {"0": [9, 2, 2, 2]}}, r"down_bits\[0\] must be bits in 0\.\.8, got 9"),
        ({"down_bits": {}}, "down_bits names no layer"),
        ({"down_bits": [1]}, "down_bits must map layers to bits, got list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_edited_quantization_config(folder, changes, message):
    edit_config(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "down_bits must be absent before format version 3"),
        ({"down_bits": {"0": [2] * 4, "1": [2] * 4}}, "does not match its digest"),
        ({"expert_bits": {"0": [2] * 4, "1": [2] * 4}}, "does not match its digest"),
    ],
    ids=str,
)
def test_edited_widths_of_down(folder, changes, message):
    _with_bits(folder, load_packed_config(folder).widths.experts, {0: [1, 2, 3, 4], 1: [4, 3, 2, 1]})
    edit_config(folder, **changes)
    refused(folder, message)


def test_a_huge_list_of_bits(folder):
    edit_config(folder, expert_bits={"0": [2] * 200_000, "1": [2] * 4})
    refused(folder, "digest")
    edit_config(folder, expert_bits={"0": [2] * 199_999 + [17], "1": [2] * 4})
    refused(folder, "got 17")


def test_exchanged_widths_are_refused_though_the_sizes_fit(folder):
    before = load_packed_config(folder).widths.experts
    row = next(widths for widths in before.values() if len(set(widths)) > 1)
    one, other = row.index(min(row)), row.index(max(row))
    row[one], row[other] = row[other], row[one]
    edit_config(folder, expert_bits={str(k): v for k, v in before.items()})
    refused(folder, "quantization_config does not match its digest: it was edited")


def _with_bits(folder, expert_bits, down_bits=None):
    """Replace the widths and the digest with them, as someone would who knows the format."""
    data = json.loads((folder / "config.json").read_text())
    values = data["quantization_config"]
    values = {k: v for k, v in values.items() if k not in ("quant_method", "digest", "down_bits")}
    values |= {"expert_bits": expert_bits, "down_bits": down_bits or {}}
    widths = Widths(**{part: values.pop(name) for name, part in STORED.items() if name in values})
    data["quantization_config"] = PackedConfig(widths, **values).to_dict()
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({0: [1, 2, 2, 3]}, r"expert_bits names layers \[0\], but the model's MoE layers are \[0, 1\]"),
        ({0: [2] * 4, 7: [2] * 4}, r"names layers \[0, 7\]"),
        ({0: [1, 2, 3], 1: [1, 2, 2, 3]}, r"expert_bits\[0\] has 3 widths for 4 experts"),
        ({0: [8] * 4, 1: [8] * 4}, r"gate_up_codes has shape \[\d+\], expected \[\d+\]"),
    ],
    ids=["layer-missing", "other-layer", "expert-missing", "sizes"],
)
def test_widths_that_do_not_fit_the_model(folder, bits, message):
    _with_bits(folder, bits)
    refused(folder, message)


@pytest.mark.parametrize(
    ("down", "message"),
    [
        ({0: [2] * 4}, "down_bits must be of the layers and experts of expert_bits, got"),
        ({0: [2] * 4, 1: [2] * 3}, "down_bits must be of the layers and experts of expert_bits, got"),
        ({0: [8] * 4, 1: [8] * 4}, r"down_codes has shape \[\d+\], expected \[\d+\]"),
    ],
    ids=["layer-missing", "expert-missing", "sizes"],
)
def test_widths_of_down_that_do_not_fit(folder, down, message):
    _with_bits(folder, load_packed_config(folder).widths.experts, down)
    refused(folder, message)


def test_config_of_another_model(folder):
    edit_json(folder / "config.json", lambda data: data.update(num_hidden_layers=3))
    refused(folder, r"MoE layers are \[0, 1, 2\]")
    edit_json(folder / "config.json", lambda data: data.update(num_hidden_layers=2, hidden_size=128))
    refused(folder, "has shape")
    edit_json(folder / "config.json", lambda data: data.update(hidden_size="wide"))
    refused(folder, "hidden_size must be a whole number", ["gemq"])


def test_a_full_precision_model_is_not_a_packed_one(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", "not a gemq checkpoint: config.json has no quantization_config of gemq", ["gemq"])


@pytest.mark.parametrize("method", ["awq", "gemqq", None, 3])
def test_another_quantization_method(folder, method):
    edit_config(folder, quant_method=method)
    refused(folder, "not a gemq checkpoint", ["gemq"])


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "[" * 50_000, '{"quantization_config": []}'])
def test_config_that_is_not_an_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "is not valid JSON|must hold a JSON object|not a gemq checkpoint", ["gemq"])


def test_a_partial_output_has_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "not a complete checkpoint: it has no config.json", ["gemq"])
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        LOADERS["transformers"](folder)


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "there is no folder .*nowhere", ["gemq"])
