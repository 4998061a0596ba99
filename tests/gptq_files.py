"""GPTQ checkpoints made for tests, packed word by word as AutoGPTQ packs, and its arithmetic to compare with."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from transformers.core_model_loading import revert_weight_conversion


def pack_words(codes, bits):
    """int32 words of the codes ``[k, n]`` along dimension 0, each shift spelled out; 3 bits as 10 + 1 + 10 + 1 + 10."""
    k, n = codes.shape
    words = torch.zeros(k * bits // 32, n, dtype=torch.int64)
    codes = codes.long()
    if bits != 3:
        per = 32 // bits
        for i in range(k):
            words[i // per] |= codes[i] << (bits * (i % per))
    else:
        for block in range(k // 32):
            c, w = codes[32 * block : 32 * block + 32], words[3 * block : 3 * block + 3]
            for i in range(10):
                w[0] |= c[i] << (3 * i)
                w[1] |= c[11 + i] << (3 * i + 1)
                w[2] |= c[22 + i] << (3 * i + 2)
            w[0] |= (c[10] & 3) << 30
            w[1] |= c[10] >> 2
            w[1] |= (c[21] & 1) << 31
            w[2] |= c[21] >> 1
    return (words & 0xFFFFFFFF).to(torch.int64).where(words < 2**31, words - 2**32).to(torch.int32)


def random_linear(n, k, bits, group, generator, *, sym=True, form="gptq"):
    """``(tensors, q [k, n], z [groups, n])`` of a random quantized linear."""
    groups = k // group
    q = torch.randint(0, 2**bits, (k, n), generator=generator)
    z = torch.full((groups, n), 2 ** (bits - 1))
    if not sym:
        z = torch.randint(1, 2**bits, (groups, n), generator=generator)
    scales = ((torch.rand(groups, n, generator=generator) * 0.3 + 0.1) / 2**bits).half()
    stored = (z - 1) % 2**bits if form == "gptq" else z
    tensors = {
        "qweight": pack_words(q, bits), "qzeros": pack_words(stored.t(), bits).t().contiguous(), "scales": scales,
        "g_idx": (torch.arange(k) // group).to(torch.int32),
    }
    return tensors, q, z


def reference(tensors, q, z, dtype=torch.float16):
    """AutoGPTQ's dequantization ``[n, k]``: ``scales * (q - z)``, in float16 one rounding."""
    index = tensors["g_idx"].long()
    return (tensors["scales"][index].to(dtype) * (q - z[index]).to(dtype)).t()


def expert_stems(names):
    return sorted({n.removesuffix(".weight") for n in names if ".experts." in n and n.endswith(".weight")})


def gptq_model(folder, family="mixtral", bits=4, group=32, *, sym=True, form="gptq", attention=None, zero_bias=False,
               width_of=lambda stem: None, seed=0):  # fmt: skip
    """Write a GPTQ checkpoint of a tiny model; returns ``{module stem: (tensors, q, z)}``.

    ``width_of(stem)`` overrides the width of a linear, as GPTQModel's ``dynamic`` does; ``attention`` None: as the
    rest, 16: left alone.
    """
    model = tiny_model(family).to(torch.float16)
    plain = revert_weight_conversion(model, dict(model.state_dict()))
    generator = torch.Generator().manual_seed(seed)
    made, stored = {}, {}
    for name, tensor in plain.items():
        stem = name.removesuffix(".weight")
        leaf = stem.rpartition(".")[2]
        mine = leaf.endswith("_proj") or leaf in ("w1", "w2", "w3", "kv_a_proj_with_mqa")
        width = width_of(stem) or (attention if attention and ".self_attn." in stem else bits)
        if not (mine and name.endswith(".weight") and width < 16):
            stored[name] = tensor.contiguous()
            continue
        n, k = tensor.shape
        made[stem] = random_linear(n, k, width, group if group > 0 else k, generator, sym=sym, form=form)
        stored |= {f"{stem}.{part}": value for part, value in made[stem][0].items()}
        if zero_bias and f"{stem}.bias" not in plain:
            stored[f"{stem}.bias"] = torch.zeros(n, dtype=torch.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": sym,
        "checkpoint_format": form,
    }
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, default=str).replace('"torch.float16"', '"float16"'))
    return made
