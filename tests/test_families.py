"""Every supported family from end to end: found, quantized, packed, saved, loaded in a new process, run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from listed_models import ABSENT, LISTED, WRAPPED, listed_model
from packed_models import logits, quantized, quantized_model, relative_error
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, random_windows, slow_but, tiny_model
from torch import nn

import gemq
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.router_tuning import RouterTuningConfig, tune_routers
from gemq.checkpoint import save_packed
from gemq.checkpoint_summary import summarize
from gemq.engine.progression import quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.errors import UnsupportedModelError
from gemq.integrity import read_header, weight_files
from gemq.models import SUPPORTED, describe, packed_modules
from gemq.models.families import check_supported
from gemq.packed_model import kept_in_float32
from gemq.pipeline import QuantizeConfig, check_budgets

# layers, first MoE layer, linears of attention and dense MLPs in the model, shared multiple
STRUCTURE = {
    "mixtral": (2, 0, 8, 0, 0.0),
    "deepseek_v2": (3, 1, 12, 3, 2.0),
    "qwen2_moe": (2, 0, 8, 0, 128 / 96),
    "qwen3_moe": (2, 0, 8, 0, 0.0),
    "olmoe": (2, 0, 8, 0, 0.0),
    "deepseek_v2_groups": (3, 1, 15, 3, 2.0),
    "deepseek_v3": (3, 1, 15, 3, 2.0),
    "glm4_moe": (3, 1, 12, 3, 1.0),
    "qwen3_next": (2, 0, 6, 0, 128 / 96),
    "dots1": (3, 1, 12, 3, 2.0),
}
# families with correction biases
CORRECTED = ("deepseek_v3", "glm4_moe", "dots1")

# a new process computes the logits of every folder, by every way of loading; the first saves what it loaded again
LOADER = """
import sys
from pathlib import Path
import torch
import gemq
from packed_models import logits
from transformers import AutoModelForCausalLM

root, again, results = Path(sys.argv[1]), sys.argv[2:], {}
for folder in sorted(path.parent for path in root.glob("*/*/config.json")):
    kind, name = folder.parts[-2:]
    model = gemq.from_pretrained(folder)
    results[name, kind, "gemq"] = model.dtype, logits(model)
    results[name, kind, "auto"] = model.dtype, logits(AutoModelForCausalLM.from_pretrained(folder))
    for into, shard in zip(again, ("5GB", "40KB")):
        model.save_pretrained(Path(into) / name, max_shard_size=shard)
