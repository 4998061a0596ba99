"""Import of GPTQ checkpoints: exact codes and scales, and everything that is different refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from gptq_files import gptq_model, pack_words, random_linear, reference
from packed_models import logits, relative_error
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

import gemq
from gemq.cli.run import run
from gemq.errors import CheckpointError, UnsupportedModelError
from gemq.format import default_group_size
from gemq.integrity import WEIGHTS_FILE, read_json
from gemq.interchange import export, import_gptq
from gemq.interchange.gptq_tensors import checkpoint_format, common_group_size, convert, shape_of
from gemq.models import describe
from gemq.ops import dequantize

WIDTHS = (2, 3, 4, 8)


def imported(tensors, n, k, bits, group, form):
    """float32 weights ``[n, k]`` of one linear after :func:`convert`."""
    shape = shape_of("x", {part: list(t.shape) for part, t in tensors.items()}, n, k)
    assert (shape.bits, shape.group) == (bits, group)
    size = default_group_size(k, common_group_size([shape]))
    codes, meta, wrapped = convert("x", tensors, shape, size, form)
    weights = dequantize(codes.view(n, -1), meta.view(n, -1, 2), bits, k, size, torch.float32)
    return weights, wrapped


# one linear


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n, k, group", [(64, 96, 32), (32, 256, 128), (96, 128, 64), (64, 512, 256)])
def test_symmetric_is_bit_for_bit(n, k, group, bits, form):
    tensors, q, z = random_linear(n, k, bits, group, torch.Generator().manual_seed(bits), form=form)
    weights, wrapped = imported(tensors, n, k, bits, group, form)
    assert torch.equal(weights.double(), reference(tensors, q, z, torch.float64))
    assert torch.equal(weights.half(), reference(tensors, q, z)) and wrapped == 0


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_asymmetric_is_within_one_rounding_of_the_offset(bits, form):
    n, k, group = 64, 256, 64
    tensors, q, z = random_linear(n, k, bits, group, torch.Generator().manual_seed(9), sym=False, form=form)
    weights, _ = imported(tensors, n, k, bits, group, form)
    exact = reference(tensors, q, z, torch.float64)
    offset = (tensors["scales"].double() * z)[tensors["g_idx"].long()].t()
    assert bool(((weights.double() - exact).abs() <= offset * 2.0**-11 + 1e-7).all())
    # and no more of it: where the offset is a number of float16, so is the result
    same = offset == offset.half().double()
    assert bool(same.any()) and torch.equal(weights.double()[same], exact[same])


def test_a_zero_point_stored_as_minus_one_is_zero():
    tensors, q, z = random_linear(32, 64, 4, 32, torch.Generator().manual_seed(1), form="gptq")
    z[1, 3] = 0
    tensors["qzeros"] = pack_words(((z - 1) % 16).t(), 4).t().contiguous()
    weights, wrapped = imported(tensors, 32, 64, 4, 32, "gptq")
    assert wrapped == 1 and torch.equal(weights.half(), reference(tensors, q, z))
    # in the second version the same number is the zero point itself
    weights, wrapped = imported(tensors, 32, 64, 4, 32, "gptq_v2")
    assert wrapped == 0 and not torch.equal(weights.half(), reference(tensors, q, z))


def changed(tensors, **changes):
    return {**tensors, **changes}


def test_what_a_linear_cannot_be():
    tensors, _, _ = random_linear(32, 64, 4, 32, torch.Generator().manual_seed(1))
    scales, order = tensors["scales"], torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    for bad, message in (
        (changed(tensors, g_idx=order.int()), "x was quantized in activation order"),
        (changed(tensors, scales=scales * 0), "x.scales must be finite and above zero for gemq, the smallest is 0"),
        (changed(tensors, scales=-scales), "above zero"),
        (changed(tensors, scales=scales * float("nan")), "finite"),
        (changed(tensors, scales=scales + float("inf")), "finite"),
        (changed(tensors, scales=scales.float() * 1.0001), "x.scales are float32 and not exact in float16"),
        (changed(tensors, scales=torch.full_like(scales, 60000)), "x: scale times zero point is beyond float16"),
        (changed(tensors, qweight=tensors["qweight"].long()), "x.qweight must be int32, got int64"),
        (changed(tensors, qweight=tensors["qweight"][:-1]), "none of the widths"),
        (changed(tensors, qzeros=tensors["qzeros"][:, :-1]), r"x.qzeros has shape \[2, 3\], expected \[2, 4\]"),
        (changed(tensors, scales=scales[:, 1:]), r"x.scales has shape \[2, 31\], expected \[2, 32\]"),
        (changed(tensors, scales=scales.repeat(2, 1)[:3]), "3 groups do not divide 64 columns"),
        ({k: v for k, v in tensors.items() if k != "qzeros"}, "x has no qzeros"),
    ):
        with pytest.raises(CheckpointError, match=message):
            imported(bad, 32, 64, 4, 32, "gptq")
    # exact in float16, whatever they are stored as; and without g_idx the order is the plain one
    weights, _ = imported(changed(tensors, scales=scales.float()), 32, 64, 4, 32, "gptq")
    bare, _ = imported({k: v for k, v in tensors.items() if k != "g_idx"}, 32, 64, 4, 32, "gptq")
    assert torch.equal(weights, bare)


def test_groups_that_gemq_has_not_are_refused():
    tensors, _, _ = random_linear(32, 96, 4, 48, torch.Generator().manual_seed(1))
    with pytest.raises(CheckpointError, match=r"groups of \[48\] columns cannot be kept"):
        imported(tensors, 32, 96, 4, 48, "gptq")


@pytest.mark.parametrize("config, message", [
    ({"quant_method": "awq"}, "quant_method must be gptq, got 'awq'"),
    ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "_format must be gptq or gptq_v2, got 'marlin'"),
    ({"is_marlin_format": True}, "checkpoint_format must be"),
])
def test_other_formats(config, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint_format(config)
    assert checkpoint_format({"bits": 4}) == "gptq" and checkpoint_format({"format": "gptq_v2"}) == "gptq_v2"


# a model


def dense_twin(family, made):
    """The tiny model with the reference weights of a GPTQ checkpoint, in float32."""
    from transformers.core_model_loading import revert_weight_conversion

    model = tiny_model(family)
    moe = describe(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
        for layer in moe.moe:
            for name in ("gate_up_proj", "down_proj"):
                stack = getattr(layer.experts, name)
                for stored in revert_weight_conversion(model, {f"{layer.path}.experts.{name}": stack}):
                    stem = stored.removesuffix(".weight")
                    expert, role = int(stem.split(".")[-2]), stem.split(".")[-1]
                    weights = reference(*made[stem], dtype=torch.float64).float()
                    half = moe.intermediate
                    at = {"w3": slice(half, None), "up_proj": slice(half, None)}.get(role, slice(0, len(weights)))
                    stack[expert, at] = weights
        for name, module in model.named_modules():
            if name in made:
                module.weight.copy_(reference(*made[name], dtype=torch.float64).float())
    return model


@pytest.mark.parametrize("family, options", [
    ("mixtral", {"bits": 4}),
    ("mixtral", {"bits": 2, "attention": 16, "form": "gptq_v2"}),
    ("qwen2_moe", {"bits": 8, "group": -1, "zero_bias": True}),
    ("deepseek_v2", {"bits": 4}),
    ("mixtral", {"bits": 3}),
    ("glm4_moe", {"bits": 4, "attention": 8, "form": "gptq_v2"}),
])  # fmt: skip
def test_the_imported_model_computes_what_the_checkpoint_holds(family, options, tmp_path):
    made = gptq_model(tmp_path / "gptq", family, **options)
    done = import_gptq(tmp_path / "gptq", tmp_path / "gemq")
    model = gemq.from_pretrained(tmp_path / "gemq", dtype=torch.float32, verify=True)
    assert relative_error(logits(model), logits(dense_twin(family, made))) < 1e-5
    widths = {w for row in done.config.widths.experts.values() for w in row}
    assert widths == {options["bits"]} and done.config.widths.attention == options.get("attention", options["bits"])
    assert done.config.method == "gptq" and done.bytes == sum(
        t.nbytes for t in load_file(tmp_path / "gemq" / WEIGHTS_FILE).values()
    )


def test_down_projections_of_another_width(tmp_path):
    made = gptq_model(tmp_path / "gptq", width_of=lambda s: 8 if ".experts.1.w2" in s else None)
    done = import_gptq(tmp_path / "gptq", tmp_path / "gemq")
    assert done.config.widths.experts == {0: [4] * 4, 1: [4] * 4}
    assert done.config.widths.down == {0: [4, 8, 4, 4], 1: [4, 8, 4, 4]}
    model = gemq.from_pretrained(tmp_path / "gemq", dtype=torch.float32, verify=True)
    assert relative_error(logits(model), logits(dense_twin("mixtral", made))) < 1e-5
    dense = load_file(export(tmp_path / "gemq", tmp_path / "dense", dtype=torch.float16).path / WEIGHTS_FILE)
    for stem, parts in made.items():
        assert torch.equal(dense[f"{stem}.weight"], reference(*parts)), stem


def test_experts_of_different_widths_and_shards(tmp_path):
    """GPTQModel's ``dynamic`` gives single modules their own width; gemq keeps it where an expert has one."""
    made = gptq_model(tmp_path / "gptq", width_of=lambda stem: 2 if ".experts.1." in stem else None)
    done = import_gptq(tmp_path / "gptq", tmp_path / "gemq", shard_bytes=30_000)
    assert done.config.widths.experts == {0: [4, 2, 4, 4], 1: [4, 2, 4, 4]}
    model = gemq.from_pretrained(tmp_path / "gemq", dtype=torch.float32)
    assert relative_error(logits(model), logits(dense_twin("mixtral", made))) < 1e-5
    # out again: 16-bit weights are those of AutoGPTQ's float16 arithmetic, bit for bit
    dense = load_file(export(tmp_path / "gemq", tmp_path / "dense", dtype=torch.float16).path / WEIGHTS_FILE)
    for stem, parts in made.items():
        assert torch.equal(dense[f"{stem}.weight"], reference(*parts)), stem


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def edit_config(folder, change):
    config = read_json(folder / "config.json")
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


