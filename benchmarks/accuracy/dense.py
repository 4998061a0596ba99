"""Dense SwiGLU models, from a GGUF file or a transformers folder: what ``carve.py`` makes Mixture-of-Experts models of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# architectures whose attention GLM4-MoE states: with biases (qwen2), with q and k norms (qwen3), or neither
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def _location(model: Path) -> tuple[Path, dict[str, str]]:
    """A folder and the options that transformers loads it with. ``ValueError`` for what is neither file nor folder."""
    if model.is_dir():
        return model, {}
    if model.suffix != ".gguf" or not model.is_file():
        raise ValueError(f"model must be a folder or a .gguf file, got {model}")
    with open(model, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{model} does not begin with GGUF: it is another kind of file, or damaged")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("reading GGUF needs the package gguf: pip install gguf") from None
    return model.parent, {"gguf_file": model.name}


def gguf_architecture(model: Path) -> str:
    """Read ``general.architecture`` of a GGUF file. ``ValueError`` if the file is cut off or says none."""
    import gguf

    try:
        reader = gguf.GGUFReader(model)
        field = reader.get_field("general.architecture")
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{model} cannot be read as GGUF: {error}") from None
    if field is None:
        raise ValueError(f"{model} names no general.architecture")
    return str(field.contents())


def check_config(config: Any, model: Path) -> None:
    """Refuse a config that is not dense SwiGLU with attention that GLM4-MoE states: ``ValueError`` with the field."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{model} is of type {config.model_type}; can be carved: {', '.join(ARCHITECTURES)}")
    wanted = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
    if config.model_type == "llama":
        wanted["attention_bias"] = False  # llama's would be on the output projection, too
    for name, value in wanted.items():
        if getattr(config, name, value) != value:
            raise ValueError(f"{model}: {name} must be {value} to be carved, got {getattr(config, name)}")


def load_dense(model: Path | str) -> tuple[nn.Module, Any]:
    """Load a dense model in float32, in evaluation mode, and its tokenizer.

    ``ValueError`` in one line for another architecture, a tensor that is missing, or a damaged file.
    """
    model = Path(model)
    folder, options = _location(model)
    if options and (found := gguf_architecture(model)) not in ARCHITECTURES:
        raise ValueError(f"{model} is of architecture {found}; can be carved: {', '.join(ARCHITECTURES)}")
    check_config(AutoConfig.from_pretrained(folder, **options), model)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{model} lacks {missing[0]}{more}")
    return loaded.eval(), AutoTokenizer.from_pretrained(folder, **options)
