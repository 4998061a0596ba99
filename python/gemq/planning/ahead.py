"""Sizes of the layers of multi-token prediction, which a packed checkpoint holds as they were."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.engine.contents import contents
from gemq.errors import CheckpointError
from gemq.integrity import read_header, weight_files
from gemq.models import MoeModel
from gemq.packed_model import stored_tensors
from gemq.tensor_files import DTYPES

# a config's number of such layers
_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def ahead_tensors(moe: MoeModel, dtype: torch.dtype, folder: str | None = None) -> dict[str, Tensor]:
    """The tensors of such layers without storage, by their published names.

    They are those in the files of ``folder``, a full-precision model's; where there are no files of all its weights,
    those that the config says are there, in ``dtype``: a decoder layer with experts each, with the embeddings, head,
    norms and projection that DeepSeek-V3 and GLM-4.5 have there. ``moe`` has no storage and is not packed yet.
    """
    if folder is not None and Path(folder).is_dir():
        try:
            headers = {file: read_header(file) for file in weight_files(Path(folder))}
            found = contents(Path(folder), headers, moe.model)
        except CheckpointError:
            # a config alone; quantizing says what is wrong with files
            return _by_config(moe, dtype)
        entries = {name: found.entry(name) for name in found.ahead}
        return {n: torch.empty(e.shape, dtype=DTYPES[e.dtype], device="meta") for n, e in entries.items()}
    return _by_config(moe, dtype)


def _by_config(moe: MoeModel, dtype: torch.dtype) -> dict[str, Tensor]:
    model: Any = moe.model
    config = model.config.get_text_config()
    counts = [value for name in _COUNTS if isinstance(value := getattr(config, name, None), int)]
    last = moe.moe[-1].index
    path = f"{moe.layer_path(last)}."
    state = {name: value for name, value in model.state_dict().items() if name.startswith(path)}
    layer = stored_tensors(model, state, dtype)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    found: dict[str, Tensor] = {}
    for index in range(len(moe.layers), len(moe.layers) + max(counts, default=0)):
        own = {re.sub(rf"\blayers\.{last}\.", f"layers.{index}.", name, count=1): t for name, t in layer.items()}
        prefix = next(iter(own)).partition(f"layers.{index}.")[0] + f"layers.{index}."
        found |= own | {
            f"{prefix}{name}": torch.empty(shape, dtype=dtype, device="meta")
            for name, shape in _around(vocabulary, moe.routers[0].shape[1]).items()
        }
    return found


def _around(vocabulary: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that such a layer has besides a decoder layer's."""
    return {
        "embed_tokens.weight": (vocabulary, hidden), "enorm.weight": (hidden,), "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden), "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (vocabulary, hidden),
    }