torch.save(results, root / "results.pt")
"""


def in_a_new_process(root, *again):
    """The results of ``LOADER``."""
    command = [sys.executable, "-c", LOADER, *map(str, (root, *again))]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(root / "results.pt")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return SimpleNamespace(family=request.param, **vars(quantized(request.param)))


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """``(expected, results)``: every family in float32, bfloat16 and sharded, through two new processes.

    What the first saves again, in one file (``again``) and in shards, only the second loads.
    """
    root = tmp_path_factory.mktemp("families")
    saved, again, sharded = root / "1" / "saved", root / "2" / "again", root / "2" / "again-sharded"
    expected = {}
    for family in FAMILIES:
        made = quantized(family)
        expected[f"{family}-float32"] = torch.float32, logits(made.packed)
        save_packed(made.packed, made.config, saved / f"{family}-float32")
        save_packed(made.packed, made.config, saved / f"{family}-sharded", max_shard_size="40KB")
        expected[f"{family}-sharded"] = expected[f"{family}-float32"]
        save_packed(made.packed, made.config, saved / f"{family}-bfloat16", dtype=torch.bfloat16)
        for parameter in made.packed.parameters():
            # not model.to(bfloat16), which would round the rotary frequencies as loading does not
            parameter.data = parameter.data.to(torch.bfloat16)
        expected[f"{family}-bfloat16"] = torch.bfloat16, logits(made.packed)
    results = in_a_new_process(root / "1", again, sharded) | in_a_new_process(root / "2")
    for name in expected:
        for folder, least in ((saved, 2 if name.endswith("-sharded") else 1), (again, 1), (sharded, 2)):
            assert len(weight_files(folder / name)) >= least
    return expected, results


def test_the_tests_know_every_family():
    compared = {tiny_model(family).config.model_type for family in FAMILIES}
    listed = {listed_model(kind).config.get_text_config().model_type for kind in LISTED | WRAPPED}
    assert compared | listed | set(ABSENT) == set(SUPPORTED)
    assert compared & listed == {"deepseek_v3"}  # inside Kimi K2.5


@pytest.mark.parametrize("family", FAMILIES)
def test_describe_finds_every_part(family):
    model = tiny_model(family)
    layers, first, attention, dense, multiple = STRUCTURE[family]
    moe = describe(model)
    assert (moe.num_experts, moe.top_k, moe.hidden, moe.intermediate) == (4, 2, 64, 96)
    assert [layer.index for layer in moe.moe] == list(range(first, layers))
    assert len(moe.layers) == layers
    assert (len(moe.attention), len(moe.dense)) == (attention, dense)
    assert moe.shared_multiple == pytest.approx(multiple)
    assert moe.expert_parameters == 3 * 64 * 96
    for path, linear in (moe.attention | moe.dense).items():
        assert model.get_submodule(path) is linear
    for layer in moe.moe:
        assert layer.experts is model.get_submodule(f"{layer.path}.experts")
        assert layer.experts.gate_up_proj.shape == (4, 192, 64)
        assert layer.experts.down_proj.shape == (4, 64, 96)
        assert layer.router.weight.shape == (4, 64)
        assert (layer.shared is None) == (multiple == 0)
        assert (layer.shared_gate is not None) == (family in ("qwen2_moe", "qwen3_next"))
        if layer.shared is not None:
            assert layer.shared is model.get_submodule(layer.shared_path)
    # nothing but embeddings, norms, routers and shared gates stays unquantized
    found = set(moe.attention) | set(moe.dense)
    names = ("gate_proj", "up_proj", "down_proj")
    found |= {f"{layer.shared_path}.{name}" for layer in moe.moe if layer.shared for name in names}
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {p.rpartition(".")[2] for p in linears - found} <= {"lm_head", "shared_expert_gate", "in_proj_ba"}


def test_packed_logits_are_the_dequantized_models(case):
    assert relative_error(logits(case.packed), logits(case.dense)) <= 1e-5
    parts = dict(packed_modules(case.packed))
    layers, first, attention, dense, multiple = STRUCTURE[case.family]
    shared = 3 * (layers - first) if multiple else 0
    assert len(parts) == layers - first + attention + dense + shared
    bits = case.config.widths.weight_bits
    assert len(bits) == 3 * 4 * (layers - first)
    assert set(bits) <= {1, 2, 3}
    if not multiple:
        assert len(set(bits)) > 1
        # with shared experts the program shares the budget among them and the routed ones
        assert case.config.widths.bits_per_expert == pytest.approx(2.0)


def test_a_budget_counts_shared_experts(case):
    assert case.stage.allocation.bits_per_expert <= 2.0 + 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["float32", "sharded", "bfloat16"])
@pytest.mark.parametrize("folder", ["saved", "again", "again-sharded"])
@pytest.mark.parametrize("way", ["gemq", "auto"])
def test_a_new_process_computes_the_same_bits(reloaded, family, kind, way, folder):
    expected, results = reloaded
    dtype, before = expected[f"{family}-{kind}"]
    loaded_dtype, after = results[f"{family}-{kind}", folder, way]
    assert loaded_dtype == dtype
    assert torch.equal(after, before)


def test_greedy_generation_gives_the_same_tokens(case):
    prompt = random_windows(2, 7, seed=3)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    expected = case.dense.generate(prompt, attention_mask=mask, **options)
    assert expected.shape == (2, 19)
    assert torch.equal(case.packed.generate(prompt, attention_mask=mask, **options), expected)


def test_gradients_reach_the_embeddings(case):
    ids = random_windows(2, 9, seed=4)
    gradients = []
    for model in (case.packed, case.dense):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=embeds, use_cache=False, labels=ids).loss.backward()
        gradients.append(embeds.grad)
    assert float(gradients[1].norm()) > 0
    assert relative_error(*gradients) <= 1e-5


def test_a_packed_block_compiles_to_one_graph(case):
    torch._dynamo.reset()
    block = describe(case.dense).moe[0].path
    block = case.packed.get_submodule(block)
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = block(x)
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize("family", slow_but(FAMILIES, ("mixtral", "deepseek_v2", "qwen3_next")))
def test_a_whole_packed_model_compiles_to_one_graph(family):
    torch._dynamo.reset()
    model = quantized(family, tune=False).packed
    ids = random_windows(2, 12, seed=5)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(input_ids=ids, use_cache=False).logits
    assert relative_error(got, logits(model)) <= 1e-5


@pytest.mark.parametrize(
    ("candidates", "budget"), [((0, 1, 2), 1.0), ((1, 4, 8), 4.0), ((2, 5, 6, 7), 5.0), ((0, 3), 1.5)], ids=str
)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_any_candidates(tmp_path, family, candidates, budget):
    made = quantized(family, budget, candidates=candidates, shared_bits=4, per_layer="c2c3", tune=False)
    used = {b for row in made.config.widths.experts.values() for b in row}
    assert {candidates[-1], candidates[-2]} <= used <= set(candidates)
    assert relative_error(logits(made.packed), logits(made.dense)) <= 1e-5
    save_packed(made.packed, made.config, tmp_path / "model")
    loaded = gemq.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(made.packed))


def test_a_layer_may_lose_every_expert(tmp_path):
    made = quantized("mixtral", 0.0, method="uniform", tune=False)
    assert made.config.widths.experts == {0: [0] * 4, 1: [0] * 4}
    save_packed(made.packed, made.config, tmp_path / "model")
    got = logits(gemq.from_pretrained(tmp_path / "model"))
    assert torch.isfinite(got).all()
    assert relative_error(got, logits(made.dense)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"per_layer": "none"}, {"shared_bits": 4}, {"method": "pmq"}], ids=str)
def test_budgets_are_checked_before_measuring(family, options):
    dense = tiny_model(family)
    moe = describe(dense)
    if "shared_bits" in options and not moe.shared_multiple:
        options = {}
    with pytest.raises(ValueError, match=r"the budget must be in .* for this model") as caught:
        check_budgets(moe, MethodConfig(budgets=(2.0, 0.5), **options))
    low = float(re.search(r"in ([0-9.]+)\.\.", str(caught.value))[1])
    # the range is the program's own: its lowest budget is solved, a little less is not
    check_budgets(moe, MethodConfig(budgets=(low + 1e-5,), **options))
    for budget, feasible in ((low + 1e-5, True), (low - 1e-3, False)):
        config = MethodConfig(budgets=(budget,), tune=False, **options)
        stages = quantize_progressively(ResidentSource(dense), random_windows(), config)
        if feasible:
            assert next(stages).budget == budget
        else:
            with pytest.raises(ValueError, match="budget must be in"):
                next(stages)


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_leaves_linears_alone(tmp_path, family):
    made = quantized(family, attention_bits=16, dense_bits=16, shared_bits=16, tune=False)
    assert all(path.endswith("experts") for path, _ in packed_modules(made.packed))
    save_packed(made.packed, made.config, tmp_path / "model")
    assert torch.equal(logits(gemq.from_pretrained(tmp_path / "model")), logits(made.packed))


def test_tied_embeddings_are_stored_once(tmp_path):
    dense = tiny_model("qwen3_moe")
    dense.config.tie_word_embeddings = True
    dense = type(dense)(dense.config).eval()
    made = quantized_model(dense, tune=False)
    save_packed(made.packed, made.config, tmp_path / "model")
    loaded = gemq.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(made.packed))


def test_other_model_types_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    llama = LlamaForCausalLM(LlamaConfig(**small))
    for kind, model in (("gpt2", gpt2), ("llama", llama)):
        with pytest.raises(UnsupportedModelError, match=f"'{kind}' is not supported yet; supported: afmoe, aria_text"):
            describe(model)
        with pytest.raises(UnsupportedModelError, match="not supported yet"):
            check_supported(model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_moves_every_router_and_nothing_else(family):
    """In bfloat16, so that the steps are the float32 masters'."""
    model = tiny_model(family).to(torch.bfloat16)
    kept = kept_in_float32(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moe = describe(model)
    tune_routers(moe, random_windows(4), RouterTuningConfig(learning_rate=1e-3, epochs=2))
    after = model.state_dict()
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert moved == {f"{layer.router_path}.weight" for layer in moe.moe}
    assert len(kept) == (2 if family in CORRECTED else 0)


@pytest.mark.parametrize("family", CORRECTED)
def test_correction_biases_stay_in_float32(family, tmp_path):
    made = quantized(family, tune=False)
    biases = {n: b for n, b in made.packed.named_buffers() if n.endswith("e_score_correction_bias")}
    save_packed(made.packed, made.config, tmp_path / "model", dtype=torch.bfloat16)
    dtypes = {n: e.dtype for file in weight_files(tmp_path / "model") for n, e in read_header(file).items()}
    loaded = dict(gemq.from_pretrained(tmp_path / "model").named_buffers())
    assert len(biases) == 2
    for name, bias in biases.items():
        assert bias.any() and dtypes[name] == "F32" and torch.equal(loaded[name], bias)
        assert not torch.equal(bias, bias.bfloat16().float())
    said = made.stage.bytes
    assert said == summarize(tmp_path / "model").tensor_bytes


@pytest.mark.parametrize("family, name", [("qwen3_next", "mtp.layers.0.mlp.gate.weight"),
                                          ("deepseek_v3", "model.layers.61.mlp.gate.weight"),
                                          ("glm4_moe", "model.layers.92.mlp.gate.weight")])  # fmt: skip
def test_layers_of_multi_token_prediction_travel(family, name, tmp_path, tokenizer, text_file):
    """A published checkpoint has them beside the model; the packed one has them as they were, for servers that run
    them."""
    source, target = tmp_path / "source", tmp_path / "packed"
    tiny_model(family).save_pretrained(source)
    tokenizer.save_pretrained(source)
    (file,) = source.glob("*.safetensors")
    save_file(load_file(file) | {name: torch.randn(4, 64).bfloat16()}, file, {"format": "pt"})
    options = {"calibration": str(text_file), "samples": 4, "length": 16}
    config = QuantizeConfig(str(source), str(target), **options, method=MethodConfig(budgets=(2.0,), tune=False))
    (outcome,) = gemq.quantize(config)
    assert outcome.bits_per_expert <= 2.0 + 1e-9
    held = {n: t for f in weight_files(target) for n, t in load_file(f).items()}
    assert torch.equal(held[name], load_file(file)[name]) and len(held) > 20
    assert logits(gemq.from_pretrained(target)).isfinite().all()


def _with_bias(model):
    model.model.layers[1].mlp.experts.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 192))


