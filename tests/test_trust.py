"""Code and files of a stranger: what a checkpoint, a settings file or a run directory may not make gemq do."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from packed_models import written_by_the_command

import gemq
from gemq import hub, interchange
from gemq.cli.run import run
from gemq.engine.fingerprint import digest
from gemq.errors import CheckpointError
from gemq.folders import is_companion, is_known
from gemq.integrity import MANIFEST_FILE, WEIGHTS_FILE
from gemq.pipeline import QuantizeConfig

PACKAGE = Path(gemq.__file__).parent
# calls of transformers that ask on standard input whether to run a model's code, unless they are told
ASKING = {"AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoModel", "AutoModelForCausalLM", "HFLM",
          "auto_class"}


@pytest.fixture(scope="module")
def made(model_folder, quick, tmp_path_factory):
    """A packed checkpoint of the tiny model."""
    return written_by_the_command(model_folder, quick, tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "tiny")


# code


def test_every_call_that_could_ask_for_trust_says_what_it_trusts():
    """Of the package's sources: also those that no test runs."""
    silent, seen = [], []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            owner = owner.func if isinstance(owner, ast.Call) else owner  # auto_class(config)
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if name in ASKING and node.func.attr in ("from_pretrained", "from_config"):
                seen.append(path.relative_to(PACKAGE).as_posix())
                if "trust_remote_code" not in {keyword.arg for keyword in node.keywords}:
                    silent.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    # each of them, and nowhere else: a config, a skeleton, a packed model, a tokenizer, a full-precision model
    assert seen == ["checkpoint.py", "loading.py", "loading.py", "model_config.py", "model_config.py"] and not silent


def hostile(folder: Path, flag: Path, model_type: str | None = "evilmix") -> Path:
    """Let the folder's config name code that leaves ``flag``, for the model, its config and its tokenizer."""
    classes = "class Cfg(MixtralConfig):\n    model_type = 'evilmix'\n"
    (folder / "modeling_evil.py").write_text(
        f"from transformers import MixtralConfig\nopen({str(flag)!r}, 'w').write('ran')\n{classes}"
    )
    names = {"AutoConfig": "modeling_evil.Cfg", "AutoModelForCausalLM": "modeling_evil.Cfg"}
    for file in ("config.json", "tokenizer_config.json"):
        data = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        data["auto_map"] = names if file == "config.json" else {"AutoTokenizer": ["modeling_evil.Cfg", None]}
        if file == "config.json" and model_type:
            data["model_type"] = model_type
        (folder / file).write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("model_type", ["evilmix", None], ids=["unknown-type", "known-type"])
@pytest.mark.parametrize("command", [
    ["export", "{}", "-o", "{}.out"], ["import-gptq", "{}", "-o", "{}.out"], ["inspect", "{}"], ["verify", "{}"],
    ["generate", "{}", "it", "--max-new-tokens", "2"], ["report", "{}", "-o", "{}.html"],
    ["eval", "{}", "--data", "{text}", "--length", "16"], ["upload", "{}", "me/x"],
    ["quantize", "{}", "-o", "{}.out", "--calibration", "{text}"], ["plan", "{}"], ["bench", "{}"],
], ids=lambda command: command[0])  # fmt: skip
def test_no_command_runs_code_that_was_not_trusted(
    folder, tmp_path, text_file, monkeypatch, capsys, command, model_type
):
    flag = tmp_path / "ran"
    hostile(folder, flag, model_type)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    monkeypatch.setattr(hub, "check_login", lambda: "me")
    code = run([part.format(folder, text=text_file) for part in command])
    captured = capsys.readouterr()
    assert not flag.exists() and code in (0, 2) and "internal error" not in captured.err
    assert "[y/N]" not in captured.out + captured.err
    if model_type and command[0] in ("export", "generate", "eval", "quantize"):
        assert code == 2


