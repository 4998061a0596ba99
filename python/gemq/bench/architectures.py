"""The architectures to plan and to measure: those that ship with gemq, or any ``config.json`` of a supported family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemq.errors import CheckpointError
from gemq.model_config import alone_config, check_sizes
from gemq.models.families import check_supported
from gemq.planning.model_parts import meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FOLDER = Path(__file__).parent / "configs"
# config.json of the published models (without auto_map: no code that comes with a model is ever run)
PUBLISHED = {
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "qwen1.5-moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
}

# billions of parameters as their makers state them, without towers and layers of multi-token prediction. Their configs
# were written from transformers' classes, whose defaults are often a published model's, and from model cards; none is
# a copy of the file on the hub
STATED = {
    "deepseek-v2": 236, "deepseek-v3": 671, "dots.llm1": 142, "ernie-4.5-21b-a3b": 21.8, "gemma-4-26b-a4b": 25.2,
    "glm-4.5": 355, "glm-4.5-air": 106, "glm-4.7-flash": 30, "gpt-oss-120b": 116.8, "gpt-oss-20b": 20.9,
    "granite-4.0-h-small": 32.2, "hunyuan-a13b": 80.4, "jamba-v0.1": 51.6, "kimi-linear-48b-a3b": 48,
    "lfm2-8b-a1b": 8.3, "llama-4-scout": 107.8, "mellum2-12b-a2.5b": 12, "mimo-v2-flash": 309, "minimax-m2": 230,
    "mistral-small-4": 119, "mixtral-8x22b": 140.6, "moonlight-16b-a3b": 16, "nemotron-3-nano-30b-a3b": 31.6,
    "olmoe-1b-7b": 6.9, "phi-3.5-moe": 41.9, "qwen2-57b-a14b": 57.4, "qwen3-235b-a22b": 235,
    "qwen3-coder-480b-a35b": 480, "qwen3-next-80b-a3b": 80, "qwen3.5-35b-a3b": 35, "solar-open-100b": 102.6,
}
KNOWN = (*PUBLISHED, *STATED)


def load_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The transformers config of a name of :data:`KNOWN` or of a ``config.json`` (or the folder that holds it).

    ``layers`` keeps only that many decoder layers. Raises :class:`CheckpointError` for what is not there or not JSON,
    :class:`gemq.UnsupportedModelError` for another family, ``ValueError`` for ``layers`` out of range.
    """
    file = FOLDER / f"{name}.json" if name in KNOWN else Path(name)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(f"model config must be one of {', '.join(KNOWN)} or a config.json, got {name!r}")
    config = alone_config(file)
    check_supported(config)
    check_sizes(config, file)
    return config if layers is None else _truncated(config, layers)


def _truncated(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    text = config.get_text_config()
    first = getattr(text, "first_k_dense_replace", 0) + 1
    if not first <= layers <= text.num_hidden_layers:
        raise ValueError(f"layers must be in {first}..{text.num_hidden_layers} for this model, got {layers}")
    # a family may count its layers by this list
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:layers])
    if text.num_hidden_layers != layers:
        text.num_hidden_layers = layers
    return config


def parameters(config: PreTrainedConfig) -> int:
    """Parameters of the unquantized model, counted on the meta device."""
    return sum(p.numel() for p in meta_model(config).parameters())
