"""Packed heads and embeddings: rounded, saved, loaded, run, planned, exported, refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from listed_models import LISTED, WRAPPED, listed_model
from packed_models import logits, quantized_model, relative_error
from safetensors.torch import load_file
from tiny_models import VOCAB, random_windows, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import gemq
from gemq import format as fmt
from gemq.algorithms.method import MethodConfig
from gemq.bench import BenchConfig, run_bench
from gemq.bench.roofline import other_bytes
from gemq.checkpoint import save_packed
from gemq.dry_run import preview
from gemq.engine.disk_source import DiskSource
from gemq.engine.progression import quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.errors import CheckpointError
from gemq.generation import Decoding, GenerationOptions
from gemq.interchange import export
from gemq.loading import check_model
from gemq.models.ends import end_widths, ends_of
from gemq.nn import LowBitEmbedding, LowBitLinear, TiedHead
from gemq.packed_config import PackedConfig
from gemq.pipeline import QuantizeConfig
from gemq.planning import PlanConfig, make_plan, other_machine, planned_widths
from gemq.planning.model_parts import located
from gemq.planning.output import output_size, resident_bytes
from gemq.reference.bits import unpack
from gemq.reference.grid import dequantize_codes, round_to_nearest
from gemq.reference.tiles import from_layout
from gemq.serving.packed_layers import ServingError, check_ends
from gemq.widths import Widths

QUICK = {"method": "uniform", "tune": False}
# model, widths that are asked for, widths that it gets: head and embedding
CASES = [("mixtral", (4, 16), (4, 16)), ("mixtral", (16, 8), (16, 8)), ("qwen2_moe", (6, 5), (6, 5)),
         ("tied", (5, 16), (5, 5)), ("tied", (16, 4), (4, 4))]


def model_of(name: str, vocabulary: int = VOCAB) -> nn.Module:
    """A tiny model; ``tied`` is a Mixtral whose head and embedding are one matrix."""
    model = tiny_model("mixtral" if name == "tied" else name)
    if name == "tied" or vocabulary != VOCAB:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings, config.vocab_size = name == "tied", vocabulary
        torch.manual_seed(1)
        model = type(model)(config).eval()
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    return model


def made(name: str, head: int, embedding: int, **options):
    return quantized_model(model_of(name), head_bits=head, embedding_bits=embedding, **QUICK | options)


def packed_matrix(n: int, k: int, bits: int, group_size: int = 128, seed: int = 0):
    """Codes, metadata, and the same matrix in float64."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    codes, meta = round_to_nearest(weight, bits, fmt.default_group_size(k, group_size), "mse")
    return codes, meta, dequantize_codes(codes, meta, torch.float64)


@pytest.mark.parametrize("n, k, group_size", [(97, 96, 128), (130, 256, 128), (64, 64, 32), (1, 32, 32), (33, 192, 64)])
@pytest.mark.parametrize("bits", fmt.END_BITS)
def test_rows_in_every_layout(n, k, group_size, bits):
    codes, meta, dense = packed_matrix(n, k, bits, group_size)
    ids = torch.randint(0, n, (3, 17), generator=torch.Generator().manual_seed(bits))
    ids[0, 0], ids[0, 1] = n - 1, 0
    module = LowBitEmbedding.from_codes(codes, meta, bits, group_size, dtype=torch.float32)
    for layout in fmt.LAYOUTS:
        module.prepare(layout)
        assert relative_error(module(ids).double(), dense[ids]) < 1e-6
        # the way of CUDA and of compiled graphs, without the compiled kernel
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            assert torch.equal(module(ids), dequantize_codes(codes, meta)[ids])
        packed, pairs = from_layout(module.weight_codes, module.weight_meta, bits, n, k, module.group_size, layout)
        assert torch.equal(dequantize_codes(unpack(packed, bits, k), pairs)[ids], module(ids))
        stored = module.state_dict()
        assert stored["weight_codes"].numel() == fmt.codes_bytes(n, k, bits)
        again = LowBitEmbedding(n, k, bits, group_size, dtype=torch.float32)
        again.load_state_dict(stored)
        assert torch.equal(again(ids), module(ids))


@pytest.mark.parametrize("layout", ["canonical", "cpu_tile", "gpu_tile"])
def test_compiled_scaled_and_in_other_dtypes(layout):
    codes, meta, dense = packed_matrix(50, 64, 5)
    module = LowBitEmbedding.from_codes(codes, meta, 5, 64, padding_idx=3, scale=8.0).to(torch.bfloat16)
    module.prepare(layout)
    ids = torch.arange(50)[None]
    want = dense.to(torch.bfloat16)[ids] * torch.tensor(8.0).to(torch.bfloat16)
    assert module(ids).dtype == torch.bfloat16 and torch.equal(module(ids), want)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(ids), want)
    assert (module.weight.dtype, module.weight.numel()) == (torch.bfloat16, 0)
    assert module.float()(ids).dtype == torch.float32 and module.weight_meta.dtype == torch.float16
    empty = module(ids[:, :0])
    assert empty.shape == (1, 0, 64)


