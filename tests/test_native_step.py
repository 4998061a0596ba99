"""The compiled decode step of whole packed models against the step in torch's operations."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from packed_models import relative_error
from step_models import step_logits
from tiny_models import FAMILIES, VOCAB, tiny_model
from torch import Tensor, nn

from gemq import ops
from gemq.bench.random_model import build_packed
from gemq.errors import GemqError
from gemq.format import UNQUANTIZED
from gemq.generation import Decoding, GenerationOptions
from gemq.generation.native import NativeStep
from gemq.generation.native_program import as_stored
from gemq.generation.routers import routing_of
from gemq.models import describe, packed_modules
from gemq.ops import cpu
from gemq.packed_config import PackedConfig
from gemq.widths import Widths

# float32 sums in another order, through two layers
TOLERANCE = 1e-5
NEW = 7


def packed_model(family: str, *arguments, **changes) -> nn.Module:
    """A model of its own, see :func:`shared_model`."""
    return copy.deepcopy(shared_model(family, *arguments, **changes))


@lru_cache
def shared_model(
    family: str, attention: int = 4, experts: tuple[int, ...] = (2, 0, 1, 3, 4, 8), dtype=torch.float32, **changes
) -> nn.Module:
    """A tiny model of random packed weights; experts of 0 bits among others; routers that differ between tokens."""
    dense = tiny_model(family, experts=len(experts))
    for name, value in changes.items():
        setattr(dense.config, name, value)
    # `changes` show in modules made from here on
    moe = describe(type(dense)(dense.config))
    rows = {layer.index: list(experts[layer.index % 3 :] + experts[: layer.index % 3]) for layer in moe.moe}
    shared = {n: attention for n in rows} if moe.shared_multiple else {}
    plan = PackedConfig(Widths(rows, shared, attention, attention))
    model = build_packed(dense.config, plan, dtype, torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("gate.weight", "lm_head.weight", "embed_tokens.weight")):
                tensor.normal_(0, 0.5, generator=generator)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1, generator=generator)
            elif name.endswith("norm.weight"):
                tensor.normal_(1, 0.2, generator=generator)
            elif name.endswith("_meta"):
                tensor.mul_(4)
    return model


def prompt(rows: int, length: int = 11, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Ids and a mask with padding on the left of all rows but the last."""
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : (3 * row + 1) % length] = 0
    return ids, mask


def decoding(model: nn.Module, ids: Tensor, mask: Tensor | None, step: str, new: int = NEW) -> Decoding:
    return Decoding(model, ids, mask, GenerationOptions(new, ignore_eos=True), compile="none", step=step)


def logits(model: nn.Module, ids: Tensor, mask: Tensor | None, step: str, new: int = NEW) -> tuple[Tensor, Tensor]:
    """``[new - 1, B, V]`` logits of all steps and the tokens ``[B, new]``."""
    return step_logits(model, ids, mask, step, new)


