"""DeepSeek's latent attention in the plug-ins: packed but for kv_b_proj, whose numbers the runtimes absorb."""

from __future__ import annotations

import ast
import concurrent.futures
import os
import typing
from pathlib import Path
from types import SimpleNamespace

import fake_sglang
import fake_vllm
import pytest
import torch
from served_models import (
    FUSED,
    LATENT,
    assert_linears_equal,
    checkpoint,
    config_of,
    inputs,
    moe_layers,
    routed,
    sglang_model,
    stored,
    topk,
    vllm_model,
)

from gemq.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """``{family: (folder, gemq's model)}``."""
    return {family: checkpoint(family, tmp_path_factory.mktemp("latent") / family) for family in LATENT}


def assert_absorbed(parts, kv_b_proj, config):
    """Both halves of a runtime's split of ``kv_b_proj`` as ``[N, P or V, L]`` are the packed matrix's numbers."""
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    expected = kv_b_proj.weight().view(config.num_attention_heads, nope + value, config.kv_lora_rank)
    for got, wanted in zip(parts, expected.split([nope, value], 1), strict=True):
        assert torch.equal(got, wanted) and bool(wanted.any())


@pytest.mark.parametrize("family", LATENT)
def test_vllm_serves_latent_attention(vllm, checkpoints, family):
    folder, model = checkpoints[family]
    twin = vllm_model(vllm, folder, model, family)
    wanted = {name for name, _ in twin.named_parameters()}
    mapper = vllm.GemqConfig.get_checkpoint_weight_mapper()
    # once by the causal model's loader, once more by the inner one's
    assert fake_vllm.load_deepseek(twin, mapper.apply(mapper.apply(stored(folder).items())), 4) == wanted
    fake_vllm.finish(twin)
    assert_linears_equal(twin, model)
    config = model.config
    sizes = config.kv_lora_rank, config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    for ours, theirs in zip(model.model.layers, twin.model.layers.children(), strict=True):
        split = fake_vllm.absorbed(theirs.self_attn.kv_b_proj, *sizes, torch.float32)
        assert_absorbed([part.permute(1, 2, 0) for part in split], ours.self_attn.kv_b_proj, config)
    (layer, experts), *_ = moe_layers(twin, model, family)
    x, (ids, weights) = inputs(7, 64), routed(7, 4)
    with torch.no_grad():
        assert torch.equal(layer.forward_modular(x, weights, ids), experts(x, ids, weights))


@pytest.mark.parametrize("name", ["q_a_proj.weight_codes", "kv_a_proj_with_mqa.weight_meta", "kv_b_proj.weight_meta"])
def test_vllm_latent_weights_that_do_not_arrive(vllm, checkpoints, name):
    folder, model = checkpoints["deepseek_v2_groups"]
    tensors = stored(folder)
    del tensors[f"model.layers.1.self_attn.{name}"]
    twin = vllm_model(vllm, folder, model, "deepseek_v2_groups")
    fake_vllm.load_deepseek(twin, vllm.GemqConfig.get_checkpoint_weight_mapper().apply(tensors.items()), 4)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.\w+: .* did not reach the layer"):
        fake_vllm.finish(twin)


@pytest.mark.parametrize("family", LATENT)
def test_sglang_serves_latent_attention(sglang, checkpoints, family):
    folder, model = checkpoints[family]
    twin = sglang_model(sglang, folder, model, family)
    fake_sglang.model_looks_at_weights(twin)
    wanted = {name for name, _ in twin.named_parameters()}
    assert fake_sglang.load_deepseek(twin, stored(folder).items()) == wanted
    config = model.config
    for ours, theirs in zip(model.model.layers, twin.model.layers.children(), strict=True):
        split = fake_sglang.absorbed(theirs.self_attn.kv_b_proj, config.qk_nope_head_dim, config.v_head_dim)
        assert_absorbed(split, ours.self_attn.kv_b_proj, config)
    fake_sglang.finish(twin)
    fake_sglang.model_looks_at_weights(twin)
    assert_linears_equal(twin, model, FUSED[fake_sglang])
    (layer, experts), *_ = moe_layers(twin, model, family)
    x, (ids, weights) = inputs(7, 64), routed(7, 4)
    with torch.no_grad():
        assert torch.equal(layer(x, topk(ids, weights)), experts(x, ids, weights))


@pytest.mark.parametrize("name", ["kv_b_proj.weight_codes", "kv_a_proj_with_mqa.weight_meta"])
def test_sglang_latent_weights_that_do_not_arrive(sglang, checkpoints, name):
    folder, model = checkpoints["deepseek_v2_groups"]
    tensors = stored(folder)
    del tensors[f"model.layers.1.self_attn.{name}"]
    twin = sglang_model(sglang, folder, model, "deepseek_v2_groups")
    fake_sglang.load_deepseek(twin, tensors.items())
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.\w+: .* did not reach the layer"):
        fake_sglang.finish(twin)


# the runtimes' own loaders, where their sources are