@torch.no_grad()
def test_a_tied_head_multiplies_by_the_embedding():
    codes, meta, dense = packed_matrix(97, 64, 6)
    pair = nn.ModuleDict({"embedding": LowBitEmbedding.from_codes(codes, meta, 6, 64, tied=True, dtype=torch.float32)})
    pair["head"] = TiedHead(pair["embedding"], bias=True)
    nn.init.normal_(pair["head"].bias)
    pair["head"].prepare()
    assert pair["embedding"].layout == pair["head"].layout == "cpu_tile"
    twin, x = copy.deepcopy(pair), torch.randn(3, 64)
    assert twin["head"].weight_codes is twin["embedding"].weight_codes
    want = x.double() @ dense.T + pair["head"].bias.double()
    assert relative_error(twin["head"](x).double(), want) < 1e-5
    assert set(pair.state_dict()) == {"embedding.weight_codes", "embedding.weight_meta", "head.bias"}
    twin.load_state_dict(pair.state_dict())
    assert torch.equal(twin["head"](x), pair["head"](x)) and twin["embedding"].layout == "cpu_tile"


@pytest.mark.parametrize("name, asked, got", CASES)
def test_packed_saved_and_loaded(name, asked, got, tmp_path):
    found = made(name, *asked)
    assert (found.config.widths.head, found.config.widths.embedding) == got
    assert relative_error(logits(found.packed), logits(found.dense)) < 1e-4
    path = save_packed(found.packed, found.config, tmp_path / "a", dtype=torch.bfloat16)
    stored = load_file(path / "model.safetensors")
    ends = [n for n in stored if "lm_head" in n or "embed_tokens" in n]
    # codes and metadata, once where they are one matrix
    assert len(ends) == sum(2 if bits < 16 else 1 for bits in got) // (2 if name == "tied" else 1)
    loaded = gemq.from_pretrained(path)
    head = TiedHead if name == "tied" else LowBitLinear if got[0] < 16 else nn.Linear
    assert type(loaded.get_output_embeddings()) is head and loaded.dtype == torch.bfloat16
    assert type(loaded.get_input_embeddings()) is (LowBitEmbedding if got[1] < 16 else nn.Embedding)
    plain = AutoModelForCausalLM.from_pretrained(path)
    plain.tie_weights()
    plain.save_pretrained(tmp_path / "b")
    again = gemq.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(loaded), logits(plain)) and torch.equal(logits(loaded), logits(again))
    assert relative_error(logits(gemq.from_pretrained(path, dtype=torch.float32)), logits(found.packed)) < 0.02
    stored_config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (stored_config["version"], stored_config["head_bits"], stored_config["embedding_bits"]) == (4, *got)


