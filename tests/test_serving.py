"""The plug-ins for vLLM and SGLang, in fakes of their interfaces: a layer there computes what gemq's does."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import sys
from dataclasses import replace
from pathlib import Path

import fake_sglang
import fake_vllm
import pytest
import torch
from served_models import (
    FAMILIES,
    assert_linears_equal,
    checkpoint,
    config_of,
    inputs,
    moe_layers,
    routed,
    sglang_model,
    stored,
    topk,
    vllm_load,
    vllm_model,
)
from torch import nn

from gemq import serving
from gemq.checkpoint import load_packed_config
from gemq.errors import CheckpointError
from gemq.integrity import read_json
from gemq.serving import packed_layers
from gemq.serving.packed_layers import ServingError, local_ids, width_of


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """``{family: (folder, gemq's model)}``."""
    return {family: checkpoint(family, tmp_path_factory.mktemp("served") / family) for family in FAMILIES}


# vLLM


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_layers_compute_what_gemqs_do(vllm, checkpoints, family):
    folder, model = checkpoints[family]
    twin = vllm_model(vllm, folder, model, family)
    wanted = {name for name, _ in twin.named_parameters()}
    assert vllm_load(vllm, twin, folder, family) == wanted
    assert_linears_equal(twin, model)
    for layer, experts in moe_layers(twin, model, family):
        for tokens in (0, 1, 7):
            x, (ids, weights) = inputs(tokens, 64), routed(tokens, 4)
            with torch.no_grad():
                got = layer.forward_modular(x, weights, ids)
                assert torch.equal(got, experts(x, ids, weights)) and got.dtype == x.dtype


@pytest.mark.parametrize("placement", [[0, 1], [1, 0], [2, 3], [3, 0], [0]])
def test_vllm_expert_parallel_ranks_sum_to_the_whole(vllm, checkpoints, placement):
    folder, model = checkpoints["mixtral"]
    maps = []
    for here in (placement, [e for e in range(4) if e not in placement]):
        table = torch.full((4,), -1, dtype=torch.int32)
        table[torch.tensor(here)] = torch.arange(len(here), dtype=torch.int32)
        maps.append(table)
    ranks = [vllm_model(vllm, folder, model, "mixtral", expert_map=table) for table in maps]
    for rank in ranks:
        vllm_load(vllm, rank, folder, "mixtral")
    x, (ids, weights) = inputs(9, 64), routed(9, 4)
    ids[2, 1], ids[3] = -1, -1  # padding
    for layers in zip(*(moe_layers(rank, model, "mixtral") for rank in ranks), strict=True):
        with torch.no_grad():
            parts = [layer.forward_modular(x, weights, ids) for layer, _ in layers]
            expected = layers[0][1](x, ids, weights)
        assert torch.allclose(sum(parts), expected, atol=1e-5) and bool((parts[0] != parts[1]).any())
        assert bool((parts[0][3] == 0).all()) and not bool((expected[4] == 0).all())


@pytest.mark.parametrize("change, message", [
    ({"activation": fake_vllm.MoEActivation.GELU}, "experts with another activation are not served"),
    ({"has_bias": True}, "experts with biases are not served"),
])
def test_vllm_other_experts_are_refused(vllm, checkpoints, change, message):
    folder, model = checkpoints["mixtral"]
    with pytest.raises(ServingError, match=message):
        vllm_model(vllm, folder, model, "mixtral", **change)


@pytest.mark.parametrize("name", [
    "model.layers.1.block_sparse_moe.experts.down_meta", "model.layers.0.self_attn.k_proj.weight_codes",
    "model.layers.1.self_attn.o_proj.weight_meta",
])
def test_vllm_weights_that_do_not_arrive_or_do_not_fit(vllm, checkpoints, name):
    folder, model = checkpoints["mixtral"]
    tensors = stored(folder)
    given = tensors.pop(name)
    with pytest.raises(CheckpointError, match="did not reach the layer"):
        vllm_load(vllm, vllm_model(vllm, folder, model, "mixtral"), folder, "mixtral", tensors)
    for wrong in (given[:-1], given.view(torch.int8), given.float()):
        with pytest.raises(CheckpointError, match=r" is (u?int8|float\d+) \[\d+\], expected (uint8|float16) \["):
            vllm_load(vllm, vllm_model(vllm, folder, model, "mixtral"), folder, "mixtral", {**tensors, name: wrong})


def test_vllm_configuration(vllm, checkpoints):
    folder, _ = checkpoints["mixtral"]
    config = config_of(vllm, folder)
    assert config.get_name() == "gemq" and torch.bfloat16 in config.get_supported_act_dtypes()
    assert config.get_min_capability() == 80 and config.get_config_filenames() == []
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    gate = fake_vllm.LinearBase(64, [4], config, "model.layers.0.block_sparse_moe.gate")
    assert type(gate.quant_method) is fake_vllm.UnquantizedLinearMethod
    edited = read_json(folder / "config.json")["quantization_config"]
    edited["attention_bits"] = 8
    with pytest.raises(CheckpointError, match="does not match its digest"):
        vllm.GemqConfig.from_config(edited)

    class Other:
        model_type = "qwen3_next"

    with pytest.raises(ServingError, match=r"vLLM does not serve 'qwen3_next' .*; it serves mixtral, olmoe"):
        config.maybe_update_config("x", Other())
    with pytest.raises(ServingError, match=r"names no widths for model\.layers\.7\.mlp"):
        packed_layers.expert_widths(config.packed, "model.layers.7.mlp.experts")


# SGLang


@pytest.mark.parametrize("family", FAMILIES)
def test_sglang_layers_compute_what_gemqs_do(sglang, checkpoints, family):
    folder, model = checkpoints[family]
    twin = sglang_model(sglang, folder, model, family)
    wanted = {name for name, _ in twin.named_parameters()}
    assert fake_sglang.load(twin, stored(folder).items()) == wanted
    fake_sglang.finish(twin)
    fake_sglang.model_looks_at_weights(twin)
    assert_linears_equal(twin, model)
    for layer, experts in moe_layers(twin, model, family):
        for tokens in (0, 1, 7):
            x, (ids, weights) = inputs(tokens, 64), routed(tokens, 4)
            with torch.no_grad():
                assert torch.equal(layer(x, topk(ids, weights)), experts(x, ids, weights))


@pytest.mark.parametrize("cuda, in_topk, factor", [(True, False, 2.5), (False, False, 1.0), (True, True, 1.0)])
def test_sglang_experts_scale_their_sum_where_the_model_does_not(sglang, checkpoints, monkeypatch, cuda, in_topk,
                                                                 factor):  # fmt: skip
    monkeypatch.setattr(fake_sglang, "CUDA", cuda)
    folder, model = checkpoints["mixtral"]
    twin = sglang_model(sglang, folder, model, "mixtral", routed_scaling_factor=2.5)
    fake_sglang.load(twin, stored(folder).items())
    fake_sglang.finish(twin)
    x, (ids, weights) = inputs(5, 64), routed(5, 4)
    for layer, experts in moe_layers(twin, model, "mixtral"):
        layer.should_fuse_routed_scaling_factor_in_topk = in_topk
        with torch.no_grad():
            assert torch.allclose(layer(x, topk(ids, weights)), factor * experts(x, ids, weights), atol=1e-5)


def test_sglang_expert_parallel_ranks_sum_to_the_whole(sglang, checkpoints):
    folder, model = checkpoints["mixtral"]
    ranks = [sglang_model(sglang, folder, model, "mixtral", ep=(rank, 2)) for rank in range(2)]
    for rank in ranks:
        fake_sglang.load(rank, stored(folder).items())
        fake_sglang.finish(rank)
    x, (ids, weights) = inputs(9, 64), routed(9, 4)
    ids[2, 1], ids[3] = -1, -1
    for layers in zip(*(moe_layers(rank, model, "mixtral") for rank in ranks), strict=True):
        with torch.no_grad():
            parts = [layer(x, topk(ids, weights)) for layer, _ in layers]
            expected = layers[0][1](x, ids, weights)
        assert torch.allclose(sum(parts), expected, atol=1e-5) and bool((parts[0] != parts[1]).any())


@pytest.mark.parametrize("change, message", [
    ({"tp": 2}, r"experts: tensor parallelism is not served \(\[48\] of \[96\]"),
    ({"linear_tp": 2}, "qkv_proj: tensor parallelism is not served"),
    ({"activation": "gelu"}, "experts with another activation are not served"),
    ({"swiglu_limit": 7.0}, "experts with a clamped or scaled activation are not served"),
    ({"apply_router_weight_on_input": True}, "experts with weights on the input are not served"),
    ({"no_combine": True}, "experts with outputs that are not summed are not served"),
    ({"shared": 1}, "shared experts fused with the routed ones, are not served"),
    ({"with_bias": True}, "experts with biases"),
])  # fmt: skip
def test_sglang_refuses_by_name(sglang, checkpoints, change, message):
    folder, model = checkpoints["mixtral"]
    with pytest.raises(ServingError, match=message):
        sglang_model(sglang, folder, model, "mixtral", **change)


def test_sglang_skips_in_silence_what_gemq_then_misses(sglang, checkpoints):
    folder, model = checkpoints["mixtral"]
    tensors = stored(folder)
    name = "model.layers.0.block_sparse_moe.experts.gate_up_codes"
    tensors["renamed"] = tensors.pop(name)
    twin = sglang_model(sglang, folder, model, "mixtral")
    fake_sglang.load(twin, tensors.items())
    with pytest.raises(CheckpointError, match=r"experts: .* gate_up_codes did not reach the layer"):
        fake_sglang.finish(twin)


# registration


def test_entry_points_name_the_functions():
    wanted = {"vllm.general_plugins": serving.register_vllm, "sglang.srt.plugins": serving.register_sglang}
    for group, function in wanted.items():
        (entry,) = importlib.metadata.entry_points(group=group, name="gemq")
        assert entry.load() is function


def test_registering_twice_is_once(vllm, sglang):
    for _ in range(2):
        serving.register_vllm()
        serving.register_sglang()
    assert fake_vllm.METHODS["gemq"] is vllm.GemqConfig
    assert fake_sglang.QUANTIZATION_METHODS["gemq"] is sglang.GemqConfig
    assert fake_sglang.QUANTIZATION_CHOICES.count("gemq") == 1


@pytest.mark.parametrize("fake, name, register", [
    (fake_vllm, "vllm_methods", serving.register_vllm), (fake_sglang, "sglang_methods", serving.register_sglang),
])  # fmt: skip
@pytest.mark.parametrize("lost", ["module", "class"])
def test_another_version_is_a_warning_and_no_error(monkeypatch, fake, name, register, lost):
    places = fake.modules()
    place = next(p for p in places if p.endswith(("layers.fused_moe", "fused_moe_triton.layer")))
    for key, module in places.items():
        monkeypatch.setitem(sys.modules, key, None if (lost == "module" and key == place) else module)
    if lost == "class":
        for attribute in ("RoutedExperts", "FusedMoE"):
            monkeypatch.delattr(places[place], attribute, raising=False)
    monkeypatch.delitem(sys.modules, f"gemq.serving.{name}", raising=False)
    monkeypatch.delattr(serving, name, raising=False)
    with pytest.warns(RuntimeWarning, match=r"is written for (vLLM 0.33|SGLang 0.5.23) and found another interface"):
        register()


# what the plug-ins share


@pytest.mark.parametrize("prefix, width", [
    ("model.layers.1.self_attn.qkv_proj", 4), ("layers.1.self_attn.o_proj", 4), ("model.layers.1.mlp.gate", 16),
    ("model.layers.1.mlp.shared_experts.gate_up_proj", 3), ("model.layers.0.mlp.gate_up_proj", 5), ("lm_head", 16),
    ("model.layers.0.mlp.down_proj", 5), ("model.layers.1.mlp.down_proj", 16), ("model.layers.1.self_attn.attn", 16),
    ("model.layers.1.mlp.shared_expert_gate", 16), ("model.layers.1.self_attn.q_norm", 16),
])  # fmt: skip
def test_widths_by_name(checkpoints, prefix, width):
    packed = load_packed_config(checkpoints["glm4_moe"][0])
    assert width_of(packed, prefix) == width


def test_widths_of_single_matrices(checkpoints):
    packed = load_packed_config(checkpoints["glm4_moe"][0])
    own = {f"model.layers.1.self_attn.{name}_proj": 8 for name in "qkv"} | {
        "model.layers.0.mlp.up_proj": 3, "model.layers.1.self_attn.o_proj": 16,
    }
    packed = replace(packed, widths=replace(packed.widths, linears=own))
    assert width_of(packed, "model.layers.1.self_attn.qkv_proj") == 8
    assert width_of(packed, "model.layers.0.self_attn.qkv_proj") == 4
    assert width_of(packed, "model.layers.1.self_attn.o_proj") == 16
    with pytest.raises(ServingError, match=r"mlp.gate_up_proj merges matrices of different widths .*: 5, .*: 3\}"):
        width_of(packed, "model.layers.0.mlp.gate_up_proj")


@pytest.mark.parametrize("name", ["linear_attn.in_proj_qkvz", "self_attn.g_proj"])
def test_attention_that_is_not_known_is_refused(checkpoints, name):
    packed = load_packed_config(checkpoints["mixtral"][0])
    with pytest.raises(ServingError, match="this kind of attention is not served from packed weights"):
        width_of(packed, f"model.layers.0.{name}")


def test_local_ids():
    table = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    ids = torch.tensor([[0, 1], [3, -1], [2, 4]])
    assert local_ids(ids, table).tolist() == [[-1, 1], [0, -1], [-1, -1]] and local_ids(ids, None) is ids
    assert local_ids(ids.int(), table).dtype == torch.int32


def overriding(cls):
    """``(method name, ours, the base's)`` of every method of the runtime's classes that gemq's override."""
    own = [c for c in cls.__mro__ if c.__module__.startswith("gemq.")]
    bases = [c for c in cls.__mro__ if c not in own]
    for name, ours in (item for c in own for item in vars(c).items()):
        base = next((vars(b)[name] for b in bases if name in vars(b)), None)
        if base is not None and not name.startswith("_"):
            unwrapped = (getattr(f, "__func__", f) for f in (ours, base))
            yield name, ours, base, *unwrapped


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_overridden_methods_have_the_bases_parameters(runtime, request):
    methods = request.getfixturevalue(runtime)
    seen = set()
    classes = (methods.GemqConfig, methods.GemqLinearMethod, methods.GemqUnpackedLinearMethod, methods.GemqMoEMethod)
    for cls in classes:
        for name, ours, base, function, wanted in overriding(cls):
            assert type(ours) is type(base), name
            assert list(inspect.signature(function).parameters) == list(inspect.signature(wanted).parameters), name
            seen.add(name)
    assert {"get_quant_method", "create_weights", "process_weights_after_loading", "apply", "from_config"} <= seen


SOURCES = {
    "vllm": (fake_vllm, "GEMQ_VLLM_SOURCES", {
        "model_executor/layers/quantization/base_config.py": ("QuantizeMethodBase", "QuantizationConfig"),
        "model_executor/layers/linear.py": ("LinearMethodBase",),
        "model_executor/layers/fused_moe/fused_moe_method_base.py": ("FusedMoEMethodBase",),
    }),
    "sglang": (fake_sglang, "GEMQ_SGLANG_SOURCES", {
        "srt/layers/quantization/base_config.py": (
            "QuantizeMethodBase", "LinearMethodBase", "FusedMoEMethodBase", "QuantizationConfig",
        ),
    }),
}  # fmt: skip


def parameters(node):
    a = node.args
    names = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return [n.arg for n in names]


def functions(source, name):
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    return {f.name: f for f in found.body if isinstance(f, ast.FunctionDef)}


def abstract(methods):
    return {name for name, f in methods.items() if "abstractmethod" in map(ast.unparse, f.decorator_list)}


@pytest.mark.parametrize("runtime", SOURCES)
def test_the_fakes_are_faithful(runtime):
    """Against the package's sources, by ast: parameters, decorators and which methods are abstract."""
    fake, variable, files = SOURCES[runtime]
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"set {variable} to the unpacked package (pip download {runtime} --no-deps) to compare")
    for file, classes in files.items():
        for name in classes:
            theirs, ours = functions((Path(root) / file).read_text(), name), functions(inspect.getsource(fake), name)
            assert abstract(theirs) == abstract(ours), name
            for method, function in ours.items():
                assert parameters(function) == parameters(theirs[method]), f"{name}.{method}"
                decorators = [ast.unparse(d) for d in function.decorator_list]
                assert decorators == [ast.unparse(d) for d in theirs[method].decorator_list], f"{name}.{method}"
