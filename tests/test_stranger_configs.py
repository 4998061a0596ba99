"""Configurations and small files of strangers: exit 2 with file and field, soon, for whatever they hold."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time

import pytest
from tiny_models import FAMILIES, tiny_model

from gemq.errors import CheckpointError
from gemq.integrity import WEIGHTS_FILE, read_header, read_json
from gemq.model_config import (
    MAX_LAYERS,
    alone_config,
    check_sizes,
    config_file,
    generation_config,
    model_config,
    skeleton,
)

WRONG = ["128", True, [3], {"a": 1}, 2.5, -1, 10**30]
# fields that may be anything: notes, names, and what only training reads
FREE = {
    "architectures", "transformers_version", "_name_or_path", "attention_dropout", "router_aux_loss_coef",
    "router_jitter_noise", "aux_loss_alpha", "seq_aux", "initializer_range", "pretraining_tp", "ep_size", "rope_theta",
    "rope_interleave", "num_nextn_predict_layers",
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The stored config of each family."""
    root = tmp_path_factory.mktemp("configs")
    found = {}
    for family in FAMILIES:
        tiny_model(family).config.save_pretrained(root / family)
        found[family] = json.loads((root / family / "config.json").read_text())
    return found


def written(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / "config.json"


def outcome(file):
    """The error of reading a config and making its skeleton, None where it makes one."""
    try:
        config = alone_config(file)
        check_sizes(config, file)
        skeleton(config)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.timeout(120)
def test_every_field_of_every_family_with_every_wrong_value(configs, tmp_path, family):
    """A value that is taken makes a model; one that is not is named with its field. Nothing else is ever raised."""
    unnamed = []
    for field, right in configs[family].items():
        for value in WRONG:
            error = outcome(written(tmp_path, configs[family] | {field: value}))
            size = type(right) is int and field.startswith(("num_", "hidden_size", "vocab", "moe_", "n_"))
            if error is None and size and field not in FREE:
                unnamed.append((field, value, "taken"))
            if error is not None and field not in error:
                unnamed.append((field, value, error))
    # what another field says of it, or the skeleton itself
    others = (" must be ", "no model can be built", "the model type")
    unnamed = [u for u in unnamed if not any(words in u[2] for words in others)]
    assert not unnamed


@pytest.mark.parametrize("field, value", [
    ("hidden_size", "128"), ("num_attention_heads", True), ("hidden_act", "x"), ("hidden_act", 3), ("dtype", "floatx"),
    ("dtype", "int8"), ("dtype", "float8_e4m3fn"), ("dtype", {"a": "float32"}), ("rms_norm_eps", "a"),
    ("rms_norm_eps", -1.0),
    ("num_hidden_layers", 10**9), ("num_hidden_layers", MAX_LAYERS + 1), ("num_labels", 10**9), ("num_labels", "x"),
    ("id2label", 5), ("architectures", "x"), ("architectures", [1]), ("auto_map", 5), ("quantization_config", [1]),
    ("num_experts_per_tok", 9), ("num_key_value_heads", 3), ("head_dim", 0), ("sliding_window", -4),
    ("sliding_window", 0), ("max_position_embeddings", 0), ("tie_word_embeddings", "yes"), ("model_type", 5),
    ("model_type", None), ("transformers_weights", 5), ("rope_parameters", {"rope_theta": -1, "rope_type": "default"}),
    ("rope_parameters", {"rope_theta": float("nan"), "rope_type": "default"}), ("eos_token_id", "a"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "quantize", "generate", "eval", "bench"])
@pytest.mark.timeout(60)
def test_at_the_terminal(gemq_run, model_folder, tmp_path, text_file, field, value, command):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    data = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(data))
    arguments = {
        "plan": [folder, "--bits", 2], "generate": [folder, "it"],
        "quantize": [folder, "-o", tmp_path / "out", "--calibration", text_file, "--samples", 2, "--length", 8],
        "eval": [folder, "--data", text_file, "--length", 8, "--limit", 1],
        "bench": ["--model-config", folder / "config.json", "--random-weights", "--bits", 2, "--tokens", 2],
    }
    if command == "bench" and field == "quantization_config":
        pytest.skip("a config alone has no weights, quantized or not")
    code, out, err = gemq_run(command, *arguments[command])
    assert (code, out) == (2, "") and field in err, err
    assert len(err.strip().splitlines()) == 1 and "internal error" not in err and str(tmp_path) in err
    assert not (tmp_path / "out").exists()


# small files that take long


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"a":' * 100_000, '{"model_type": "mixtral", "hidden_size": ' + "9" * 100_000 + "}",
    '{"a": 1, "a": 2}', "", "\x00", "{", '"text"', "null", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
])  # fmt: skip
@pytest.mark.timeout(30)
def test_json_that_is_none(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        alone_config(written(tmp_path, text))


@pytest.mark.timeout(30)
def test_a_million_keys_take_no_time(tmp_path):
    data = "{" + ",".join(f'"k{n}": 1' for n in range(400_000)) + "}"
    started = time.perf_counter()
    assert len(read_json(written(tmp_path, data))) == 400_000
    with pytest.raises(CheckpointError, match="comes twice"):
        read_json(written(tmp_path, data[:-1] + ',"k7": 2}'))
    assert time.perf_counter() - started < 10


def test_files_that_never_end(tmp_path, model_folder):
    """Pipes and devices under the names of files, and links to them."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    for name in ("config.json", "generation_config.json", WEIGHTS_FILE, "model.safetensors.index.json"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        try:
            model_config(str(folder))
            generation_config(folder)
        except CheckpointError as error:
            assert name == "config.json" and "config.json" in str(error)
        with pytest.raises(CheckpointError):
            read_json(folder / name)
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"no config\.json|no regular file"):
        model_config(str(folder))
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json(tmp_path / "model" / "config.json")


def test_long_files_are_not_read(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as handle:
        handle.truncate(200 << 20)
    with pytest.raises(CheckpointError, match=r"has 209,715,200 bytes, at most"):
        read_json(file)


def test_huge_headers(tmp_path):
    file = tmp_path / WEIGHTS_FILE
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", 90 << 20))
        handle.truncate(100 << 20)
    with pytest.raises(CheckpointError, match=r"has a header of 94,371,840 bytes, at most"):
        read_header(file)


@pytest.mark.timeout(60)
def test_more_layers_than_tensors(gemq_run, model_folder, quick, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    data = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": MAX_LAYERS}
    (folder / "config.json").write_text(json.dumps(data))
    code, _, err = gemq_run("quantize", folder, "-o", tmp_path / "out", "--bits", 2, *quick, "--no-check")
    assert code == 2 and f"config.json says {MAX_LAYERS} layers, but the weight files hold" in " ".join(err.split())


@pytest.mark.timeout(60)
def test_the_most_layers_that_a_config_may_have_are_planned(gemq_run, configs, tmp_path):
    file = written(tmp_path, configs["mixtral"] | {"num_hidden_layers": MAX_LAYERS})
    assert gemq_run("plan", file, "--bits", 2, "--device", "h100", "--format", "json")[0] == 0


# generation configs and tokenizers


@pytest.mark.parametrize("data, field", [
    ({"eos_token_id": "a"}, "eos_token_id"), ({"pad_token_id": 1.5}, "pad_token_id"), ({"eos_token_id": [[1]]}, "eos"),
    ({"eos_token_id": True}, "eos_token_id"), ({"temperature": "hot"}, "temperature"),
    ({"do_sample": 3}, "do_sample"),
    ({"top_p": float("nan")}, "top_p"),
    ({"num_beams": 1, "num_return_sequences": 3}, "num_return_sequences"),
    ([1], "JSON object"), ("{", "not valid JSON"),
])  # fmt: skip
def test_generation_configs(gemq_run, model_folder, quick, tmp_path, data, field):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(data if isinstance(data, str) else json.dumps(data))
    code, out, err = gemq_run("quantize", folder, "-o", tmp_path / "out", "--bits", "2", *quick)
    assert (code, out) == (2, "") and field in err and "generation_config.json" in err
    code, out, err = gemq_run("generate", folder, "it", "--max-new-tokens", 2)
    assert code == 2 and field in err and "generation_config.json" in err and "internal" not in err


@pytest.mark.parametrize("data", [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6}, {"max_length": 5},
    {"pad_token_id": -1}, {"some_new_field": {"a": 1}},
], ids=str)  # fmt: skip
def test_generation_configs_that_transformers_reads_and_will_not_write(gemq_run, model_folder, quick, tmp_path, data):
    """Published models have them; a run must not end on one after hours."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(data))
    for stream in ("--keep=layer", "--keep=model"):
        out = tmp_path / f"out{stream}"
        code, _, err = gemq_run("quantize", folder, "-o", out, "--bits", "2", "--method", "uniform", *quick, stream,
                                "--no-tune-routers")
        assert code == 0, err
        assert json.loads((out / "generation_config.json").read_text()).items() >= data.items()
        assert gemq_run("generate", out, "it", "--max-new-tokens", 2)[0] == 0


@pytest.mark.parametrize("name, text", [
    ("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer.json", '{"model": 5}'),
    ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", '{"tokenizer_class": 5}'), ("tokenizer_config.json", "[1]"),
    ("tokenizer_config.json", '{"model_max_length": "long"}'), ("special_tokens_map.json", "{"),
])  # fmt: skip
def test_tokenizers(gemq_run, model_folder, quick, tmp_path, name, text):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / name).write_text(text)
    for arguments in (["quantize", folder, "-o", tmp_path / "out", "--bits", "2", *quick, "--method", "uniform",
                       "--no-tune-routers"], ["generate", folder, "it", "--max-new-tokens", 2]):
        code, _, err = gemq_run(*arguments)
        assert code in (0, 2) and "internal error" not in err and "Traceback" not in err, err
        assert code == 0 or "token" in err


def test_a_config_is_found_where_it_is_named(tmp_path, model_folder):
    assert config_file(str(model_folder)).name == "config.json"
    for path, message in [(str(tmp_path), "no config.json"), ("./nowhere", "no such folder"), ("a/b/c", "no such")]:
        with pytest.raises(CheckpointError, match=message):
            config_file(path)


def test_fields_that_do_not_fit_together(gemq_run, model_folder, quick, tmp_path, monkeypatch):
    """An error of the family's own code is one line, with what it said."""
    from transformers import MixtralModel

    def broken(self, *args, **kwargs):
        raise RuntimeError("split_with_sizes expects split_sizes to sum exactly to 8")

    monkeypatch.setattr(MixtralModel, "forward", broken)
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--bits", "2", *quick)
    assert code == 2 and "the forward pass of MixtralForCausalLM fails: RuntimeError: split_with_sizes" in err
    assert "Traceback" not in err and not (tmp_path / "out").exists()
