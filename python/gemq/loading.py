"""Load a tokenizer, a full-precision model or a packed checkpoint by its path or hub name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gemq.auto_class import auto_class
from gemq.checkpoint import from_pretrained
from gemq.errors import CheckpointError, first_line
from gemq.integrity import read_json
from gemq.model_config import check_sizes, config_file, generation_config, model_config
from gemq.models.families import SUPPORTED, check_supported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name; :class:`CheckpointError` if there is none, or none that can be read."""
    from transformers import AutoTokenizer

    _check_complete(path)
    # transformers reads the config on the way, and what is wrong with the model itself says more
    config = checked_config(path, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        # its settings are checked by nobody until they are used
        tokenizer.decode(tokenizer("a", return_token_type_ids=False)["input_ids"], skip_special_tokens=True)
        return tokenizer
    except Exception as error:
        # a stranger's files, parsed by libraries that raise what they like
        method = getattr(config, "quantization_config", None) or {}
        if method and method.get("quant_method") != "gemq":
            raise CheckpointError(f"{path!r} is quantized by {method.get('quant_method')!r}, not by gemq") from error
        found = [name for name in _TOKENIZERS if (Path(path) / name).is_file()]
        if found:
            why = f"{', '.join(found)} cannot be read: {type(error).__name__}: {first_line(error)[:300]}"
        else:
            why = "no tokenizer file that transformers reads" if Path(path).is_dir() else first_line(error)
        raise CheckpointError(f"no tokenizer in {path!r}: {why}") from error


def checked_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the transformers config of any model. The sizes of a supported family are checked. Raises
    :class:`CheckpointError`."""
    config = model_config(path, trust_remote_code)
    if getattr(config.get_text_config(), "model_type", None) in SUPPORTED:
        check_sizes(config, config_file(path))
    return config


# a folder with any of these has a tokenizer
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def _check_complete(path: str | os.PathLike) -> None:
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no config.json")


def check_model(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of a full-precision model of a supported family; reads no weights.

    Raises :class:`CheckpointError` if there is no such model, it is quantized, an adapter, or of sizes that cannot
    be, and :class:`gemq.errors.UnsupportedModelError` for other families.
    """
    return _checked(path, model_config(path, trust_remote_code))


def _checked(path: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """:func:`check_model` of a config that was read; what it says of MXFP4 is taken off."""
    check_unquantized(path, config)
    if (Path(path) / "adapter_config.json").exists():
        raise CheckpointError(f"{path!r} holds an adapter (adapter_config.json), which transformers would put over "
                              f"the weights: merge it and save the model, or remove the file")
    check_supported(config)
    check_sizes(config, config_file(path))
    return config


_INSTEAD = {
    "gemq": "it is a gemq checkpoint: its full-precision model is needed",
    "gptq": "gemq import-gptq reads it",
    "fp8": "its fp8 weights must be converted to bfloat16 first, each multiplied by its weight_scale_inv",
}


def check_unquantized(path: str, config: PreTrainedConfig) -> None:
    """Raise :class:`CheckpointError`, with a remedy, for a config of quantized weights, but for those in MXFP4."""
    found = getattr(config, "quantization_config", None)
    if not found:
        # an empty one says nothing
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return
    stored = found if isinstance(found, dict) else found.to_dict()
    method: Any = stored.get("quant_method")
    if method == "mxfp4":
        # read as bfloat16, which holds its values exactly
        del config.quantization_config
        return
    instead = _INSTEAD.get(method, "gemq reads weights in float32, float16 and bfloat16")
    raise CheckpointError(f"{path!r} is quantized already, by {method!r}; give the full-precision model ({instead})")


def load_unquantized(path: str, dtype: str = "auto", trust_remote_code: bool = False) -> nn.Module:
    """A full-precision model of a supported family, checked by its config before any weight is read."""
    from transformers import Mxfp4Config

    config, more = model_config(path, trust_remote_code), {}
    stored = getattr(config, "quantization_config", None)
    _checked(path, config)
    if stored:
        # MXFP4, or it had been refused
        config.quantization_config, more = stored, {"quantization_config": Mxfp4Config(dequantize=True)}
    if Path(path).is_dir():
        generation_config(Path(path))
    try:
        model = auto_class(config).from_pretrained(
            path, config=config, dtype=parse_dtype(dtype), trust_remote_code=trust_remote_code, **more
        )
    except MemoryError:
        raise
    except Exception as error:
        # a stranger's files reach code of transformers that checks few of them
        raise CheckpointError(f"{path!r} could not be loaded: {first_line(error)}") from error
    if getattr(config, "tie_word_embeddings", False) and not model.all_tied_weights_keys:
        # transformers ties no weights that the files hold both of, with other values
        model.config.tie_word_embeddings = False
    return model


def parse_dtype(name: str) -> torch.dtype | str:
    """``"auto"``, or the dtype of a name; ``ValueError`` for another."""
    allowed: dict[str, torch.dtype | str] = {
        "auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    }
    if name not in allowed:
        raise ValueError(f"dtype must be one of {', '.join(allowed)}, got {name!r}")
    return allowed[name]


def pick_device(device: str | None) -> torch.device:
    """``device``, or CUDA where there is one, else the CPU. Raises ``ValueError`` for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be like cpu, cuda or cuda:1, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but no CUDA device is available")
    return chosen


def load_any(path: str | os.PathLike, dtype: str = "auto", device: str | None = None) -> nn.Module:
    """A packed checkpoint or a full-precision model, ready for inference on ``device`` (default: CUDA or CPU)."""
    _check_complete(path)
    target = pick_device(device)
    if read_json(config_file(str(path))).get("quantization_config"):
        return from_pretrained(path, dtype=parse_dtype(dtype), device=str(target))
    return load_unquantized(str(path), dtype).to(target).eval()
