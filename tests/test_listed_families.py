"""Types that are supported by structure: everything that a user does with them, against transformers and autograd.

Their steps run in transformers' own forward, so that what is tested is what gemq adds: the parts that it finds, Eq. 6,
packing, files, and its decode loop around that forward.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from listed_models import LISTED, OWN_STEPS, WRAPPED, listed_model
from safetensors.torch import load_file
from test_engine import modules_of, packed_bytes_of, streamed
from test_importance import RTN, perturbed
from tiny_models import random_windows, slow_but, tiny_model
from torch import nn
from transformers import AutoConfig

import gemq
from gemq.algorithms.layerwise import expert_hidden
from gemq.algorithms.method import MethodConfig
from gemq.auto_class import auto_class
from gemq.engine.progression import measure_importance, quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.generation import Decoding, GenerationOptions
from gemq.generation.memory import cache_bytes_per_token, state_bytes_per_row
from gemq.models import SUPPORTED, describe, families
from gemq.models.weighted_inputs import call_by_ids
from gemq.nn.experts import PROJECTIONS
from gemq.reference.importance import expert_calls, expert_cost

# of each kind of attention, block and router one on every run; the others are slow
QUICK = ("deepseek_v32", "gemma4", "gpt_oss", "granitemoehybrid", "laguna", "nemotron_h", "qwen3_5_moe")
EVERY = slow_but(LISTED | WRAPPED, QUICK)
# linears that stay as they are: the head, gates, rows that set how a state decays, an indexer's weights, and those
# outside mixers and MLPs (AXK2's fc1 and fc2; Qwen4's mixing of residual streams)
KEPT = {"lm_head", "shared_expert_gate", "in_proj_a", "in_proj_b", "b_proj", "x_proj", "dt_proj", "weights_proj", "fc1",
        "fc2", "block_inject_weight", "input_mix_weight_down", "input_mix_weight_up"}
METHOD = MethodConfig(budgets=(2.0,), perturbation="rtn", per_layer="none", batch_size=2)
WINDOWS = random_windows(5, 16)


@pytest.mark.parametrize("kind", LISTED | WRAPPED)
def test_parts_are_found(kind: str) -> None:
    model = listed_model(kind)
    moe = describe(model)
    assert (moe.num_experts, moe.hidden, moe.intermediate) == (4, 64, 96) and moe.moe
    assert moe.top_k == model.config.get_text_config().num_experts_per_tok if "llama4" in kind else moe.top_k == 2
    for layer in moe.moe:
        assert model.get_submodule(layer.router_path) is layer.router and layer.router.weight.shape == (4, 64)
    for path, linear in moe.linears().items():
        assert model.get_submodule(path) is linear
    linears = {path for path, module in moe.decoder.named_modules(prefix=moe.decoder_path)
               if isinstance(module, nn.Linear)}
    kept = {path.rpartition(".")[2] for path in linears - set(moe.linears()) - {m.router_path for m in moe.moe}}
    assert kept <= KEPT


def quantize_expert(layer, expert: int) -> tuple:
    """One expert as it is and at 2 bits, as functions of its input."""
    first, second = (layer.form.standard(name, weight.detach())[expert].contiguous()
                     for name, weight in zip(PROJECTIONS, layer.form.weights(layer.experts), strict=True))
    low, (inner,) = (perturbed(first, 2), perturbed(second, 2)), layer.form.between(layer.experts).of([expert])
    return lambda x: expert_hidden(first, x, inner) @ second.T, lambda x: expert_hidden(low[0], x, inner) @ low[1].T


def shared_costs(model: nn.Module, layer, windows: torch.Tensor) -> float:
    """Eq. 6 of a layer's shared expert at 2 bits, with the gradient at its own output."""
    calls: list[tuple] = []

    def seen(module, args, output):
        calls.append([args[0].detach(), output.detach()])
        output.register_hook(lambda g, call=calls[-1]: call.append(g.detach()))

    handle = layer.shared.register_forward_hook(seen)
    expert_calls(model, [layer.experts], windows)
    handle.remove()
    saved = {name: child.weight.detach().clone() for name, child in layer.shared.named_children()
             if isinstance(child, nn.Linear)}
    total = 0.0
    with torch.no_grad():
        for name, weight in saved.items():
            getattr(layer.shared, name).weight.data = perturbed(weight, 2)
        for x, before, gradient in calls:
            total += float((gradient * (before - layer.shared(x))).double().square().sum())
        for name, weight in saved.items():
            getattr(layer.shared, name).weight.data = weight
    return total


