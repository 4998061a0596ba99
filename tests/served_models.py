"""Fake runtimes' models of quantized checkpoints: the same layers, made by a plug-in, loaded by name."""

from __future__ import annotations

import re

import fake_sglang
import fake_vllm
import torch
from packed_models import quantized, quantized_model
from safetensors.torch import load_file
from torch import nn

import gemq
from gemq.algorithms.given_allocation import GivenAllocation
from gemq.checkpoint import save_packed
from gemq.integrity import WEIGHTS_FILE, read_json

WIDTHS = GivenAllocation("widths", ((0, 1, 3, 2), (5, 8, 4, 0)))
FAMILIES = ("mixtral", "qwen2_moe", "glm4_moe")
LATENT = ("deepseek_v2", "deepseek_v2_groups", "deepseek_v3")
FUSED = {fake_vllm: "fused_qkv_a_proj", fake_sglang: "fused_qkv_a_proj_with_mqa"}
ROLES = {"mixtral": ("w1", "w2", "w3")}
# hf_to_vllm_mapper of vLLM's models
STACKED = {".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k"), ".v_proj": (".qkv_proj", "v")}
for path in (".mlp", ".shared_expert", ".shared_experts"):
    STACKED |= {f"{path}.gate_proj": (f"{path}.gate_up_proj", 0), f"{path}.up_proj": (f"{path}.gate_up_proj", 1)}
