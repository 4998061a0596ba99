"""Readers of a checkpoint on files drawn at random: the fuzzer of ``make fuzz`` for a while, and properties."""

from __future__ import annotations

import json

import pytest
import torch
from fuzz_checkpoint import KINDS, Fuzzer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gemq.errors import CheckpointError
from gemq.integrity import read_header
from gemq.packed_config import PackedConfig
from gemq.widths import Widths

# `make fuzz` draws others for as long as it is told
CASES = 800
# cases that once found something: __metadata__ that is no object, and NaN in a header
KNOWN = (807, 1419, 106_095)
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}


@pytest.mark.filterwarnings("ignore")
def test_mutated_checkpoints(tmp_path):
    fuzzer = Fuzzer(tmp_path)
    for seed in KNOWN:
        fuzzer.run(seed)
    for seed in range(CASES):
        fuzzer.run(seed)
    assert {outcome.split(":")[0] for outcome in fuzzer.outcomes} == set(KINDS)
    assert sum(fuzzer.outcomes.values()) == CASES + len(KNOWN)


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(list(NAMES))),
        min_size=1, max_size=6,  # of no tensor, with empty metadata, the library writes what is no JSON
    ),
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_headers_of_the_safetensors_library(tmp_path_factory, tensors, metadata):
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    save_file({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}, file, metadata)
    found = read_header(file)
    assert {k: (e.shape, e.dtype) for k, e in found.items()} == {k: (s, NAMES[d]) for k, (s, d) in tensors.items()}


WIDTHS = st.lists(st.integers(0, 8), min_size=1, max_size=6)
CONFIGS = st.builds(
    PackedConfig,
    st.builds(
        Widths, experts=st.dictionaries(st.integers(0, 99), WIDTHS, min_size=1, max_size=4),
        shared=st.dictionaries(st.integers(0, 99), st.sampled_from([1, 2, 8, 16]), max_size=3),
        attention=st.sampled_from([1, 4, 8, 16]), dense=st.sampled_from([3, 16]),
    ),
    group_size=st.sampled_from([32, 64, 128]), budget=st.none() | st.floats(0, 8),
    method=st.none() | st.text(max_size=5),
)  # fmt: skip


@given(config=CONFIGS)
@settings(max_examples=100, deadline=None)
def test_a_config_comes_back(config):
    assert PackedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=6,
)


@given(config=CONFIGS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_config_with_another_value_is_refused(config, data):
    stored = config.to_dict()
    key = data.draw(st.sampled_from(sorted(set(stored) - {"quant_method"})))
    value = data.draw(JSON)
    if json.dumps(value) == json.dumps(stored[key]):
        return
    with pytest.raises(CheckpointError) as caught:
        PackedConfig.from_dict(stored | {key: value})
    assert len(str(caught.value)) < 500
