"""Calibration text: the grammar of sources, windows that a seed decides, and errors that say what to change."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_text import words

from gemq.algorithms.calibration import (
    NAMED,
    TextSource,
    calibration_windows,
    documents,
    evaluation_windows,
    parse_sources,
)
from gemq.errors import CalibrationError


@pytest.fixture
def jsonl(tmp_path):
    """200 documents of 20 words, in three fields."""
    path = tmp_path / "docs.jsonl"
    records = [{"text": words(20, i), "question": words(3, 1000 + i), "answer": words(2, 2000 + i)} for i in range(200)]
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch):
    """``datasets.load_dataset`` replaced; the calls it got."""
    import datasets

    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return {"text": [words(30, i) for i in range(1200)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wikitext2", [TextSource("wikitext2")]),
        (" c4 ", [TextSource("c4")]),
        ("a b.txt", [TextSource("a b.txt")]),
        ("d.jsonl#q&a", [TextSource("d.jsonl", "q&a")]),
        ("d.jsonl#q+a@0.25", [TextSource("d.jsonl", "q+a", 0.25)]),
        ("c4@.5,x/y.txt@3.", [TextSource("c4", weight=0.5), TextSource("x/y.txt", weight=3.0)]),
        ("c4, wikitext2", [TextSource("c4"), TextSource("wikitext2")]),
    ],
)
def test_grammar(text, expected):
    assert parse_sources(text) == expected


@pytest.mark.parametrize("text", ["", ",", "c4,", "#text", "@1", "c4@", "c4@x", "c4@-1", "c4@1.2.3", "c4@.", "c4@nan"])
def test_malformed_sources(text):
    with pytest.raises(CalibrationError, match="cannot read the text source"):
        parse_sources(text)


def test_weights_above_zero():
    with pytest.raises(CalibrationError, match="weight of text source 'c4' must be above 0, got 0"):
        parse_sources("c4@0")


def test_an_existing_file_needs_no_grammar(tmp_path):
    path = tmp_path / "a,b@2#c.txt"
    path.write_text("the of")
    assert parse_sources(str(path)) == [TextSource(str(path))]
    parse_sources(",".join(["name.txt"] * 1000))


def test_text_file(tokenizer, text_file):
    windows = calibration_windows(tokenizer, str(text_file), 7, 16)
    assert windows.shape == (7, 16) and windows.dtype == torch.int64
    stream = tokenizer(text_file.read_text())["input_ids"]
    found = {tuple(stream[i : i + 16]) for i in range(len(stream) - 15)}
    assert all(tuple(row.tolist()) in found for row in windows)


def test_jsonl_documents(jsonl):
    first = json.loads(jsonl.read_text().splitlines()[0])
    assert documents(TextSource(str(jsonl)))[0] == first["text"]
    assert documents(TextSource(str(jsonl), "question&answer"))[0] == f"{first['question']} {first['answer']}"
    assert documents(TextSource(str(jsonl), "question+answer"))[0] == first["question"] + first["answer"]
    assert len(documents(TextSource(str(jsonl)))) == 200


def test_jsonl_strings_may_hold_line_separators(tmp_path):
    text = "the\u2028of\x85and\x0bto"
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert documents(TextSource(str(path))) == [text]


def test_many_documents_are_shuffled_and_joined(tokenizer, jsonl):
    windows = calibration_windows(tokenizer, str(jsonl), 4, 20, seed=3)
    # documents of 20 words make windows of 20: each is one document, and not the first four
    found = [tokenizer.decode(row) for row in windows]
    everything = documents(TextSource(str(jsonl)))
    assert set(found) <= set(everything) and len(set(found)) == 4
    assert found != everything[:4]


def test_a_mixture_shares_windows_by_weight(tokenizer, tmp_path):
    for index, word in enumerate(("the", "of", "and")):
        (tmp_path / f"{index}.txt").write_text(f"{word} " * 100)
    mixture = f"{tmp_path}/0.txt@2,{tmp_path}/1.txt@1,{tmp_path}/2.txt@0.2"
    windows = calibration_windows(tokenizer, mixture, 16, 5)
    assert (windows == windows[:, :1]).all()
    assert [tokenizer.decode(windows[:, 0]).split().count(word) for word in ("the", "of", "and")] == [10, 5, 1]
    order = windows[:, 0].tolist()
    assert order != sorted(order)
    assert torch.equal(windows, calibration_windows(tokenizer, mixture, 16, 5))


@pytest.mark.parametrize("kind", ["text", "jsonl", "mixture"])
def test_the_seed_decides(tokenizer, text_file, jsonl, kind):
    source = {"text": str(text_file), "jsonl": str(jsonl), "mixture": f"{text_file}@0.5,{jsonl}@0.5"}[kind]
    first, again, other = (calibration_windows(tokenizer, source, 8, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    calibration_windows(tokenizer, source, 8, 16, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_windows_are_consecutive(tokenizer, text_file):
    stream = tokenizer(text_file.read_text())["input_ids"]
    windows = evaluation_windows(tokenizer, str(text_file), 300)
    assert windows.shape == (6, 300)
    assert windows.flatten().tolist() == stream[:1800]
    assert torch.equal(evaluation_windows(tokenizer, str(text_file), 300, 2), windows[:2])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("short.txt", "'.*short.txt' has 3 tokens, but 8 are needed"),
        ("few.jsonl", "'.*few.jsonl' has 6 tokens, but 32 are needed"),
        ("empty.txt", "'.*empty.txt' is empty"),
        ("blank.txt", "'.*blank.txt' is empty"),
        ("empty.jsonl", "'.*empty.jsonl' is empty"),
        ("latin1.txt", "latin1.txt is not UTF-8 text"),
        ("latin1.jsonl", "latin1.jsonl is not UTF-8 text"),
        ("broken.jsonl", r"broken.jsonl, line 2: no JSON record \(Expecting value"),
        ("number.jsonl", r"number.jsonl, line 1: no JSON record with 'text' \('text' is not a string\)"),
        ("list.jsonl", "list.jsonl, line 1: no JSON record with 'text'"),
        ("few.jsonl#body", "few.jsonl, line 1: no JSON record with 'body' .it has no field 'body'; its fields: 'text'"),
        ("few.jsonl#text&body", "few.jsonl, line 1: no JSON record with 'text&body'"),
        ("nowhere.txt", "no text file '.*nowhere.txt'; known corpora: wikitext2, c4"),
        ("", "no text file"),
    ],
)
def test_unusable_text(tokenizer, tmp_path, source, message):
    contents = {
        "short.txt": b"the of and", "few.jsonl": b'{"text": "the of and"}\n{"text": "to in a"}', "empty.txt": b"",
        "blank.txt": b" \n\n ", "empty.jsonl": b"\n\n", "latin1.txt": "é".encode("latin1"),
        "latin1.jsonl": b'{"text": "\xe9"}', "broken.jsonl": b'{"text": "the"}\n{"text": ',
        "number.jsonl": b'{"text": 5}', "list.jsonl": b'["the"]',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(tokenizer, f"{tmp_path}/{source}", 4, 8)
    with pytest.raises(CalibrationError):
        evaluation_windows(tokenizer, f"{tmp_path}/{source}", 8)


@pytest.mark.parametrize(("count", "length"), [(0, 8), (4, 1), (-1, 8)])
def test_windows_that_hold_nothing(tokenizer, text_file, count, length):
    with pytest.raises(CalibrationError, match="need at least 1 window of 2 tokens"):
        calibration_windows(tokenizer, str(text_file), count, length)
    with pytest.raises(CalibrationError, match="need at least 1 window of 2 tokens"):
        evaluation_windows(tokenizer, str(text_file), length, count)


@pytest.mark.parametrize("name", NAMED)
def test_named_corpora_come_from_datasets(tokenizer, hub, name):
    windows = calibration_windows(tokenizer, name, 3, 40)
    assert windows.shape == (3, 40)
    held_out = evaluation_windows(tokenizer, name, 100)
    (path, options), (again, test_options) = hub
    assert path == again == {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}[name]
    assert (options["split"], test_options["split"]) == ("train", "test")
    if name == "c4":
        assert test_options["data_files"]["test"].startswith("en/c4-validation.00000")
        # the first 1,100 documents only
        assert held_out.shape == (330, 100)
    else:
        assert options["name"] == "wikitext-2-raw-v1"
        assert held_out.shape == (360, 100)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no route to host\nlong story"), TimeoutError(), ValueError("x" * 5000)],
    ids=["down", "mute", "long"],
)
def test_a_corpus_that_cannot_be_had(tokenizer, monkeypatch, error):
    import datasets

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CalibrationError, match=r"could not load c4 \(.*\); give a local \.txt or \.jsonl") as caught:
        calibration_windows(tokenizer, "c4", 3, 40)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert type(error).__name__ in str(caught.value)