SUBSTRINGS = {"mixtral": {".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}}
NOT_LINEARS = re.compile(r"embed_tokens|lm_head|norm|\.gate\.|shared_expert_gate")


def checkpoint(family, folder, source=None):
    """``(folder, gemq's model)`` of ``source``, by default a tiny model, every width from 0 to 8 among its experts."""
    method = {"given": WIDTHS, "shared_bits": 3 if family != "mixtral" else None, "dense_bits": 5, "tune": False}
    made = quantized(family, 8, **method) if source is None else quantized_model(source, 8.0, **method)
    folder = save_packed(made.packed, made.config, folder)
    return folder, gemq.from_pretrained(folder)


def config_of(methods, folder):
    return methods.GemqConfig.from_config(read_json(folder / "config.json")["quantization_config"])


def put(model, path, module):
    """Add a module at a dotted path, with plain modules above it."""
    *parents, leaf = path.split(".")
    for parent in parents:
        if not hasattr(model, parent):
            model.add_module(parent, nn.Module())
        model = getattr(model, parent)
    model.add_module(leaf, module)


def attention(layer, fused):
    """The linears of a layer's attention; ``fused`` is what the runtime calls those that read the hidden states."""
    if not hasattr(layer, "kv_b_proj"):
        return [("self_attn.qkv_proj", [layer.q_proj, layer.k_proj, layer.v_proj])]
    if getattr(layer, "q_proj", None) is not None:
        first = [("self_attn.q_proj", [layer.q_proj]), ("self_attn.kv_a_proj_with_mqa", [layer.kv_a_proj_with_mqa])]
    else:
        first = [(f"self_attn.{fused}", [layer.q_a_proj, layer.kv_a_proj_with_mqa]),
                 ("self_attn.q_b_proj", [layer.q_b_proj])]  # fmt: skip
    return [*first, ("self_attn.kv_b_proj", [layer.kv_b_proj])]


def linears(model, index, fused="fused_qkv_a_proj"):
    """``(name of the runtime's linear, its parts in gemq's model)`` of one decoder layer."""
    layer = model.model.layers[index]
    found = [*attention(layer.self_attn, fused), ("self_attn.o_proj", [layer.self_attn.o_proj])]
    for name in ("shared_expert", "shared_experts"):
        mlp = getattr(layer.mlp, name, None)
        if mlp is not None:
            found += [(f"mlp.{name}.gate_up_proj", [mlp.gate_proj, mlp.up_proj]),
                      (f"mlp.{name}.down_proj", [mlp.down_proj])]  # fmt: skip
    if hasattr(layer.mlp, "gate_proj"):
        found += [("mlp.gate_up_proj", [layer.mlp.gate_proj, layer.mlp.up_proj]),
                  ("mlp.down_proj", [layer.mlp.down_proj])]  # fmt: skip
    return found


def parallel(name, tp, rank, heads):
    """Split of a linear as vLLM's classes tell it: a replicated one, or shared heads of keys and values."""
    if "_a_proj" in name:
        return {"tp_size": tp, "tp_rank": rank, "replicated": True}
    return {"tp_size": tp, "tp_rank": rank, "repeats": max(1, tp // heads) if "qkv" in name else 1}


def built(fake, config, model, family, experts, tp=1, rank=0):
    """A fake runtime's model of the quantized layers of ``model``; ``experts(layer, prefix, module)`` makes its MoE."""
    twin = nn.Module()
    # SGLang's fused layer is one matrix, vLLM's a merged one
    whole = fake is fake_sglang
    for index, layer in enumerate(model.model.layers):
        for name, parts in linears(model, index, FUSED[fake]):
            prefix = f"model.layers.{index}.{name}"
            rows = [p.out_features for p in parts]
            split = {"tp_size": tp} if whole else parallel(name, tp, rank, model.config.num_key_value_heads)
            put(twin, prefix, fake.LinearBase(
                parts[0].in_features, [sum(rows)] if whole and name.endswith("_mqa") else rows, config, prefix,
                row=name.endswith(("o_proj", "down_proj")), bias=parts[0].bias is not None, **split,
            ))  # fmt: skip
        if hasattr(layer.mlp, "experts"):
            block = "block_sparse_moe" if family == "mixtral" else "mlp"
            prefix = f"model.layers.{index}.{block}.experts"
            inner = ".routed_experts" if family in LATENT and fake is fake_vllm else ""
            put(twin, prefix + inner, experts(prefix, layer.mlp.experts))
    return twin


def stored(folder):
    """The tensors of the quantized layers, by the checkpoint's names."""
    return {name: t for name, t in load_file(folder / WEIGHTS_FILE).items() if not NOT_LINEARS.search(name)}


def routed(tokens, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :2].int()
    return ids, torch.rand(tokens, 2, generator=generator)


def inputs(tokens, width, seed=1):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def assert_linears_equal(twin, model, fused="fused_qkv_a_proj"):
    for index in range(len(model.model.layers)):
        for name, parts in linears(model, index, fused):
            x = inputs(5, parts[0].in_features)
            with torch.no_grad():
                expected = torch.cat([part(x) for part in parts], -1)
                assert torch.allclose(twin.get_submodule(f"model.layers.{index}.{name}")(x), expected, atol=1e-5), name


def moe_layers(twin, model, family):
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            inner = twin.get_submodule(f"model.layers.{index}.{block}.experts")
            yield getattr(inner, "routed_experts", inner), layer.mlp.experts


def vllm_model(methods, folder, model, family, expert_map=None, tp=1, linear_tp=1, rank=0, **moe):
    config = config_of(methods, folder)
    config.maybe_update_config(str(folder), model.config)

    def experts(prefix, module):
        count = module.num_experts if expert_map is None else int((expert_map >= 0).sum())
        shape = fake_vllm.FusedMoEConfig(
            module.num_experts, 2, module.hidden, module.intermediate, count,
            moe_parallel_config=fake_vllm.FusedMoEParallelConfig(tp, rank if tp > 1 else 0), **moe,
        )
        names = ROLES.get(family, ("gate_proj", "down_proj", "up_proj"))
        return fake_vllm.RoutedExperts(prefix, torch.float32, shape, config, expert_map, names)

    return built(fake_vllm, config, model, family, experts, linear_tp, rank)


def vllm_load(methods, twin, folder, family, tensors=None):
    """In two steps, as vLLM's causal models and their inner ones load: each with the quantization's renaming."""
    own = methods.GemqConfig.get_checkpoint_weight_mapper()
    mapper = fake_vllm.WeightsMapper(orig_to_new_substr=SUBSTRINGS.get(family, {}), orig_to_new_stacked=STACKED)
    loaded = fake_vllm.load(twin, own.apply((tensors or stored(folder)).items()), mapper | own)
    fake_vllm.finish(twin)
    return loaded


def sglang_model(methods, folder, model, family, ep=(0, 1), tp=1, linear_tp=1, **moe):
    config = config_of(methods, folder)

    def experts(prefix, module):
        return fake_sglang.FusedMoE(
            module.num_experts, module.hidden, module.intermediate, config, prefix, ep=ep, tp=tp, **moe
        )

    return built(fake_sglang, config, model, family, experts, linear_tp)


def topk(ids, weights):
    return fake_sglang.StandardTopKOutput(weights, ids, None)