def assert_same(model: nn.Module, ids: Tensor, mask: Tensor | None, tolerance: float = TOLERANCE) -> None:
    expected, tokens = logits(model, ids, mask, "lean")
    found, own_tokens = logits(model, ids, mask, "native")
    assert found.isfinite().all()
    assert relative_error(found, expected) <= tolerance
    assert torch.equal(own_tokens, tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", [3, UNQUANTIZED])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_logits_are_the_lean_steps(family, attention, rows):
    assert_same(shared_model(family, attention), *prompt(rows))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("setting", ["int16", "int8"])
def test_every_variant_and_rounding_of_activations(isa, family, setting):
    """Rounded activations cost the compiled step what they cost the lean one; without rounding they agree."""
    model = shared_model(family)
    for rows in (1, 5):
        ids, mask = prompt(rows)
        exact, own = (logits(model, ids, mask, step, 2)[0] for step in ("lean", "native"))
        assert relative_error(own, exact) <= TOLERANCE
        ops.set_cpu_activations(setting)
        own, lean = (relative_error(logits(model, ids, mask, step, 2)[0], exact) for step in ("native", "lean"))
        ops.set_cpu_activations("exact")
        # the prompt is rounded too, by both alike
        assert own <= 1.5 * lean + TOLERANCE
        assert setting == "int8" or lean <= 1e-3


@pytest.mark.parametrize("family, changes", [
    ("glm4_moe", {"n_group": 2, "topk_group": 1}), ("glm4_moe", {"norm_topk_prob": False, "use_qk_norm": False}),
    ("qwen3_moe", {"norm_topk_prob": True}), ("qwen2_moe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    ("olmoe", {"norm_topk_prob": True, "num_experts_per_tok": 5}), ("mixtral", {"num_key_value_heads": 1}),
    ("mixtral", {"num_key_value_heads": 4, "head_dim": 32}), ("mixtral", {"hidden_size": 96, "vocab_size": 97}),
])  # fmt: skip
def test_variations_of_a_family(family, changes):
    assert_same(shared_model(family, **changes), *prompt(3))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_long_texts_and_padding_over_spans_of_the_cache(family):
    """The cache is read in spans of 256 slots; the first row's padding covers one of them."""
    model = shared_model(family, max_position_embeddings=1024)
    ids, mask = prompt(3, 509)
    mask[0, :300] = 0
    assert_same(model, ids, mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models_are_no_further_from_float32(family):
    """Activations stay in float32, so the result is nearer to the float32 model's than the lean step's."""
    model = shared_model(family, dtype=torch.bfloat16)
    wide = copy.deepcopy(model).float()
    ids, mask = prompt(4)
    expected = logits(wide, ids, mask, "lean", 2)[0]
    own, lean = (logits(model, ids, mask, step, 2)[0] for step in ("native", "lean"))
    assert relative_error(own, expected) <= 1.1 * relative_error(lean, expected)


def test_float16_models():
    model = packed_model("mixtral", UNQUANTIZED, dtype=torch.float16)
    ids, mask = prompt(2)
    assert relative_error(*(logits(model, ids, mask, step, 2)[0] for step in ("native", "lean"))) <= 1e-2


def test_nan_stays_in_its_row():
    model = packed_model("mixtral")
    ids, mask = prompt(3)
    ids[ids == 5] = 6
    clean = logits(model, ids, mask, "native", 3)[0][1]
    ids[1, -1] = 5
    model.model.embed_tokens.weight.data[5] = torch.nan
    run = decoding(model, ids, mask, "native")
    with torch.inference_mode():
        # iterating would stop at the first token
        run._prefill()
        run._set_up()
        run._step()
        found = run.step(run.tokens, run.progress)
    assert found[1].isnan().all()
    # the prompt's rows share products whose sums may run in another order
    assert relative_error(found[[0, 2]], clean[[0, 2]]) <= TOLERANCE
    with pytest.raises(GemqError, match="scores after 11 tokens of row 1 are NaN or infinite"):
        next(iter(decoding(model, ids, mask, "native")))


@torch.inference_mode()
@pytest.mark.parametrize("setting", ["exact", "int16"])
def test_threads_change_nothing(setting):
    ops.set_cpu_activations(setting)
    model = shared_model("qwen2_moe")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            # the step alone: torch's own products of the prompt depend on the number
            run = decoding(model, *prompt(5), "native")
            stream = iter(run)
            next(stream), next(stream)
            torch.manual_seed(0)
            for layer in run.cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
            found.append(run.step(torch.arange(5), run.progress).clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_which_step_runs(family):
    """Known structures of up to 16 rows are native."""
    model = shared_model(family)
    for rows, expected in ((1, "native"), (17, "lean")):
        run = decoding(model, prompt(rows)[0], None, "auto", 2)
        list(run)
        assert run.step_kind == expected
    with pytest.raises(ValueError, match="step='native' needs a packed model of known structure on the CPU"):
        list(decoding(model, prompt(17)[0], None, "native"))
    with pytest.raises(ValueError, match="step must be one of auto, native, lean, transformers, got 'fast'"):
        decoding(model, prompt(1)[0], None, "fast")


def test_what_the_program_would_not_compute_stays_with_the_modules():
    def kind(model):
        run = decoding(model, prompt(1)[0], None, "auto", 2)
        list(run)
        return run.step_kind

    assert kind(tiny_model("mixtral")) == "lean"
    model = packed_model("mixtral")
    assert kind(model) == "native"
    calls = []
    handle = model.model.layers[0].mlp.experts.register_forward_hook(lambda *a: calls.append(1))
    assert kind(model) == "lean" and calls
    handle.remove()
    assert kind(model) == "native"
    for change in (
        lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)),
        _rename_router,
        lambda m: next(p for _, p in packed_modules(m)).prepare("canonical"),
        lambda m: setattr(m.model.layers[1].self_attn, "q_proj", type("Adapted", (nn.Linear,), {})(64, 64)),
    ):
        other = packed_model("mixtral")
        change(other)
        assert not _fits(other)


def _rename_router(model: nn.Module) -> None:
    gate = model.model.layers[0].mlp.gate
    gate.__class__ = type("OtherRouter", (type(gate),), {})


def _fits(model: nn.Module) -> bool:
    plain = shared_model("mixtral")
    run = decoding(plain, prompt(1)[0], None, "auto", 2)
    list(run)
    return NativeStep.unfit(model, run.cache, 1) is None


def test_routers_of_known_classes_only():
    for family in FAMILIES:
        block = describe(tiny_model(family)).moe[0].block
        assert routing_of(block.gate) is not None
    assert routing_of(nn.Linear(3, 3)) is None


def test_unquantized_weights_move_to_large_pages():
    """The memory keeps its address and contents; small, empty and unaligned memory is left alone."""
    for shape in ((3000, 1024), (5, 7), (0, 4)):
        weight = torch.randn(shape).bfloat16()
        before, address = weight.clone(), weight.data_ptr()
        assert cpu.on_large_pages(weight[1:]).equal(before[1:])
        assert cpu.on_large_pages(weight) is weight and weight.data_ptr() == address and weight.equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_of_float32_models_are_read_as_such(dtype):
    linear = nn.Linear(40, 24, bias=False)
    linear.weight.data = linear.weight.data.to(dtype).float()
    if dtype == torch.float16:
        # small steps near 1 are no bfloat16 numbers
        linear.weight.data[0, 0] = 1 + 2**-10
    narrow = as_stored(linear)
    assert narrow.dtype == dtype and torch.equal(narrow.float(), linear.weight)
    assert as_stored(linear) is narrow
    linear.weight.data[3, 4] = 1 + 2**-20
    changed = as_stored(linear)
    assert changed.dtype == torch.float32 and torch.equal(changed, linear.weight)
    # NaN compares with nothing: such a weight stays as it is
    linear.weight.data[0, 0] = torch.nan
    assert as_stored(linear).dtype == torch.float32


def test_the_program_holds_16_bit_heads():
    model = packed_model("mixtral", dtype=torch.bfloat16).float()
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16().float()
    assert as_stored(model.lm_head).dtype == torch.bfloat16
    assert_same(model, *prompt(2))
