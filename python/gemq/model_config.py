"""Load the transformers config of a folder or hub name, and validate it.

transformers' configuration classes check the types of their fields; :func:`model_config` reports the field. Sizes and
what fields say of one another are checked by :func:`check_sizes`, so that no later step meets a size that cannot be.
"""

from __future__ import annotations

import copy
import math
import re
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemq.auto_class import auto_class
from gemq.config_fields import field
from gemq.errors import CheckpointError, GemqError, first_line
from gemq.folders import is_hub_name
from gemq.integrity import read_json
from gemq.transformers_versions import unknown_type

# more than any published model's, and few enough that a skeleton of them takes seconds
MAX_LAYERS = 1024
COMPUTING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_BYTES = 16 << 20
_MOST_LABELS = 1 << 16


def config_file(path: str) -> Path:
    """``config.json`` of a folder or hub name. Raises :class:`CheckpointError` if there is none."""
    if Path(path).is_dir():
        file = Path(path) / "config.json"
        if not file.is_file():
            raise CheckpointError(f"no model in {path!r}: {path} is not a complete checkpoint: it has no config.json")
        return file
    if not is_hub_name(path):
        raise CheckpointError(f"no model in {path!r}: there is no such folder")
    from transformers.utils.hub import cached_file

    try:
        return Path(cached_file(path, "config.json"))
    except Exception as error:
        # no network, no such repository, no right to it, a broken cache
        raise CheckpointError(f"no model in {path!r}: {first_line(error)}") from error


def model_config(path: str, trust_remote_code: bool = False) -> Any:
    """The transformers config of any model; :class:`CheckpointError` names the file and the field that is wrong."""
    from transformers import AutoConfig

    file = config_file(path)
    check_stored(read_json(file, _MOST_BYTES), file)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _refusal(path, file, error) from error


def alone_config(file: Path) -> Any:
    """The transformers config of a ``config.json`` without a model; :class:`CheckpointError` as
    :func:`model_config`. ``quantization_config`` is left out, and code that comes with a model is never run."""
    from transformers import AutoConfig, PreTrainedConfig

    # as from_pretrained reads it: JSON has no infinity, transformers writes {"__float__": "Infinity"}
    data = PreTrainedConfig._decode_special_floats(read_json(file, _MOST_BYTES))
    check_stored(data, file)
    data.pop("quantization_config", None)
    if "model_type" not in data:
        raise CheckpointError(f"{file} is no model config: it has no model_type")
    try:
        return AutoConfig.for_model(data.pop("model_type"), **data)
    except Exception as error:
        raise _refusal(str(file), file, error) from error


def generation_config(folder: Path) -> Any:
    """The transformers ``GenerationConfig`` of a model's folder, None if it has none.

    Raises :class:`CheckpointError` naming ``generation_config.json`` and the field that is wrong.
    """
    from transformers import GenerationConfig

    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        return None
    data = read_json(file, _MOST_BYTES)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = data.get(name)
        several = value if isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in several):
            _refuse(file, name, "a token id, a list of them or null", value)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        value = data.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            _refuse(file, name, "a number or null", value)
    for name in ("do_sample", "use_cache"):
        if not isinstance(data.get(name, False), (bool, type(None))):
            _refuse(file, name, "true, false or null", data[name])
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {first_line(error)[:300]}") from error


def skeleton(config: Any, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """The causal language model of a transformers config without storage; ``options`` are those of ``from_config``.

    The config is copied. Raises :class:`CheckpointError` for fields that make no model.
    """
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code, **options
            )
    except (GemqError, MemoryError):
        raise
    except Exception as error:
        where = getattr(config, "name_or_path", "") or f"the config of a {getattr(config, 'model_type', 'model')}"
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(f"no model can be built from {where}: {type(error).__name__}: {text}") from error


