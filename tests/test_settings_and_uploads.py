"""Settings files, recipes, model cards and uploads."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import typer
import yaml
from cli_conventions import a_made, commands, offered  # noqa: F401
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from gemq import hub
from gemq.card import hub_name, write_card
from gemq.checkpoint_summary import summarize
from gemq.cli.app import app
from gemq.evaluations import Score, record
from gemq.recipes import RECIPES, Recipe


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(gemq_run, model_folder, tmp_path):
    file = write(tmp_path / "s.yaml", {"model": str(model_folder), "output": str(tmp_path / "o"), "bits": [2.5, 2],
                                       "attention-bits": 8, "tensor_bits": {"o_proj": 3}, "method": "uniform"})
    _, out, err = gemq_run("quantize", "--config", file, "--dry-run", "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    bits = {r["tensor"]: r["bits"] for r in rows if r["budget"] == 2.0}
    assert {r["budget"] for r in rows} == {2.5, 2.0}, err
    assert bits["model.layers.0.self_attn.q_proj.weight"] == 8 and bits["model.layers.0.self_attn.o_proj.weight"] == 3
    _, out, _ = gemq_run("quantize", "--config", file, "--dry-run", "--format", "jsonl", "--bits", "3",
                         "--attention-bits", "5")
    rows = [json.loads(line) for line in out.splitlines()]
    bits = {r["tensor"]: r["bits"] for r in rows}
    assert {r["budget"] for r in rows} == {3.0} and bits["model.layers.1.self_attn.k_proj.weight"] == 5


@pytest.mark.parametrize(("content", "message"), [
    ({"sampels": 3}, "unknown key 'sampels'; did you mean samples"),
    ({"zzz": 3}, "unknown key 'zzz'; gemq settings quantize shows all"),
    ({"samples": "many"}, "samples"),
    ({"samples": True}, "samples must be a text, a number or a list of them, got True"),
    ({"overwrite": "yes"}, "overwrite must be true or false, got 'yes'"),
    ({"bits": {"a": 1}}, "bits must be a text"),
    ("- a\n- b\n", "must hold keys and values, got list"),
    ("a: [1\n", "is not YAML"),
    ("samples: 1\nsamples: 2\n", "the key 'samples' comes twice"),
    ("a: !!python/object/apply:os.system ['true']\n", "is not YAML"),
])
def test_bad_settings_files(gemq_run, model_folder, tmp_path, content, message):
    file = write(tmp_path / "s.yaml", content)
    code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", "--dry-run", "--config", file)
    assert (code, out) == (2, "") and message in " ".join(err.split()), err
    assert gemq_run("quantize", model_folder, "-o", tmp_path / "o", "--config", tmp_path / "none.yaml")[0] == 2


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "bench"])
def test_the_example_is_a_settings_file_with_every_option(gemq_run, command, tmp_path):
    code, out, _ = gemq_run("settings", command, "--example")
    assert code == 0 and yaml.safe_load(out) is None
    active = "\n".join(line[2:] for line in out.splitlines() if re.match(r"# [a-z-]+:", line))
    found = yaml.safe_load(active)
    # trust is for whoever types the command
    names = {p.name for p in offered(commands()[command])} - {"config_file", "help", "help_all", "trust_remote_code"}
    assert len(found) == len(names) and gemq_run("settings", command)[1].split() == list(found)
    if command == "quantize":
        assert found["samples"] == 128 and found["candidates"] == "1,2,3" and found["tune-routers"] is True


def test_settings_serve_other_commands(gemq_run, made, text_file, tmp_path):
    file = write(tmp_path / "e.yaml", {"data": str(text_file), "length": 32, "limit": 2})
    code, out, _ = gemq_run("eval", made, "--config", file, "--format", "jsonl", "-q")
    assert code == 0 and json.loads(out)["tokens"] == 2 * 31
    assert gemq_run("settings", "inspect")[0] == 2


@pytest.fixture
def told(monkeypatch):
    """Record the arguments that `gemq quantize` would hand to the library."""
    seen = []
    monkeypatch.setattr("gemq.cli.quantizing.show_preview", lambda config, form: seen.append(config))
    return seen


def test_recipes_set_what_is_not_given(gemq_run, told, tmp_path):
    base = ["quantize", "m", "-o", tmp_path / "o", "--dry-run"]
    for recipe in Recipe:
        assert gemq_run(*base, "--recipe", recipe.value)[0] == 0
    assert gemq_run(*base, "--recipe", "fast", "--samples", "128", "--tune-routers")[0] == 0
    file = write(tmp_path / "s.yaml", {"recipe": "fast", "constraints": "c2c3"})
    assert gemq_run(*base, "--config", file)[0] == 0
    default, best, paper, fast, explicit, mixed = told
    assert (default.samples, default.method.per_layer, default.method.perturbation) == (128, "none", "gptq")
    assert (best.samples, best.method.per_layer, best.method.perturbation) == (256, "none", "gptq")
    assert (paper.samples, paper.method.perturbation, paper.method.gptq.propagate_from) == (128, "rtn", 4)
    assert (fast.samples, fast.method.estimate, fast.method.tune) == (32, "fp", False)
    # what is said counts, also where it says the default
    assert (explicit.samples, explicit.method.tune, explicit.method.estimate) == (128, True, "fp")
    assert (mixed.method.per_layer, mixed.samples) == ("c2c3", 32)
    assert gemq_run(*base, "--recipe", "slow")[0] == 2
    names = {p.name for p in typer.main.get_command(app).commands["quantize"].params}
    assert all(set(values) <= names for values in RECIPES.values())


# model cards and uploads


def test_the_card_says_what_the_hub_reads(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "2.5")
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags[0] == "gemq" and card.data.library_name == "transformers" and card.data.base_model is None
    assert str(made.parent) not in card.text and "## Measured" not in card.text
    summary = summarize(folder)
    assert f"{summary.expert_bits:.3f} bits: " in card.text and f"{summary.tensor_bytes / 1e6:,.1f} MB" in card.text
    report = json.loads((folder / "gemq_report.json").read_text())
    report["options"]["model"] = "mistralai/Mixtral-8x7B-v0.1"
    (folder / "gemq_report.json").write_text(json.dumps(report))
    record(folder, Score("wiki|text", 2048, 4.125, 2047))
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "mistralai/Mixtral-8x7B-v0.1" and card.data.base_model_relation == "quantized"
    assert r"| wiki\|text | 2,048 | 2,047 | 4.125 |" in card.text
    assert f"# {tmp_path.name}-2.5" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    compile(code, "card", "exec")


def test_folders_are_no_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert hub_name("owner/name") == "owner/name"
    assert [hub_name(n) for n in ("a/b", "/x/y", "./x", "name", "x/y/z", "~/m")] == [None] * 6


class FakeApi:
    """The hub, as far as uploading goes; keeps what it was sent."""

    def __init__(self, fail: str = ""):
        self.fail, self.calls = fail, []

    def whoami(self):
        if self.fail == "whoami":
            raise OSError("no token\nmore")
        return {"name": "me"}

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append(("create", repo, private))
        assert exist_ok
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        if self.fail == "upload":
            raise OSError("connection lost\nmore")
        names = sorted(p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file())
        self.calls.append(("upload", repo_id, list(filter_repo_objects(names, allow_patterns=allow_patterns))))


@pytest.fixture
def api(monkeypatch):
    """Nothing leaves the machine."""
    fake = FakeApi()
    monkeypatch.setattr(hub, "_api", lambda: fake)
    return fake


def test_quantizing_can_upload_every_budget(gemq_run, api, model_folder, quick, tmp_path):
    options = ["--bits", "2.5,2", "--method", "uniform", "--upload-repo", "me/tiny", "--private"]
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", *quick, *options)
    assert code == 0, err
    assert [c[:2] for c in api.calls] == [("create", "me/tiny-2.5"), ("upload", "me/tiny-2.5"),
                                          ("create", "me/tiny-2"), ("upload", "me/tiny-2")]
    assert api.calls[0][2] is True
    assert {"config.json", "model.safetensors", "README.md", "gemq_manifest.json"} <= set(api.calls[1][2])
    assert 'from_pretrained("me/tiny-2")' in (tmp_path / "o" / "2" / "README.md").read_text()
    assert "https://hub/me/tiny-2.5" in err


def test_uploads_fail_early_and_can_be_repeated(gemq_run, api, made, model_folder, quick, tmp_path):
    api.fail = "whoami"
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", *quick, "--upload-repo", "me/x")
    assert code == 2 and "run `hf auth login` (no token)" in err and not list(tmp_path.iterdir())
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", *quick, "--upload-repo", "a/b/c")
    assert code == 2 and "upload_repo must be like owner/name, got 'a/b/c'" in err and not list(tmp_path.iterdir())
    api.fail = "upload"
    copy = shutil.copytree(made, tmp_path / "copy")
    code, _, err = gemq_run("upload", copy, "me/x")
    assert code == 2 and "me/x could not be uploaded (connection lost)" in err and "`gemq upload` tries again" in err
    api.fail = ""
    (copy / "README.md").write_text("my own card")
    assert gemq_run("upload", copy, "me/x") == (0, "https://hub/me/x\n", "")
    assert (copy / "README.md").read_text() == "my own card"


def test_a_damaged_checkpoint_is_not_uploaded(gemq_run, api, made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    code, _, err = gemq_run("upload", copy, "me/x")
    assert code == 2 and "differs from its SHA-256" in err and not api.calls
