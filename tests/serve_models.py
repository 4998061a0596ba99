"""Small packed checkpoints of every family that the vLLM plug-in serves, and gemq's own answers to prompts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from packed_models import quantized_model
from tiny_models import VOCAB, random_windows, tiny_model
from tiny_text import word_tokenizer

import gemq
from gemq.algorithms.given_allocation import GivenAllocation
from gemq.checkpoint import save_packed

# every width from 0 to 8 among the experts of two layers
WIDTHS = GivenAllocation("widths", ((0, 1, 3, 2), (5, 8, 4, 0)))
UNSHARED = ("mixtral", "olmoe", "qwen3_moe")
SHARED = ("qwen2_moe", "glm4_moe", "deepseek_v2", "deepseek_v2_groups", "deepseek_v3")
FAMILIES = (*UNSHARED, *SHARED)
# two heads of 64; the others have four of 32
WIDE_HEADS = ("olmoe", "qwen2_moe")
# vLLM's CPU kernels want latents of 512 and rotary parts of 64
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 64}
_SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
          "intermediate_size": 256}  # fmt: skip


def sized(family: str) -> torch.nn.Module:
    """A random model of ``family`` with the sizes that vLLM's kernels take, in float32."""
    config: Any = tiny_model(family).config
    fields = dict(_SIZES)
    if family in WIDE_HEADS:
        fields |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    if "kv_lora_rank" in config.to_dict():
        fields |= _LATENT | {"head_dim": 64, "qk_head_dim": 96}
        fields |= {} if config.q_lora_rank else {"q_lora_rank": None}
    elif getattr(config, "head_dim", None) is not None:
        fields["head_dim"] = 128 // fields.get("num_attention_heads", config.num_attention_heads)
    if family == "deepseek_v3":
        # vLLM reads the routing from the file
        fields |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    for name, value in fields.items():
        if hasattr(config, name) or name in ("topk_method", "scoring_func"):
            setattr(config, name, value)
    return tiny_model(family, config=config)


def checkpoint(family: str, folder: Path) -> Path:
    """The packed checkpoint of ``family`` below ``folder``, with a tokenizer; made unless it is there."""
    place = folder / family
    if (place / "tokenizer.json").is_file():
        return place
    shutil.rmtree(place, ignore_errors=True)
    shared = 3 if family in SHARED else None
    made = quantized_model(sized(family), 8.0, given=WIDTHS, shared_bits=shared, dense_bits=5, tune=False)
    place = save_packed(made.packed, made.config, place)
    word_tokenizer().save_pretrained(place)
    return place


def prompts(seed: int = 3) -> list[list[int]]:
    """Eight prompts of 5 to 60 tokens, two of which begin with the same 32."""
    long = random_windows(10, 64, seed).clamp(2, VOCAB - 1).tolist()
    cut = [long[i][:length] for i, length in enumerate((5, 12, 24, 33, 48, 60))]
    return [*cut, long[6][:32] + long[7][:9], long[6][:32] + long[8][:17]]


@torch.no_grad()
def reference(folder: Path, asked: list[list[int]], tokens: int, dtype: torch.dtype) -> list[dict]:
    """gemq's greedy answers by the full forward pass: ``tokens``, their log-probabilities, those of the prompt, and of
    every step all ``choices``, for judging near ties."""
    model = gemq.from_pretrained(folder, dtype=dtype)
    found = []
    for prompt in asked:
        ids, steps = list(prompt), []
        given: list[float] = []
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
            if not given:
                given = [float(logits[at, token]) for at, token in enumerate(prompt[1:])]
            steps.append(logits[-1].tolist())
            ids.append(int(logits[-1].argmax()))
        new = ids[len(prompt) :]
        found.append({"tokens": new, "logprobs": [step[t] for step, t in zip(steps, new, strict=True)],
                      "prompt_logprobs": given, "choices": steps})  # fmt: skip
    return found