def _other_activation(model):
    model.model.layers[1].mlp.experts.act_fn = nn.GELU()


def _transposed(model):
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.transpose(1, 2).contiguous())


def _router_of_other_shape(model):
    model.model.layers[1].mlp.gate.weight = nn.Parameter(torch.zeros(5, 64))


def _layers_differ(model):
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:, :128].clone())
    experts.down_proj = nn.Parameter(experts.down_proj[..., :64].clone())


def _no_decoder(model):
    model.model.layers = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_bias, r"layers\.1\.mlp\.experts is not supported yet: it holds .*gate_up_proj_bias"),
        (_other_activation, r"layers\.1\.mlp\.experts .* known activation .*\(activation GELU\)"),
        (_transposed, r"layers\.1\.mlp\.experts .* are not \[E, 2I, H\] and \[E, H, I\]"),
        (_router_of_other_shape, r"layers\.1\.mlp is not supported yet: none of gate, .* has a weight \[4, 64\]"),
        (_layers_differ, "MoE layers of different shapes"),
        (_no_decoder, r"no decoder\.layers list"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_other_structures_are_refused(change, message):
    model = tiny_model("mixtral")
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        describe(model)


def test_a_model_without_moe_layers_is_refused():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = tiny_model("qwen3_moe").config.to_dict() | {"mlp_only_layers": [0, 1]}
    with pytest.raises(UnsupportedModelError, match="has no MoE layer"):
        describe(Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)))
