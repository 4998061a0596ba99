"""Lean and compiled decode steps of families that are more than norms, attention and experts: windows, sinks, gates,
linear attention, Mamba, norms before and behind, experts beside a dense MLP. Against transformers' own step."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_models import relative_error
from step_models import step_logits, step_model
from tiny_models import VOCAB
from torch import Tensor, nn

from gemq import ops
from gemq.format import UNQUANTIZED
from gemq.generation import Decoding, GenerationOptions, decoding

KINDS = (
    "qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe", "glm4_moe_lite", "gpt_oss", "gemma4_text", "gemma4", "nemotron_h",
)
WINDOWED = ("gpt_oss", "gemma4_text", "gemma4")
RECURRENT = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe", "nemotron_h")
# float32 sums in another order, which a state carries on
TOLERANCE = 5e-5


def prompt(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and a mask with padding on the left of all rows but the last."""
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : (7 * row + 3) % length] = 0
    return ids, mask


def assert_same(model: nn.Module, rows: int, length: int, new: int, steps=("lean", "native")) -> None:
    ids, mask = prompt(rows, length)
    expected, tokens = step_logits(model, ids, mask, "transformers", new)
    for step in steps:
        found, own = step_logits(model, ids, mask, step, new)
        assert relative_error(found, expected) <= TOLERANCE, step
        assert torch.equal(own, tokens), step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", [3, UNQUANTIZED])
@pytest.mark.parametrize("rows, length, new", [(1, 1, 6), (1, 11, 6), (4, 9, 6), (16, 5, 3)], ids=str)
def test_logits_are_those_of_transformers_step(kind, attention, rows, length, new):
    assert_same(step_model(kind, attention), rows, length, new)


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("rows, length, new", [(1, 15, 40), (3, 16, 20), (3, 17, 4), (5, 50, 36)], ids=str)
def test_texts_leave_the_window(kind, rows, length, new):
    """Windows of 16 tokens that the prompt fills or not, with padding inside and outside of them."""
    assert_same(step_model(kind), rows, length, new)


@pytest.mark.parametrize("kind, step, length", [
    *((kind, "native", 33) for kind in RECURRENT), ("gpt_oss", "transformers", 45), ("gemma4_text", "transformers", 45),
])
def test_states_and_windows_of_prompts_in_chunks(kind, step, length, monkeypatch):
    model = step_model(kind)
    ids, mask = prompt(2, length)
    expected = step_logits(model, ids, mask, step, 5)[0]
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 24)
    assert relative_error(step_logits(model, ids, mask, "native", 5)[0], expected) <= TOLERANCE


@pytest.mark.parametrize("kind", ["qwen3_5_moe_text", "gpt_oss", "gemma4_text", "nemotron_h"])
def test_every_variant_of_the_kernels(isa, kind):
    assert_same(step_model(kind), 3, 20, 4, ("native",))


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_activations_and_16_bits(kind):
    """A bfloat16 model's compiled step is no further from float32 than its lean step; integers cost what they do in
    other families."""
    model = step_model(kind, dtype=torch.bfloat16)
    wide = copy.deepcopy(model).float()
    ids, mask = prompt(3, 20)
    expected = step_logits(wide, ids, mask, "lean", 2)[0]
    own, lean = (step_logits(model, ids, mask, step, 2)[0] for step in ("native", "lean"))
    assert relative_error(own, expected) <= 1.2 * relative_error(lean, expected)
    ops.set_cpu_activations("int16")
    assert relative_error(step_logits(wide, ids, mask, "native", 2)[0], expected) <= 5e-3


@pytest.mark.parametrize("step", ["lean", "native"])
def test_norms_that_stay_in_float32(step):
    """transformers keeps gpt-oss's norms in float32 where the rest is float16."""
    model = copy.deepcopy(step_model("gpt_oss", dtype=torch.float16))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    ids, mask = prompt(2, 9)
    expected = step_logits(model, ids, mask, "transformers", 4)[0]
    assert relative_error(step_logits(model, ids, mask, step, 4)[0], expected) <= 5e-3


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe_text", "nemotron_h", "gpt_oss", "gemma4_text"])
def test_a_step_is_one_graph(kind, monkeypatch):
    """Without the code generator, which takes long: that the whole step is traced, and a first run moves no state."""
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compile(step, backend="aot_eager", **options))
    model = step_model(kind)
    ids, mask = prompt(2, 21)
    _, tokens = step_logits(model, ids, mask, "lean", 7)
    run = Decoding(model, ids, mask, GenerationOptions(7, ignore_eos=True), compile="compile")
    assert torch.equal(torch.stack(list(run), 1), tokens)
    assert run.step_kind == "lean"


@pytest.mark.parametrize("kind", RECURRENT + WINDOWED)
def test_one_thread_or_three(kind):
    model, before, found = step_model(kind), torch.get_num_threads(), []
    ids, mask = prompt(5, 20)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(step_logits(model, ids, mask, "native", 4)[0])
    finally:
        torch.set_num_threads(before)
    # torch's own products of the prompt depend on the number
    assert relative_error(found[1], found[0]) <= TOLERANCE


@pytest.mark.parametrize("kind, change, reason", [
    ("gemma4_text", lambda m: setattr(m.model.layers[0], "hidden_size_per_layer_input", 8), "embedding of every token"),
    ("gemma4_text", lambda m: setattr(m.model.layers[1].self_attn, "is_kv_shared_layer", True), "share their keys"),
    ("qwen3_next", lambda m: setattr(m.model.layers[0].linear_attn, "activation", "gelu"), "activation is 'gelu'"),
    ("nemotron_h", lambda m: m.model.layers[0].mixer.conv1d.register_forward_hook(lambda *a: None), "has a hook"),
    ("gpt_oss", lambda m: setattr(m.model.layers[0].self_attn, "forward", lambda *a, **k: None), "was replaced"),
])
def test_what_is_not_known_keeps_its_step(kind, change, reason):
    plain = step_model(kind)
    run = Decoding(plain, *prompt(1, 9), GenerationOptions(2, ignore_eos=True))
    run._prefill()
    run.model = copy.deepcopy(plain)
    change(run.model)
    found, why = run._kind()
    assert found == "transformers" and reason in why


def test_logits_under_a_cap():
    model = copy.deepcopy(step_model("gemma4_text"))
    model.config.final_logit_softcapping = 1.5
    assert_same(model, 2, 9, 6)
    assert step_logits(model, *prompt(2, 9), "native", 3)[0].abs().max() <= 1.5
