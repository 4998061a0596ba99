"""The architectures to measure: four that ship with gemq, or any ``config.json`` of a supported family."""

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


def load_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The transformers config of a name of :data:`PUBLISHED` or of a ``config.json`` (or the folder that holds it).

    ``layers`` keeps only that many decoder layers. Raises :class:`CheckpointError` for what is not there or not JSON,
    :class:`gemq.UnsupportedModelError` for another family, ``ValueError`` for ``layers`` out of range.
    """
    file = FOLDER / f"{name}.json" if name in PUBLISHED else Path(name)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(f"model config must be one of {', '.join(PUBLISHED)} or a config.json, got {name!r}")
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