def _refusal(path: str, file: Path, error: Exception) -> CheckpointError:
    """Return an error with transformers' message about a config in one line. Transformers may fail with any exception
    on a malformed config."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return CheckpointError(f"{path!r} needs code that comes with it, which is run with --trust-remote-code alone "
                               f"(trust_remote_code=True)")
    strict = re.search(r"Validation error for field '([^']+)': (?:\w+: )?(.*)", text)
    if strict:
        said = strict[2].removeprefix(f"Field '{strict[1]}' ")
        return CheckpointError(f"{file} is no model config: {strict[1]}: {said[:300]}")
    checked = re.search(r"Class validation error for validator '[^']+': (?:\w+: )?(.*)", text)
    if checked:
        return CheckpointError(f"{file} is no model config: {checked[1][:300]}")
    if "model type" in text or "Should have a `model_type`" in text or "Unrecognized" in text:
        kind = read_json(file, _MOST_BYTES).get("model_type")
        said = unknown_type(kind) if isinstance(kind, str) and kind else "config.json has no model_type"
        return CheckpointError(f"no model in {path!r}: {said}")
    if isinstance(error, (OSError, ValueError)):
        return CheckpointError(f"no model in {path!r}: {first_line(error)[:300]}")
    return CheckpointError(f"{file} is no model config: {type(error).__name__}: {text[:300]}")


def _refuse(file: Path | str, name: str, allowed: str, value: Any) -> None:
    raise CheckpointError(f"{file}: {name} must be {allowed}, got {reprlib.repr(value)}")


def check_stored(data: dict[str, Any], file: Path) -> None:
    """Refuse values that transformers' classes do not check: types that they use before they check them, and counts
    that they make lists of. Raises :class:`CheckpointError` naming the field."""
    if not isinstance(data.get("model_type", ""), str):
        _refuse(file, "model_type", "a text", data["model_type"])
    for name, kind, said in (
        ("auto_map", dict, "an object"), ("id2label", dict, "an object"), ("label2id", dict, "an object"),
        ("quantization_config", dict, "an object"), ("architectures", list, "a list of class names"),
        ("transformers_weights", str, "a file name"),
    ):
        if data.get(name) is not None and not isinstance(data[name], kind):
            _refuse(file, name, said, data[name])
    if not all(isinstance(name, str) for name in data.get("architectures") or ()):
        _refuse(file, "architectures", "a list of class names", data["architectures"])
    for name in _RANGES.keys() - _NEGATIVE:
        value = data.get(name)
        if value is not None and not (isinstance(value, list) and name in _BY_LAYER):
            _check_range(file, name, value)
    labels = data.get("num_labels")
    if labels is not None and (type(labels) is not int or not 0 <= labels <= _MOST_LABELS):
        _refuse(file, "num_labels", f"in 0..{_MOST_LABELS}", labels)
    for name in ("dtype", "torch_dtype"):
        value = data.get(name)
        named = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
        if isinstance(value, dict) or value is None:
            continue
        if named not in COMPUTING:
            _refuse(file, name, "float64, float32, float16 or bfloat16", value)


# the least and the most of whole numbers, by the names that the families have for them
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_RANGES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), (1, 1 << 22)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"), (1, 1 << 16)),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"), (1, 1 << 16)),
    **dict.fromkeys(("linear_value_head_dim", "linear_conv_kernel_dim"), (1, 1 << 16)),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"), (1, 1 << 20)),
    **dict.fromkeys(_EXPERTS, (1, 1 << 16)),
    **dict.fromkeys(("n_group", "topk_group"), (1, 1 << 16)),
    "qk_nope_head_dim": (0, 1 << 20), "vocab_size": (1, 1 << 26), "num_hidden_layers": (1, MAX_LAYERS),
    "shared_expert_intermediate_size": (0, 1 << 22), "n_shared_experts": (0, 1 << 12),
    "num_experts_per_tok": (1, 1 << 16), "max_position_embeddings": (1, 1 << 31), "sliding_window": (0, 1 << 31),
    "decoder_sparse_step": (1, 1 << 16), "first_k_dense_replace": (0, MAX_LAYERS),
}
# families exist that have a size a layer, and such that say "none" by -1
_BY_LAYER = {"num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size",
             "num_experts_per_tok"}
_NEGATIVE = {"sliding_window"}


def _check_range(where: Path | str, name: str, value: Any) -> None:
    least, most = _RANGES[name]
    if type(value) is not int or not least <= value <= most:
        _refuse(where, name, f"a whole number in {least}..{most}", value)


def check_sizes(config: Any, where: Path | str) -> None:
    """Refuse impossible sizes in a transformers config of a supported family; the error names ``where``.

    Raises :class:`CheckpointError` naming the field, what it is and what is allowed.
    """
    config = config.get_text_config()
    for name in _RANGES:
        value = field(config, name)
        for one in value if isinstance(value, list) and name in _BY_LAYER else [value]:
            if one is not None:
                _check_range(where, name, one)
    if field(config, "sliding_window") == 0 and not hasattr(config, "use_sliding_window"):
        # where another field switches the window, 0 is none
        _refuse(where, "sliding_window", "null, or a whole number of at least 1", 0)
    for name in ("rms_norm_eps", "routed_scaling_factor", "initializer_range"):
        value = field(config, name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value) or value < 0):
            _refuse(where, name, "a finite number of at least 0", value)
    dtype = field(config, "dtype")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and named not in COMPUTING:
        _refuse(where, "dtype", "one floating-point type", dtype)
    _check_heads(config, where)
    _check_experts(config, where)
    _check_activation(config, where)
    _check_rotary(config, where)
    types = field(config, "layer_types")
    if types is not None and len(types) != config.num_hidden_layers:
        _refuse(where, "layer_types", f"a list of num_hidden_layers = {config.num_hidden_layers} names", types)
    dense = field(config, "mlp_only_layers")
    if dense is not None and not (isinstance(dense, (list, tuple)) and all(type(n) is int for n in dense)):
        _refuse(where, "mlp_only_layers", "a list of layer numbers", dense)


def check_layers(config: Any, tensors: int, where: Path | str) -> None:
    """Raise :class:`CheckpointError` for a config with more decoder layers than weight files hold ``tensors``: a
    skeleton of many layers takes long."""
    config = config.get_text_config()
    if config.num_hidden_layers > tensors:
        raise CheckpointError(f"{where}: config.json says {config.num_hidden_layers} layers, but the weight files hold "
                              f"{tensors} tensors")


def _check_heads(config: Any, where: Path | str) -> None:
    heads, groups = field(config, "num_attention_heads"), field(config, "num_key_value_heads")
    if heads and groups and heads % groups:
        _refuse(where, "num_key_value_heads", f"a divisor of num_attention_heads = {heads}", groups)
    hidden = field(config, "hidden_size")
    latent = field(config, "kv_lora_rank") is not None
    if heads and hidden and not latent and field(config, "head_dim") is None and hidden % heads:
        _refuse(where, "hidden_size", f"a multiple of num_attention_heads = {heads}", hidden)


def _check_experts(config: Any, where: Path | str) -> None:
    name = next((n for n in _EXPERTS if field(config, n) is not None), None)
    count, top_k = field(config, name or ""), field(config, "num_experts_per_tok")
    top_k = max(top_k) if isinstance(top_k, list) else top_k
    if count and top_k and top_k > count:
        _refuse(where, "num_experts_per_tok", f"in 1..{count}, the experts ({name})", top_k)
    groups = field(config, "n_group")
    if count and groups and count % groups:
        _refuse(where, "n_group", f"a divisor of {name} = {count}", groups)
    kept = field(config, "topk_group")
    if groups and kept and kept > groups:
        _refuse(where, "topk_group", f"in 1..{groups}, the groups (n_group)", kept)


def _check_activation(config: Any, where: Path | str) -> None:
    from transformers.activations import ACT2FN

    activation = field(config, "hidden_act")
    if activation is not None and activation not in ACT2FN:
        _refuse(where, "hidden_act", "an activation that transformers knows, such as silu", activation)


def _check_rotary(config: Any, where: Path | str) -> None:
    rotary = field(config, "rope_parameters")
    for kind in [rotary, *rotary.values()] if isinstance(rotary, dict) else ():
        for name, value in kind.items() if isinstance(kind, dict) else ():
            if type(value) in (int, float) and not math.isfinite(value):
                _refuse(where, f"rope_parameters.{name}", "a finite number", value)
            if name in ("rope_theta", "factor") and (type(value) not in (int, float) or value <= 0):
                _refuse(where, f"rope_parameters.{name}", "a number above 0", value)