@pytest.mark.parametrize("name, asked", [("mixtral", (5, 4)), ("tied", (4, 4))])
def test_disk_and_resident_agree_to_the_byte(name, asked, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path / "model")
    config = MethodConfig(budgets=(2.0,), head_bits=asked[0], embedding_bits=asked[1], router_bits=8, method="uniform",
                          batch_size=2)
    written = []
    for at, source in enumerate((
        ResidentSource(model),
        DiskSource(str(tmp_path / "model"), check_model(str(tmp_path / "model")), torch.float32, torch.device("cpu")),
    )):
        (result,) = quantize_progressively(source, random_windows(), config)
        assembly = result.assembly()
        folder = tmp_path / str(at)
        save_packed(assembly.model, assembly.config, folder, dtype=torch.bfloat16, weights=assembly.write)
        written.append((folder / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_the_ends_are_nearest_on_the_grid_and_layers_see_them():
    model = model_of("mixtral")
    found, plain = made("mixtral", 4, 4), made("mixtral", 16, 16)
    for path in ("lm_head", "model.embed_tokens"):
        weight = model.get_submodule(path).weight.detach()
        want, got = dequantize_codes(*round_to_nearest(weight, 4, 64, "mse")), found.dense.get_submodule(path).weight
        # a group whose two best ranges, or a weight whose two nearest codes, are equally near may take the other
        assert float((got - weight).norm()) == pytest.approx(float((want - weight).norm()), rel=1e-4)
        assert float((got != want).float().mean()) < 0.01
    # the layers were calibrated on what comes out of the packed embedding
    first = "model.layers.0.self_attn.q_proj.weight_codes"
    assert not torch.equal(found.packed.state_dict()[first], plain.packed.state_dict()[first])


def test_rounding_in_parts_gives_the_same(monkeypatch):
    whole = made("mixtral", 5, 6).packed.state_dict()
    monkeypatch.setattr("gemq.engine.ends._AT_ONCE", 7 * 64)
    monkeypatch.setattr("gemq.engine.layer_records._AT_ONCE", 5 * 64)
    parts = quantized_model(model_of("mixtral"), head_bits=5, embedding_bits=6, **QUICK).packed.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("name, asked", [("mixtral", (4, 16)), ("mixtral", (16, 5)), ("qwen2_moe", (6, 8)),
                                         ("tied", (8, 8))])
def test_the_steps_generate_alike(name, asked):
    model = made(name, *asked).packed
    ids, mask = random_windows(3, 9, seed=4), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0
    told = {}
    for step in ("native", "lean", "transformers"):
        run = Decoding(model, ids, mask, GenerationOptions(8, ignore_eos=True), compile="none", step=step)
        told[step] = torch.stack(list(run))
        assert run.step_kind == step
    assert torch.equal(told["native"], told["lean"]) and torch.equal(told["lean"], told["transformers"])
    own = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(own[:, 9:].T, told["lean"])


def test_a_compiled_step(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compile(step, backend="aot_eager", **options))
    model = made("tied", 4, 4).packed
    ids, told = random_windows(1, 9), []
    for mode in ("none", "compile"):
        told.append(torch.stack(list(Decoding(
            model, ids, None, GenerationOptions(4, ignore_eos=True), compile=mode, step="lean"))))
    assert torch.equal(*told)


@pytest.mark.parametrize("name", ["mixtral", "tied"])
def test_dequantized_and_exported(name, tmp_path):
    found = made(name, 4, 4)
    path = save_packed(found.packed, found.config, tmp_path / "packed", dtype=torch.bfloat16)
    export(path, tmp_path / "plain")
    loaded = gemq.from_pretrained(path)
    before = logits(loaded)
    dense = loaded.dequantize()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for end in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(dense, end)().weight, getattr(plain, end)().weight)
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    dense.tie_weights()
    assert tied == (name == "tied") and relative_error(logits(dense), before) < 0.02


@pytest.mark.parametrize("kind", ["gemma4_text", "llama4_text", "nemotron_h", "cohere2_moe", "gemma4", "llama4",
                                  "qwen3_vl_moe"])
def test_other_structures(kind, tmp_path):
    model = listed_model(kind)
    tied = ends_of(model).tied
    found = quantized_model(model, head_bits=8, embedding_bits=16 if tied else 8, **QUICK)
    assert relative_error(logits(found.packed), logits(found.dense)) < 2e-3
    path = save_packed(found.packed, found.config, tmp_path / "a", dtype=torch.bfloat16)
    loaded = gemq.from_pretrained(path)
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(loaded), logits(gemq.from_pretrained(tmp_path / "b")))
    assert kind in LISTED or kind in WRAPPED


@pytest.mark.parametrize("name, asked", [("mixtral", (4, 16)), ("mixtral", (16, 5)), ("tied", (6, 6))])
def test_planned_sizes(name, asked, tmp_path):
    found = made(name, *asked)
    path = save_packed(found.packed, found.config, tmp_path / "a", dtype=torch.bfloat16)
    method = MethodConfig(budgets=(2.0,), head_bits=asked[0], embedding_bits=asked[1], **QUICK)
    moe = located(found.dense.config)
    size = output_size(moe, planned_widths(moe, method, 2.0), torch.bfloat16)
    assert size.files == pytest.approx((path / "model.safetensors").stat().st_size, abs=16)
    held = sum(b.nbytes for n, b in found.packed.named_buffers() if n.endswith(("_codes", "_meta")))
    running = sum(p.numel() * 4 for p in found.packed.parameters())
    assert resident_bytes(moe.model, "cpu_tile", torch.float32) == held + running
    plans = [make_plan(found.dense.config, PlanConfig(m), other_machine("h100", torch.bfloat16))
             for m in (method, replace(method, head_bits=16, embedding_bits=16))]
    read, plain = (plan.inference[2.0].read for plan in plans)
    # the head is read whole, in tiles of 64 rows whose 6 bits take 8; the embedding a row
    packed = {4: 128 * (32 + 4), 6: 128 * (64 + 4), 16: VOCAB * 128}
    saved = VOCAB * 128 - packed[asked[0]]
    assert plain - read == pytest.approx(saved, abs=300)
    assert other_bytes(found.packed, 1) < other_bytes(made(name, 16, 16).packed, 1) + 1