def test_the_library_runs_no_code_either(folder, tmp_path, text_file, monkeypatch):
    hostile(folder, tmp_path / "ran")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    for call in (gemq.from_pretrained, lambda f: interchange.export(f, tmp_path / "out"),
                 lambda f: gemq.generate(f, "it"), lambda f: gemq.evaluate(f, str(text_file), length=16)):
        with pytest.raises(CheckpointError):
            call(folder)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["trust-remote-code", "trust_remote_code"])
def test_a_settings_file_gives_no_trust(gemq_run, tmp_path, model_folder, key):
    (tmp_path / "s.yaml").write_text(f"{key}: true\n")
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", "--config", tmp_path / "s.yaml")
    assert code == 2 and "trust-remote-code is given on the command line only" in err
    assert "trust" not in gemq_run("settings", "--example")[1]


# run directories


def run_of(tmp_path: Path, change: dict, name: str = "o.run") -> Path:
    """A run directory whose manifest is sealed rightly, with other fields in its command."""
    work = tmp_path / name
    work.mkdir(parents=True)
    command = json.loads(json.dumps(asdict(QuantizeConfig("nowhere", str(tmp_path / "o")))))
    for path, value in change.items():
        place, *names = [command, *path.split(".")]
        for part in names[:-1]:
            place = place[part]
        if value is KeyError:
            del place[names[-1]]
        else:
            place[names[-1]] = value
    data = {"settings": {}, "command": command}
    (work / "manifest.json").write_text(json.dumps({**data, "sha256": digest(data)}))
    return work


def test_trust_is_given_again(gemq_run, tmp_path):
    code, _, err = gemq_run("quantize", "--resume", run_of(tmp_path, {"trust_remote_code": True}))
    assert code == 2 and "was begun with --trust-remote-code: give it again" in err


@pytest.mark.parametrize("output", ["elsewhere/o", "../o", "o.run/o", "o2", "/", ""])
def test_a_run_directory_says_not_where_to_write(gemq_run, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    work = run_of(tmp_path, {"output": output, "log": str(tmp_path / "log.jsonl"), "run_dir": str(tmp_path / "x.run")})
    code, _, err = gemq_run("quantize", "--resume", work)
    assert code == 2 and "which it does not lie beside; say where with --output" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.run"]
    code, _, err = gemq_run("quantize", "--resume", work, "-o", tmp_path / "mine")
    # on to the model, which is nowhere, and no log is written where the manifest says
    assert code == 2 and "nowhere" in err and not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("change, field", [
    ({"samples": "8"}, "command.samples"), ({"samples": None}, "command.samples"), ({"model": 3}, "command.model"),
    ({"seed": 1.5}, "command.seed"), ({"overwrite": 1}, "command.overwrite"), ({"extra": 1}, "command.extra"),
    ({"method": []}, "command.method"), ({"method.budgets": 2}, "command.method.budgets"),
    ({"method.budgets": ["2"]}, "command.method.budgets.0"), ({"method.gptq": None}, "command.method.gptq"),
    ({"method.gptq.clip": "x"}, "command.method.gptq"), ({"method.gptq.damping": "x"}, "command.method.gptq.damping"),
    ({"method.router": {"a": 1}}, "command.method.router"), ({"method.given": {"rows": 1}}, "command.method.given"),
    ({"method.tensor_bits": [{"pattern": "(", "bits": 2}]}, "command.method.tensor_bits.0"),
    ({"method.tensor_bits": [["x", 2]]}, "command.method.tensor_bits.0"), ({"model": KeyError}, "command.model"),
    ({"scratch": "elsewhere"}, "command"),
], ids=str)
def test_a_malformed_run_directory_is_named_with_its_field(gemq_run, tmp_path, change, field):
    code, _, err = gemq_run("quantize", "--resume", run_of(tmp_path, change))
    assert code == 2 and f"manifest.json is malformed at {field}" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"sha256": 1}', "[" * 100_000, "null", '"x"'])