def call_experts_by_ids(model: nn.Module, moe, windows: torch.Tensor) -> None:
    """Make experts whose inputs are weighted take ids, so that one expert's output is seen; the model stays the same.
    """
    with torch.no_grad():
        before = model(input_ids=windows, use_cache=False).logits
    for layer in moe.moe:
        first, second = layer.experts.gate_up_proj, layer.experts.down_proj

        def forward(x, ids, weights, first=first, second=second, act=layer.experts.act_fn):
            gate, up = torch.einsum("th,thn->tn", x, first[ids[:, 0]]).chunk(2, -1)
            return torch.einsum("ti,tih->th", up * act(gate), second[ids[:, 0]]) * weights

        layer.experts.forward = forward
        call_by_ids(layer.block)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=windows, use_cache=False).logits, before)


@pytest.mark.parametrize("kind", EVERY)
def test_costs_are_those_of_autograd(kind: str) -> None:
    model = listed_model(kind)
    moe, windows = describe(model), random_windows(3, 16)
    model.requires_grad_(False)
    if "llama4" in kind:
        call_experts_by_ids(model, moe, windows)
    found = measure_importance(ResidentSource(model), windows, (2,), perturbation=RTN, batch_size=3)
    for row, layer in enumerate(moe.moe):
        calls = expert_calls(model, [layer.experts], windows)
        for expert in (0, 3):
            before, after = quantize_expert(layer, expert)
            expected = sum(expert_cost(call, expert, before, after) for call in calls)
            assert found.costs.routed[row, expert, 0] == pytest.approx(expected, rel=1e-3, abs=1e-16)
        if layer.shared is not None:
            expected = shared_costs(model, layer, windows)
            assert found.costs.shared[row, 0] == pytest.approx(expected, rel=1e-3, abs=1e-16)


def hub_folder(kind: str, path: Path) -> Path:
    """The model as its checkpoints are: 16 bits, names of their own."""
    model = listed_model(kind)
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        tensor.data = tensor.data.to(torch.bfloat16)  # not model.to(), which would take Llama 4's complex numbers
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return path


def loaded_by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("kind", EVERY)
def test_from_disk_and_from_memory_the_same_bytes(kind: str, tmp_path: Path) -> None:
    folder = hub_folder(kind, tmp_path / "model")
    ((one, modules),) = streamed(folder, tmp_path / "run", METHOD)
    whole = loaded_by_transformers(folder).eval()
    (other,) = quantize_progressively(ResidentSource(whole), WINDOWS, METHOD)
    assert packed_bytes_of([(one, modules)]) == packed_bytes_of([(other, modules_of(other))])
    assert all(map(torch.equal, one.routers.values(), other.routers.values()))


@pytest.fixture(scope="module", params=EVERY)
def made(request, tmp_path_factory, tokenizer, text_file):
    """A model that the command quantized: its kind, the source's and the checkpoint's folder."""
    path = tmp_path_factory.mktemp(request.param)
    folder = hub_folder(request.param, path / "model")
    tokenizer.save_pretrained(folder)
    gemq.quantize(str(folder), str(path / "out"), bits=2.0, calibration=str(text_file), samples=4, length=12,
                  recipe="fast", device="cpu")
    return request.param, folder, path / "out"