EXPERT = "model.layers.0.block_sparse_moe.experts.2.w3"


@pytest.mark.parametrize("options, change, message", [
    ({"width_of": lambda s: 8 if s == EXPERT else None}, None, r"expert 2 of layer 0 has widths .*'up': 8"),
    ({"width_of": lambda s: 16 if s == EXPERT else None}, None, r"expert 2 of layer 0 has widths .*'up': 16"),
    ({"width_of": lambda s: 8 if "1.self_attn.k" in s else None}, None, r"attention has linears of 4 bits .* and 8 \("),
    ({}, lambda t: t.pop(f"{EXPERT}.scales"), f"{EXPERT} has no scales"),
    ({}, lambda t: t.update({f"{EXPERT}.g_idx": t[f"{EXPERT}.g_idx"].flip(0)}), f"{EXPERT} was quantized in act"),
    ({}, lambda t: t.update({f"{EXPERT}.bias": torch.ones(96)}), f"the model has no place for: {EXPERT}.bias"),
    ({}, lambda t: t.pop("model.norm.weight"), "the checkpoint has no model.norm.weight"),
    ({}, lambda t: (t.pop("lm_head.weight"), t.update({"lm_head.qweight": torch.zeros(1)})), "lm_head.weight is qu"),
    ({"zero_bias": True}, lambda t: t.update({"model.layers.0.rotary_emb.inv_freq": torch.ones(3)}), None),
], ids=["widths", "16 bits", "attention", "missing", "act order", "bias", "norm", "head", "leftovers"])  # fmt: skip
def test_models_that_are_refused_leave_nothing(options, change, message, tmp_path):
    gptq_model(tmp_path / "gptq", **options)
    if change:
        edit(tmp_path / "gptq", change)
    if message is None:
        assert import_gptq(tmp_path / "gptq", tmp_path / "gemq").config.widths.attention == 4
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        import_gptq(tmp_path / "gptq", tmp_path / "gemq")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