def test_a_manifest_that_is_none(gemq_run, tmp_path, text):
    (tmp_path / "o.run").mkdir()
    (tmp_path / "o.run" / "manifest.json").write_text(text)
    code, _, err = gemq_run("quantize", "--resume", tmp_path / "o.run")
    assert code == 2 and "no readable manifest" in err


# files that are copied and published


def clutter(folder: Path, outside: Path) -> None:
    """Write files that a stranger's folder may hold."""
    outside.mkdir()
    for name in ("secret.txt", "LICENSE", "merges.txt"):
        (outside / name).write_text("secret")
    (folder / "notes.txt").symlink_to(outside / "secret.txt")
    (folder / "LICENSE").symlink_to(outside / "LICENSE")
    (folder / "merges.txt").symlink_to(outside / "merges.txt")
    (folder / "NOTICE").symlink_to(folder / "nowhere")
    (folder / "additional_chat_templates").symlink_to(outside)
    (outside / "default.jinja").write_text("secret")
    for name in ("thesis.txt", "modeling_x.py", "vocab.pkl", "tokenizer.model.py", ".env", "pytorch_model.bin"):
        (folder / name).write_text("secret")
    (folder / "LICENSE.txt").write_text("yours")


def test_export_copies_files_of_known_names_only(folder, tmp_path, gemq_run):
    clutter(folder, tmp_path / "outside")
    code, _, err = gemq_run("export", folder, "-o", tmp_path / "out")
    assert code == 0, err
    left = {p.name: p for p in (tmp_path / "out").rglob("*")}
    assert {"config.json", WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json", "LICENSE.txt"} <= set(left)
    assert not any(path.is_symlink() for path in left.values())
    assert not any("secret" in p.read_text(errors="replace") for p in left.values() if p.is_file())
    for name in ("thesis.txt", "modeling_x.py", "notes.txt", "LICENSE (no regular file of the folder)"):
        assert name in " ".join(err.split())
    assert not set(left) & {"modeling_x.py", ".env", "thesis.txt", "additional_chat_templates", "pytorch_model.bin"}


@pytest.mark.parametrize("name, known", [
    ("tokenizer.json", True), ("vocab.txt", True), ("spiece.model", True), ("additional_chat_templates/a.jinja", True),
    ("LICENSE", True), ("USE_POLICY.md", True), ("qwen.tiktoken", True), ("chat_template.jinja", True),
    ("vocab.pkl", False), ("vocab.PKL", False), ("LICENSE.py", False), ("tokenizer.py", False), (".env", False),
    ("sub/tokenizer.json", False), ("additional_chat_templates/a.py", False), ("LICENSE/x", False), ("a.json", False),
    (".hidden.model", False),
])
def test_names_of_companions(name, known):
    assert is_companion(name) is known
    assert not is_known(name) or known


class Api:
    """The hub, as far as uploading goes."""

    def __init__(self):
        self.sent: list[str] = []

    def create_repo(self, repo, **options):
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        names = [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()]
        self.sent = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))


def test_upload_sends_what_the_manifest_and_gemq_know(folder, tmp_path):
    (folder / "thesis.txt").write_text("years of work")
    (folder / ".env").write_text("TOKEN=secret")
    (folder / "LICENSE").write_text("yours")
    api = Api()
    hub.upload(folder, "me/x", api=api)
    recorded = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    assert set(api.sent) == {*recorded, MANIFEST_FILE, "README.md", "gemq_run.json", "LICENSE"}
    assert hub.published(folder)[1] == [".env", "thesis.txt"]


def test_upload_sends_no_links_and_no_code_that_a_manifest_records(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"README\.md is a link to .*secret, out of the folder"):
        hub.upload(folder, "me/x", api=Api())
    (folder / "README.md").unlink()
    (folder / "evil.py").write_text("print()")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    import hashlib

    manifest["files"]["evil.py"] = {"sha256": hashlib.sha256(b"print()").hexdigest(), "bytes": 7}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    api = Api()
    hub.upload(folder, "me/x", api=api)
    assert "evil.py" not in api.sent and "config.json" in api.sent
    with pytest.raises(CheckpointError, match="there is no folder"):
        hub.upload("me/packed", "me/x", api=api)


