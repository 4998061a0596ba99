"""Files of text: which kinds are read, as what, and one clear error for the rest."""

from __future__ import annotations

import copy
import gzip
import json
import logging
import os
import random
import time

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, tiny_model
from tiny_text import words

from gemq.algorithms import documents as document_files
from gemq.algorithms import text_files
from gemq.algorithms.calibration import (
    TextSource,
    calibration_windows,
    check_windows,
    documents,
    evaluation_windows,
)
from gemq.errors import CalibrationError

RECORDS = [{"text": words(20, i), "answer": words(3, 900 + i)} for i in range(40)]
LINES = "\n".join(map(json.dumps, RECORDS))
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}of{% endif %}"
)


def found(path, tokenizer=None, fields="text"):
    return documents(TextSource(str(path), fields), tokenizer=tokenizer)


def parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


def zipped(data):
    """Without the time, which would be part of a test's name."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", LINES), ("a.JSONL", LINES), ("a.ndjson", LINES), ("a.json", json.dumps(RECORDS)),
    ("a.json", json.dumps(RECORDS, indent=3)), ("a.JSON", LINES), ("bom.jsonl", "\ufeff" + LINES),
    ("bom.json", "\ufeff \n" + json.dumps(RECORDS)), ("crlf.jsonl", LINES.replace("\n", "\r\n\r\n")),
    ("nulls.jsonl", "null\n" + LINES + '\n{"text": null}\n'), ("nulls.json", json.dumps([None, *RECORDS])),
    ("objects.json", "\n".join(json.dumps(r, indent=1) for r in RECORDS)),
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_files_of_records(tokenizer, tmp_path, name, content, packed):
    path = tmp_path / (name + ".gz" if packed else name)
    data = content.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert found(path) == [r["text"] for r in RECORDS]
    if "null" not in content:
        assert found(path, fields="answer&text") == [f"{r['answer']} {r['text']}" for r in RECORDS]
    plain = tmp_path / "plain.jsonl"
    plain.write_text(LINES)
    windows = calibration_windows(tokenizer, str(path), 5, 16, seed=4)
    assert torch.equal(windows, calibration_windows(tokenizer, str(plain), 5, 16, seed=4))
    assert torch.equal(evaluation_windows(tokenizer, str(path), 16), evaluation_windows(tokenizer, str(plain), 16))


def test_parquet(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, {"text": [r["text"] for r in RECORDS] + [None], "answer": [*[r["answer"] for r in RECORDS], "x"]})
    assert found(path) == [r["text"] for r in RECORDS]
    assert found(path, fields="text&answer") == [f"{r['text']} {r['answer']}" for r in RECORDS]
    with pytest.raises(CalibrationError, match=r"a.parquet, row 1: .* no field 'body'; its fields: 'answer', 'text'"):
        found(path, fields="body")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CalibrationError, match="is no Parquet file that can be read"):
        found(path)


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.text", "a.md", "README"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_plain_text(tmp_path, name, packed):
    path = tmp_path / (name + ".gz" if packed else name)
    data = b"\xef\xbb\xbfit was\r\nthe\rof " + "é👩‍👧".encode()
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert found(path) == ["it was\nthe\nof é👩‍👧"]


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"text\nit was\n", "a .csv file, which is not read as text; read are plain text"),
    ("a.html", b"<p>it was", "a .html file"), ("a.docx", b"PK\x03\x04", "a .docx file"),
    ("a.bin", b"it was", "a .bin file"), ("a.zip", b"PK\x03\x04", "a .zip file"), ("a.PDF", b"%PDF", "a .pdf file"),
    ("a.parquet.gz", zipped(b"PAR1"), "a .gz file"), ("a.csv.gz", zipped(b"a"), "a .gz file"),
    ("a.txt", b"%PDF-1.4", "holds a PDF"), ("b.txt", b"PAR1abc", "holds Parquet; name it .parquet"),
    ("c.txt", b"PK\x03\x04ab", "holds a ZIP archive"), ("d.txt", zipped(b"it was"), "holds gzip; name it .gz"),
    ("e.txt", "it was".encode("utf-16"), "holds UTF-16 text; convert it to UTF-8"),
    ("f.txt", b"it was" + bytes(9), "it holds zero bytes"), ("g.jsonl", "{}".encode("utf-16"), "holds UTF-16 text"),
    ("h.txt", b"it was " * 30_000 + b"\0", "it holds zero bytes"), ("i", b"\x7fELF\2", "holds a program"),
    ("j.parquet", b"it was", "is not Parquet"), ("k.parquet", b"", "is no Parquet file that can be read"),
    ("l.txt.gz", b"it was", "is not a whole gzip file"), ("m.txt.gz", zipped(b"it was" * 99)[:-9], "whole gzip"),
    ("n.jsonl.gz", zipped(LINES.encode())[:200], "is not a whole gzip file"),
    ("o.jsonl", b"[" * 100_000, "line 1: no JSON record .nested too deeply"),
    ("p.json", b'[{"text": ' + b"[" * 100_000, "record 1: no JSON record .nested too deeply"),
    ("q.jsonl", b'{"text": "a", "text": "b"}', "line 1: no JSON record .the key 'text' comes twice"),
    ("r.jsonl", b'{"text": "\\ud800"}', "line 1: .*half a surrogate pair"),
    ("s.jsonl", b'{"text": ' + b"9" * 100_000 + b"}", "line 1: .*'text' is not a string"),
    ("t.jsonl", b'7\n', "line 1: .*it is a float, not an object"), ("u.json", b"7", "record 1: .*not an object"),
    ("v.json", b'[{"text": "it"} {"text": "was"}]', "record 2: no JSON record .expected a comma"),
    ("w.json", b'[{"text": "it"}', "record 2: no JSON record .expected a comma or the end of the list"),
    ("x.json", b'[{"text": "it"}] 7', "record 2: no JSON record .expected the end of the list"),
    ("y.json", b'[{"text": "it"}, {"text"', "record 2: no JSON record"), ("z.json", b"[]", "is empty"),
    ("A.json", b'{"text": "it', "record 1: no JSON record .Unterminated string"),
    ("B.jsonl", b'{"data": [1]}', "no field 'text'; its fields: 'data'"), ("C.jsonl", b"null\nnull", "is empty"),
    ("D.jsonl", b'{"messages": []}', "is empty"), ("E.jsonl", b'{"text": [1]}', "message 0 is no object with role"),
    ("F.jsonl", b'{"text": {"a": 1}}', "'text' is not a string"), ("G.json", b"", "is empty"),
])  # fmt: skip
def test_what_is_refused(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (lambda: calibration_windows(tokenizer, str(path), 1, 4), lambda: evaluation_windows(
        tokenizer, str(path), 4)):  # fmt: skip
        with pytest.raises(CalibrationError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_is_no_regular_file(tokenizer, tmp_path):
    """Refused at once: reading a pipe or a device would wait, or never end."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to("/dev/zero")
    for name, kind in (("pipe.txt", "a pipe"), ("folder.txt", "a folder"), ("link.txt", "a pipe, socket or device")):
        with pytest.raises(CalibrationError, match=f"no text file '.*{name}': it is {kind}"):
            calibration_windows(tokenizer, f"{tmp_path / name}", 1, 4)
    with pytest.raises(CalibrationError, match="no text file '/dev/zero': it is a pipe, socket or device"):
        evaluation_windows(tokenizer, "/dev/zero", 4)


