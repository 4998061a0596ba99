"""A packed checkpoint by the name of its repository, wherever a folder does; the cache stands for the hub."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard, constants

import gemq
from gemq import interchange
from gemq.card import write_card
from gemq.checkpoint import load_packed_config
from gemq.checkpoint_summary import summarize
from gemq.cli.run import run
from gemq.errors import CheckpointError
from gemq.folders import checkpoint_folder, is_hub_name
from gemq.integrity import WEIGHTS_FILE
from gemq.pipeline import load_costs
from gemq.report import load

NAME = "me/packed"


@pytest.fixture(scope="module")
def made(model_folder, quick, tmp_path_factory):
    """A packed checkpoint of the tiny model."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    arguments = ["quantize", str(model_folder), "-o", str(folder), "--bits", "2", *quick, "-q", "--no-tune-routers"]
    assert run(arguments) == 0
    write_card(folder, NAME)
    return folder


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """The cache as the hub's client leaves it: a snapshot of links to blobs; the snapshot's folder."""
    base = tmp_path / "cache" / "models--me--packed"
    snapshot = base / "snapshots" / "0123abc"
    (base / "blobs").mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("0123abc")
    for number, path in enumerate(sorted(p for p in made.rglob("*") if p.is_file())):
        blob = base / "blobs" / f"{number:040x}"
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_every_command_takes_the_name(hub, gemq_run, text_file, tmp_path):
    (tmp_path / "out").mkdir()
    for command in (
        ["inspect", NAME, "--format", "json"], ["verify", NAME], ["export", NAME, "-o", "out/dense"],
        ["allocate", NAME],
        ["report", NAME, "-o", "out/r.html"], ["generate", NAME, "it was", "--max-new-tokens", "2"],
        ["eval", NAME, "--data", text_file, "--length", "16", "--limit", "2"],
    ):
        code, _, err = gemq_run(*command)
        assert code == 0, (command, err)
    assert (tmp_path / "out" / "dense" / "tokenizer.json").is_file()
    assert not any(p.is_symlink() for p in (tmp_path / "out" / "dense").rglob("*"))
    assert NAME in (tmp_path / "out" / "r.html").read_text()
    code, _, err = gemq_run("upload", NAME, "me/x")
    assert code == 2 and "there is no folder 'me/packed' to upload" in err


def test_every_function_takes_the_name(hub, made, tmp_path):
    assert checkpoint_folder(NAME) == hub
    assert gemq.verify(NAME) == gemq.verify(made)
    assert summarize(NAME) == summarize(made) and load_packed_config(NAME) == load_packed_config(made)
    assert load_costs(NAME).layers == load_costs(made).layers
    assert interchange.read_allocation(NAME).rows == interchange.read_allocation(made).rows
    assert load([NAME]).checkpoints[0].name == NAME
    one, other = gemq.generate(NAME, "it was", max_new_tokens=4), gemq.generate(made, "it was", max_new_tokens=4)
    assert one.text == other.text and "".join(gemq.stream(NAME, "it was", max_new_tokens=4)) == one.text
    assert gemq.from_pretrained(NAME, verify=True).config.model_type == "mixtral"
    assert interchange.export(NAME, tmp_path / "dense").tensors > 5


def test_the_cards_own_commands_work(hub, made, gemq_run, capsys):
    """As they are written on the card, of a repository and of a folder beside the present one."""
    text = ModelCard.load(hub / "README.md").text
    exec(compile(re.search(r"```python\n(.*?)```", text, re.S)[1], "card", "exec"), {})
    assert capsys.readouterr().out.strip()
    command = re.search(r"`gemq (generate \S+) ", text)[1].split()
    assert command == ["generate", NAME] and gemq_run(*command, "it was", "--max-new-tokens", "2")[0] == 0


@pytest.mark.parametrize("place", ["tiny", "tiny/2.5", "it's $HOME"])
def test_the_card_of_a_folder_names_it_as_it_lies(made, tmp_path, monkeypatch, gemq_run, place):
    import shlex

    shutil.copytree(made, tmp_path / place)
    write_card(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    text = ModelCard.load(tmp_path / place / "README.md").text
    command = shlex.split(re.search(r"`gemq (generate .*)`", text)[1])
    assert command[1] == place and gemq_run(*command[:2], "it was", "--max-new-tokens", "2")[0] == 0
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert f"from_pretrained({json.dumps(place)})" in code
    compile(code, "card", "exec")


def test_a_damaged_snapshot_is_found(hub):
    blob = (hub / WEIGHTS_FILE).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from its SHA-256"):
        gemq.from_pretrained(NAME, verify=True)


def test_links_to_other_places_are_none_of_the_cache(hub, tmp_path):
    (tmp_path / "elsewhere").write_text("secret")
    (hub / "merges.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="out of the folder"):
        gemq.verify(NAME)
    assert interchange.export(NAME, tmp_path / "o").left_out == ["merges.txt (no regular file of the folder)"]


@pytest.mark.parametrize("name", ["me/absent", "absent"])
def test_what_is_neither_folder_nor_repository(hub, gemq_run, name):
    for command in (["inspect", name], ["verify", name], ["export", name, "-o", "o"], ["report", name]):
        code, _, err = gemq_run(*command)
        assert code == 2 and f"there is no folder '{name}', and no repository of that name could be had: " in err


@pytest.mark.parametrize("name", [
    "", ".", "..", "/x/y", "./x", "~/x", "a/b/c", "a b", "a//b", "x\0y", "a/..", "--x", "ä/b",
])
def test_what_can_be_no_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name(name)