# verify


@pytest.mark.parametrize("name", [
    "additional_chat_templates/default.jinja", "deep/er/modeling.py", "sub/x.json", "sub/model.safetensors",
    "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "vocab.txt", "merges.txt",
    "pytorch_model.BIN", "x.pkl", "model.safetensors.index.json", "spiece.model", "qwen.tiktoken",
])
def test_verify_finds_what_was_added(folder, name):
    gemq.verify(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name} was added"):
        gemq.verify(folder)


def test_what_loads_nothing_may_be_added(folder):
    for name in ("LICENSE", "notes.txt", "picture.png", ".gitattributes"):
        (folder / name).write_text("")
    gemq.verify(folder)


def test_verify_finds_links_out_of_the_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="additional_chat_templates was added, a link to a folder"):
        gemq.verify(folder)
    (folder / "additional_chat_templates").unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "other" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to .*, out of the folder"):
        gemq.verify(folder)
    (folder / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "other" / "tokenizer.json", folder / "there")
    (folder / "tokenizer.json").symlink_to("there")
    gemq.verify(folder)


@pytest.mark.parametrize("left_out", ["config.json", WEIGHTS_FILE, "tokenizer.json", "generation_config.json"])
def test_all_that_is_loaded_must_be_recorded(folder, left_out):
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["files"][left_out]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{left_out} was added"):
        gemq.verify(folder)
    (folder / left_out).unlink()
    if left_out in ("config.json", WEIGHTS_FILE):
        with pytest.raises(CheckpointError, match=rf"config\.json is missing|holds neither {WEIGHTS_FILE}"):
            gemq.verify(folder)


SUM = "0" * 64


@pytest.mark.parametrize("name, entry", [
    ("config.json", {"sha256": SUM, "bytes": "12"}), ("config.json", {"sha256": SUM, "bytes": True}),
    ("config.json", {"sha256": SUM, "bytes": -1}), ("config.json", {"sha256": SUM, "bytes": 1.5}),
    ("config.json", {"sha256": 7, "bytes": 1}), ("config.json", {"sha256": "x", "bytes": 1}), ("config.json", None),
    ("config.json", []), ("", {"sha256": SUM, "bytes": 1}), ("/etc/passwd", {"sha256": SUM, "bytes": 1}),
    ("../x", {"sha256": SUM, "bytes": 1}), ("a/../x", {"sha256": SUM, "bytes": 1}),
    ("a\0b", {"sha256": SUM, "bytes": 1}),
    ("./config.json", {"sha256": SUM, "bytes": 1}), ("a//b", {"sha256": SUM, "bytes": 1}),
    (MANIFEST_FILE, {"sha256": SUM, "bytes": 1}), (".", {"sha256": SUM, "bytes": 1}),
], ids=repr)
def test_a_malformed_manifest(folder, gemq_run, name, entry):
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"][name] = entry
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    code, _, err = gemq_run("verify", folder)
    assert code == 2 and f"{MANIFEST_FILE} is malformed at " in err


@pytest.mark.parametrize("name", ["x" * 300, "\ud800.json", "a" * 200 + "/" + "b" * 5000, "\x1b[31mred\u202e.json"])
def test_names_that_no_file_has(folder, gemq_run, name):
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"][name] = {"sha256": SUM, "bytes": 1}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    code, _, err = gemq_run("verify", folder)
    assert code == 2 and "does not match its manifest" in err and "\x1b" not in err and "\u202e" not in err


def test_a_folder_saved_again_is_told_of_its_old_manifest(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    model.config.use_cache = not model.config.use_cache
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"save_pretrained of transformers .* leaves an old {MANIFEST_FILE}"):
        gemq.verify(folder)
    (folder / MANIFEST_FILE).unlink()
    gemq.from_pretrained(folder)
