"""Tiny models in folders as they are published: with a layer of multi-token prediction beside the model's own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers.core_model_loading import revert_weight_conversion

# the names that published checkpoints have for such a layer
PREFIXES = {"deepseek_v3": "model.layers.61.", "glm4_moe": "model.layers.92.", "qwen3_next": "mtp.layers.0."}


def ahead_of(family: str) -> dict[str, torch.Tensor]:
    """The tensors of such a layer as checkpoints of the family have them, of a model of two layers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    model, prefix = tiny_model(family), PREFIXES[family]
    stored = revert_weight_conversion(model, dict(model.state_dict()))
    own = {name: t for name, t in stored.items() if name.startswith("model.layers.1.")}
    found = {
        prefix + name.removeprefix("model.layers.1."): t if "correction" in name else draw(*t.shape)
        for name, t in own.items()
    }
    if family == "qwen3_next":
        return found | {
            "mtp.fc.weight": draw(64, 128), "mtp.norm.weight": draw(64), "mtp.pre_fc_norm_embedding.weight": draw(64),
            "mtp.pre_fc_norm_hidden.weight": draw(64),
        }
    vocabulary = model.config.vocab_size
    sizes = {
        "embed_tokens": (vocabulary, 64), "enorm": (64,), "hnorm": (64,), "eh_proj": (64, 128),
        "shared_head.norm": (64,), "shared_head.head": (vocabulary, 64),
    }
    return found | {f"{prefix}{name}.weight": draw(*shape) for name, shape in sizes.items()}


def published_folder(family: str, folder: Path, tokenizer) -> dict[str, torch.Tensor]:
    """Write such a model in bfloat16 to ``folder``; returns the tensors of the layer ahead."""
    model = tiny_model(family)
    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction" not in n)):
        tensor.data = tensor.data.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    ahead = ahead_of(family)
    save_file(load_file(file) | ahead, file, {"format": "pt"})
    return ahead