def test_a_preview_and_a_benchmark(tiny_folder, tmp_path):
    method = MethodConfig(budgets=(2.0,), head_bits=4, embedding_bits=8, **QUICK)
    (shown,) = preview(QuantizeConfig(output=str(tmp_path / "o"), method=method, **tiny_folder))
    bits = {t.name: (t.bits, t.after) for t in shown.tensors}
    assert bits["lm_head.weight"] == (4, VOCAB * (32 + 4)) and bits["model.embed_tokens.weight"] == (8, VOCAB * 68)
    file = tmp_path / "config.json"
    model_of("tied").config.to_json_file(file)
    result = run_bench(BenchConfig(str(file), 2.0, tokens=4, prompt_length=4, profile_steps=0, head_bits=4,
                                   dtype="float32"))
    assert result.runs["gemq"].step == "native"


def test_the_command(gemq_run, model_folder, quick, tmp_path):
    options = ["--head-bits", "4", "--embedding-bits", "8"]
    code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--bits", "2", *quick, *options,
                              "--method", "uniform", "-q")
    assert code == 0, err
    assert gemq_run("verify", tmp_path / "out")[0] == 0
    code, out, err = gemq_run("inspect", tmp_path / "out")
    assert code == 0 and "head 4, embedding 8" in out and "head and embedding" in out
    assert "head, embedding | 4, 8 bits" in (tmp_path / "out" / "README.md").read_text()
    code, out, err = gemq_run("plan", model_folder, "--bits", "2", *options, "--json")
    assert code == 0 and json.loads(out)["options"]["method"]["head_bits"] == 4
    for wrong in ("3", "9", "0"):
        code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "no", *quick, "--head-bits", wrong)
        assert code == 2 and f"head_bits must be 4..8, or 16 for unquantized, got {wrong}" in err


def test_refused_widths():
    with pytest.raises(ValueError, match=r"embedding_bits must be 4\.\.8, or 16 for unquantized, got 2"):
        MethodConfig(embedding_bits=2)
    with pytest.raises(ValueError, match=r"head_bits must be 4\.\.8, or 16 for unquantized, got True"):
        MethodConfig(head_bits=True)
    with pytest.raises(ValueError, match=r"must be equal for a model whose head and embedding are one.*got 4 and 8"):
        made("tied", 4, 8)
    model = model_of("mixtral")
    model.lm_head = nn.Linear(48, VOCAB, bias=False)
    with pytest.raises(ValueError, match=r"head_bits must be 16 for .*48 columns are no multiple of 32, got 4"):
        end_widths(model, 4, 16)
    model.lm_head = type("OddHead", (nn.Linear,), {})(64, VOCAB)
    with pytest.raises(ValueError, match=r"module is a OddHead, which was not compared"):
        end_widths(model, 4, 16)
    model.lm_head = None
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has no head"):
        end_widths(model, 4, 16)
    with pytest.raises(ValueError, match=r"bits of an embedding must be in 4\.\.8, got 3"):
        LowBitEmbedding(4, 64, 3)
    with pytest.raises(IndexError, match=r"input_ids must be in 0\.\.3, got 0\.\.4"):
        LowBitEmbedding(4, 64, 4)(torch.arange(5))
    with pytest.raises(ServingError, match=r"a head of 4 bits .* quantize with --head-bits 16 --embedding-bits 16"):
        check_ends(PackedConfig(Widths({0: [2]}, head=4)))


def test_weights_that_are_no_numbers():
    model = model_of("mixtral")
    model.lm_head.weight.data[5, 5] = float("nan")
    with pytest.raises(gemq.GemqError, match=r"lm_head.weight: weights must be finite"):
        quantized_model(model, head_bits=4, **QUICK)


def test_stored_configurations():
    plain = PackedConfig(Widths({0: [2]})).to_dict()
    assert plain["version"] == 1 and "head_bits" not in plain and PackedConfig.from_dict(plain).widths.head == 16
    packed = PackedConfig(Widths({0: [2]}, embedding=5))
    stored = packed.to_dict()
    assert stored["version"] == 4 and PackedConfig.from_dict(stored).widths == packed.widths
    for changes, message in (
        ({"head_bits": 3}, r"head_bits must be bits in 4\.\.8 or 16, got 3"),
        ({"version": 3}, "head_bits must be absent"), ({"embedding_bits": "5"}, "embedding_bits must be bits in"),
        ({"embedding_bits": 6}, "does not match its digest"),
    ):
        with pytest.raises(CheckpointError, match=message):
            PackedConfig.from_dict(stored | changes)


def test_a_tied_checkpoint_of_different_widths(tmp_path):
    found = made("tied", 4, 4)
    wrong = replace(found.config, widths=replace(found.config.widths, embedding=8))
    path = save_packed(found.packed, wrong, tmp_path / "a", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"must be equal for a model whose head and embedding are one matrix"):
        gemq.from_pretrained(path)