def test_a_checkpoint_holds_the_names_of_its_source(made) -> None:
    """Tensors that are not quantized have the source's names, so that other readers find them."""
    _, folder, out = made
    source, packed = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    plain = {name for name in packed if not name.endswith(("_codes", "_meta"))}
    assert plain <= source.keys() and any(name.endswith("_codes") for name in packed)
    # float32 is what transformers keeps so, whatever the files hold
    loaded = loaded_by_transformers(folder, torch.bfloat16)
    kept = sum(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
    # a module may make its own weight float32 (Hunyuan's router), which files need not
    assert kept or not any(packed[name].dtype == torch.float32 for name in plain)
    assert all(source[name].dtype == packed[name].dtype for name in plain if packed[name].dtype != torch.float32)


def test_loaded_it_computes_what_its_dequantized_twin_does(made) -> None:
    _, _, out = made
    packed = gemq.from_pretrained(out, dtype=torch.float32)
    plain = gemq.from_pretrained(out, dtype=torch.float32).dequantize().float()
    ids = random_windows(2, 12, seed=5)
    with torch.no_grad():
        a, b = (model(input_ids=ids, use_cache=False).logits for model in (packed, plain))
    assert float((a - b).norm() / b.norm()) < 1e-5
    auto = loaded_by_transformers(out)
    with torch.no_grad():
        assert torch.equal(auto(input_ids=ids, use_cache=False).logits, a)


def test_it_decodes_to_transformers_tokens(made) -> None:
    """Greedy, of even and of left-padded rows, past a sliding window of 16."""
    _, _, out = made
    model = gemq.from_pretrained(out, dtype=torch.float32)
    ids, mask = random_windows(2, 12, seed=5), torch.ones(2, 12, dtype=torch.long)
    padded = mask.clone()
    padded[1, :5] = 0
    for rows in (mask, padded):
        with torch.no_grad():
            expected = model.generate(ids, attention_mask=rows, max_new_tokens=8, do_sample=False, pad_token_id=0,
                                      eos_token_id=None)
        run = Decoding(model, ids, rows, GenerationOptions(max_new_tokens=8))
        assert torch.equal(torch.stack(list(run), 1), expected[:, 12:])
        if model.config.model_type in OWN_STEPS:
            assert run.step_kind == "native"
        else:
            assert run.step_kind == "transformers" and "was not compared" in run.step_reason


def test_the_plan_knows_its_cache(made) -> None:
    _, _, out = made
    model = gemq.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        caches = [model(input_ids=random_windows(1, n), use_cache=True).past_key_values.layers for n in (3, 4)]
    states = [[t for layer in cache for t in tensors(layer)] for cache in caches]
    token = sum(t.nbytes for t in states[1]) - sum(t.nbytes for t in states[0])
    assert token == cache_bytes_per_token(model)
    assert sum(t.nbytes for t in states[0]) - 3 * token == state_bytes_per_row(model)


def tensors(layer: object) -> list[torch.Tensor]:
    """Tensors of a cache layer, but for its counters."""
    found: list[torch.Tensor] = []
    for value in vars(layer).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        found += [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return found


def test_the_towers_of_a_wrapper_travel(made) -> None:
    """Vision and audio towers are written back as they are, and the folder loads as the source's class."""
    kind, folder, out = made
    if kind not in WRAPPED:
        pytest.skip("a text model")
    source, packed = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    towers = [name for name in source if any(part in name for part in ("visual", "vision", "audio"))]
    assert towers and all(torch.equal(source[name], packed[name]) for name in towers)
    assert type(gemq.from_pretrained(out)).__name__ == WRAPPED[kind][0]


def test_a_type_that_fits_works_unlisted(monkeypatch, caplog):
    """Its structure is what counts; a warning says, once, that it was not compared."""
    model = tiny_model("olmoe")
    wanted = describe(model)
    monkeypatch.setattr(families, "SUPPORTED", tuple(kind for kind in SUPPORTED if kind != "olmoe"))
    families._tell_unlisted.cache_clear()
    for _ in range(2):
        assert describe(model).attention == wanted.attention
    families.check_supported(model.config)
    assert caplog.text.count("model type olmoe has the structure of supported types, but was never compared") == 1