def own(variable, file, name, **given):
    """A method of a runtime's source, ``Class.method``, with stand-ins for the globals it needs."""
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"set {variable} to the unpacked package (pip download --no-deps) to run its loader")
    cls, _, method = name.partition(".")
    tree = ast.parse((Path(root) / file).read_text())
    (owner,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls)
    (found,) = (n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == method)
    scope = {"torch": torch, "typing": typing, "concurrent": concurrent, **vars(typing), **given}
    exec(compile("from __future__ import annotations\n" + ast.unparse(found), file, "exec"), scope)
    return scope[method]


@pytest.mark.parametrize("family", LATENT)
def test_vllms_own_loader(vllm, checkpoints, family):
    mapping = [
        (f"experts.routed_experts.{'w2' if role == 'down_proj' else 'w13'}_", f"experts.{e}.{role}.", e, shard)
        for e in range(4) for shard, role in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ]  # fmt: skip
    load = own(
        "GEMQ_VLLM_SOURCES", "model_executor/models/deepseek_v2.py", "DeepseekV2Model.load_weights",
        fused_moe_make_expert_params_mapping=lambda *_, **__: mapping, get_pp_missing_layer_names=lambda _: [],
        get_spec_layer_idx_from_weight_name=lambda *_: None, is_pp_missing_parameter=lambda *_: False,
        _try_load_fp8_indexer_wk=lambda *_: False, maybe_remap_kv_scale_name=lambda name, _: name,
        default_weight_loader=None,
    )  # fmt: skip
    folder, model = checkpoints[family]
    twin = vllm_model(vllm, folder, model, family)
    twin.use_mha, twin.config, twin.is_fused_shared_expert_enabled = False, SimpleNamespace(n_routed_experts=4), False
    twin.num_redundant_experts = 0
    mapper = vllm.GemqConfig.get_checkpoint_weight_mapper()
    assert load(twin, mapper.apply(stored(folder).items())) == {name for name, _ in twin.named_parameters()}
    fake_vllm.finish(twin)
    assert_linears_equal(twin, model)


@pytest.mark.parametrize("family", LATENT)
def test_sglangs_own_loader(sglang, checkpoints, family):
    file, mixin = "srt/models/deepseek_common/deepseek_weight_loader.py", "DeepseekV2WeightLoaderMixin"

    class Disabled:
        pass

    def submit(executor, futures, use_async, func, func_args, func_kwargs=None):
        futures.append(executor.submit(func, *func_args, **(func_kwargs or {})))

    flags = dict.fromkeys(("_is_npu", "_is_hip", "_is_musa", "_is_cuda", "_is_xpu", "_use_aiter_gfx95"), False)
    roles = ("gate_proj", "down_proj", "up_proj")
    fused_moe = SimpleNamespace(make_expert_params_mapping=lambda **_: [
        (f"experts.{'w2' if role == 'down_proj' else 'w13'}_", f"experts.{e}.{role}.", e, role)
        for e in range(4) for role in roles
    ])  # fmt: skip
    load = own(
        "GEMQ_SGLANG_SOURCES", file, f"{mixin}.do_load_weights", FusedMoE=fused_moe, NextNDisabledConfig=Disabled,
        NextNEnabledConfig=type("Enabled", (), {}), NVFP4_CKPT_FP8_ATTN_QUANT_MODULES=[],
        is_wint4afp8_or_wint4a16_config=lambda _: False, should_async_load=lambda _: True,
        get_layer_id=lambda name: int(name.split(".")[2]), _load_fused_expert_tensor=lambda *_: False,
        maybe_executor_submit=submit, _clone_if_runai_streamed_tensor=lambda t: t,
        _resolve_quark_fp8_block_scale_name=lambda name, _: name, default_weight_loader=None, **flags,
    )  # fmt: skip
    after = own(
        "GEMQ_SGLANG_SOURCES", file, f"{mixin}.post_load_weights", bind_or_assign=lambda _, value: value, **flags
    )
    folder, model = checkpoints[family]
    twin, config = sglang_model(sglang, folder, model, family), model.config
    for layer in twin.model.layers.children():
        attention = layer.self_attn
        attention.qk_nope_head_dim, attention.v_head_dim = config.qk_nope_head_dim, config.v_head_dim
        attention.w_kc = attention.w_vc = attention.w_scale = None
    layers = list(twin.model.layers.children())
    asked = SimpleNamespace(
        config=config, quant_config=config_of(sglang, folder), num_fused_shared_experts=0,
        model=SimpleNamespace(layers=layers, start_layer=0, end_layer=len(layers)),
        named_parameters=twin.named_parameters, pp_group=SimpleNamespace(is_last_rank=True),
        _initialize_nextn_conf=lambda _: Disabled(), _maybe_quant_weights_to_fp8_ue8m0=lambda weights, *_: weights,
    )
    asked.post_load_weights = lambda **kwargs: after(asked, **kwargs)
    load(asked, stored(folder).items())
    for ours, theirs in zip(model.model.layers, layers, strict=True):
        split = theirs.self_attn.w_kc, theirs.self_attn.w_vc.transpose(1, 2)
        assert_absorbed(split, ours.self_attn.kv_b_proj, config)
    fake_sglang.finish(twin)
    assert_linears_equal(twin, model, FUSED[fake_sglang])