def test_folders_that_are_no_gptq_checkpoints(tmp_path, model_folder):
    with pytest.raises(CheckpointError, match="is not a GPTQ checkpoint: it has no quantization_config"):
        import_gptq(model_folder, tmp_path / "out")
    gptq_model(tmp_path / "gptq")
    edit_config(tmp_path / "gptq", lambda c: c["quantization_config"].update(quant_method="bitsandbytes"))
    with pytest.raises(CheckpointError, match="quant_method must be gptq, got 'bitsandbytes'"):
        import_gptq(tmp_path / "gptq", tmp_path / "out")
    edit_config(tmp_path / "gptq", lambda c: c.update(quantization_config={"bits": 4}, model_type="llama"))
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported"):
        import_gptq(tmp_path / "gptq", tmp_path / "out")


def test_the_command_and_autogptqs_own_file(tmp_path, capsys):
    gptq_model(tmp_path / "gptq", sym=False)
    edit_config(tmp_path / "gptq", lambda c: c.pop("quantization_config"))
    (tmp_path / "gptq" / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    name = f"{EXPERT}.qzeros"
    edit(tmp_path / "gptq", lambda t: t.update({name: torch.full_like(t[name], -1)}))
    assert run(["import-gptq", str(tmp_path / "gptq"), "-o", str(tmp_path / "gemq")]) == 0
    shown = capsys.readouterr()
    assert "experts 4 bits, attention 4" in shown.out and "192 zero points are stored as -1" in shown.err
    assert run(["inspect", str(tmp_path / "gemq")]) == 0
    assert not (tmp_path / "gemq" / "quantize_config.json").exists()