def test_nulls_are_counted_once(tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(document_files, "_KEPT", 100)
    path = tmp_path / "a.jsonl"
    path.write_text("null\n" + LINES + '\n{"text": null}\n')
    with caplog.at_level(logging.WARNING, "gemq"):
        calibration_windows(tokenizer, str(path), 30, 16)
    told = [r.getMessage() for r in caplog.records if r.name == "gemq"]
    assert told == [f"{path}: 2 of 42 records are null or have no text in 'text', and were left out"]


def test_the_command_tells_what_was_left_out(gemq_run, model_folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("null\n" + LINES)
    code, _, err = gemq_run("eval", model_folder, "--data", path, "--length", "16")
    assert code == 0 and "1 of 41 records are null" in " ".join(err.split())


def test_conversations_go_through_the_template(tokenizer, tmp_path):
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = TEMPLATE
    said = [{"role": "user", "content": "it was"}, {"role": "assistant", "content": "the of"}]
    shared = [{"from": "human", "value": "it was"}, {"from": "gpt", "value": "the of"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (
        {"id": 3, "messages": said}, {"conversations": shared}, {"messages": said, "text": "one"}, {"messages": None},
        {"messages": [{"role": "user", "content": None}]},
    )))  # fmt: skip
    rendered = "user: it was assistant: the of "
    assert found(path, templated) == [rendered, rendered, "one"]
    path.write_text(json.dumps({"turns": shared}))
    assert found(path, templated, "turns") == [rendered]
    with pytest.raises(CalibrationError, match=r"line 1: .*'turns' need the tokenizer's chat template"):
        found(path, tokenizer, "turns")
    templated.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(CalibrationError, match=r"line 1: .*the chat template of the tokenizer failed: no"):
        found(path, templated, "turns")
    parquet(tmp_path / "a.parquet", {"messages": [said, said]})
    templated.chat_template = TEMPLATE
    assert found(tmp_path / "a.parquet", templated) == [rendered, rendered]


def test_documents_are_read_again_rather_than_held(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    expected = calibration_windows(tokenizer, str(path), 30, 16, seed=2)
    monkeypatch.setattr(document_files, "_KEPT", 100)
    plain = document_files.Documents.in_order
    monkeypatch.setattr(document_files.Documents, "in_order", lambda self, order, _: plain(self, order, 300))
    assert torch.equal(calibration_windows(tokenizer, str(path), 30, 16, seed=2), expected)


def test_long_lists_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_CHARACTERS", 37)
    path = tmp_path / "a.json"
    for text in (json.dumps(RECORDS), json.dumps(RECORDS, indent=2), LINES):
        path.write_text(text)
        assert found(path) == [r["text"] for r in RECORDS]
    path.write_text('[{"text": "it"}, {"text": nul}]' + " " * 5000)
    with pytest.raises(CalibrationError, match=r"record 2: no JSON record .Expecting value"):
        found(path)


def test_a_bomb_is_not_unpacked(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MOST_UNPACKED", 1 << 20)
    monkeypatch.setattr(text_files, "_LONGEST", 1 << 18)
    bomb = tmp_path / "a.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"text": "' + b"a" * (1 << 19)))
    with pytest.raises(CalibrationError, match="line 1: longer than"):
        found(bomb)
    bomb.write_bytes(gzip.compress(b"\n" * (2 << 20)))
    with pytest.raises(CalibrationError, match="unpacks to more than 1 MiB; unpack it first"):
        found(bomb)
    lines = tmp_path / "b.json.gz"
    lines.write_bytes(gzip.compress(b'["' + b"a" * (1 << 19)))
    with pytest.raises(CalibrationError, match=r"record 1: no JSON record .longer than"):
        found(lines)
    # of a text, only what the windows need
    text = tmp_path / "c.txt.gz"
    text.write_bytes(gzip.compress(b"it was the of " * (1 << 18)))
    assert evaluation_windows(tokenizer, str(text), 8, 3).shape == (3, 8)


@pytest.fixture
def long_text(tmp_path):
    """A text of 13 MiB of the tokenizer's words, with two-byte characters and line ends of Windows between."""
    part = words(3000, 5).replace(" of ", " of\r\n") + " é "
    path = tmp_path / "long.txt"
    path.write_bytes((part * (14_000_000 // len(part))).encode())
    assert path.stat().st_size > 13 << 20
    return path


def test_of_a_long_text_only_windows_are_tokenized(tokenizer, long_text, monkeypatch):
    seen = []
    monkeypatch.setattr(type(tokenizer), "__call__", _counting(type(tokenizer).__call__, seen))
    started = time.monotonic()
    windows = calibration_windows(tokenizer, str(long_text), 20, 32, seed=1)
    assert sum(seen) < 200_000 and time.monotonic() - started < 20
    assert windows.shape == (20, 32) and windows.dtype == torch.int64 and len(windows.unique(dim=0)) == 20
    assert torch.equal(windows, calibration_windows(tokenizer, str(long_text), 20, 32, seed=1))
    assert not torch.equal(windows, calibration_windows(tokenizer, str(long_text), 20, 32, seed=2))
    monkeypatch.undo()
    # each is somewhere in the text
    stream = np.asarray(tokenizer(long_text.read_text()[:60_000])["input_ids"])
    joined = " " + " ".join(map(str, stream)) + " "
    assert all(" " + " ".join(map(str, row)) + " " in joined for row in windows.tolist())


def _counting(plain, seen):
    def call(self, text, **options):
        seen.append(len(text))
        return plain(self, text, **options)

    return call


def test_a_limit_bounds_what_is_tokenized(tokenizer, long_text, monkeypatch):
    seen = []
    monkeypatch.setattr(type(tokenizer), "__call__", _counting(type(tokenizer).__call__, seen))
    assert evaluation_windows(tokenizer, str(long_text), 64, 5).shape == (5, 64)
    assert sum(seen) < 2_000_000


def test_a_long_blank_text_is_empty(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b" \n" * (7 << 20))
    with pytest.raises(CalibrationError, match="is empty"):
        calibration_windows(tokenizer, str(path), 2, 8)


def test_windows_that_a_model_does_not_take(tokenizer):
    config = tiny_model("mixtral").config
    check_windows(torch.full((2, 128), VOCAB - 1), config)
    with pytest.raises(CalibrationError, match=r"windows have 129 tokens, the model 128 positions .*at most 128"):
        check_windows(torch.zeros(2, 129, dtype=torch.long), config)
    config.vocab_size = 50
    with pytest.raises(CalibrationError, match=r"gives the id 95 \('word\d+'\), the model's embedding has rows 0..49"):
        check_windows(torch.full((2, 8), VOCAB - 1), config, tokenizer)


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_commands_check_windows(gemq_run, model_folder, text_file, tmp_path, command):
    options = {"quantize": ["-o", tmp_path / "out", "--bits", "2", "--samples", "2", "--calibration", text_file],
               "eval": ["--data", text_file]}[command]  # fmt: skip
    code, _, err = gemq_run(command, model_folder, *options, "--length", "129")
    assert code == 2, err
    assert "the windows have 129 tokens, the model 128 positions" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**5000], ids=["2**64", "low", "long"])
def test_seeds_that_torch_does_not_take(tokenizer, text_file, seed):
    with pytest.raises(ValueError, match=r"seed must be in -2\*\*63..2\*\*64-1"):
        calibration_windows(tokenizer, str(text_file), 2, 8, seed)


def test_order_does_not_depend_on_how_lines_end(tokenizer, tmp_path):
    rng = random.Random(0)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(line + rng.choice(["\n", "\r\n", "\n\n", "\r"]) for line in LINES.split("\n")), newline="")
    assert found(path) == [r["text"] for r in RECORDS]
