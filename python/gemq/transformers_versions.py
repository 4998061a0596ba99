"""Differences between the versions of transformers that gemq runs on. No other module asks which one is installed."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

# model types that are younger than the oldest version allowed, or whose experts had another form in it, and the release
# that brought them
SINCE = {
    "aria_text": "5.18", "bailing_hybrid": "5.20", "beam": "5.21", "flint": "5.21", "kimi_linear": "5.17",
    "kolibri1": "5.20",
}
# layers whose attention has an indexer, by the name of 5.18 and later and by that before it
INDEXED = ("indexed_attention", "deepseek_sparse_attention")
VERSION = transformers.__version__


def _at_least(release: str) -> bool:
    installed, asked = ([int(part) for part in text.split(".")[:2]] for text in (VERSION, release))
    return installed >= asked


def lacks(kind: str) -> bool:
    """Return True if the installed transformers does not have the model type ``kind``, or not in the form that gemq
    handles."""
    return kind in SINCE and not _at_least(SINCE[kind])


def needed(kind: str) -> str:
    """Return the words for a type that the installed transformers :func:`lacks`."""
    return f"model type {kind!r} needs transformers {SINCE[kind]} or newer, and {VERSION} is installed"


def unknown_type(kind: str) -> str:
    """Return the words for a model type that the installed transformers does not know, with the release that has it
    where gemq knows one."""
    if lacks(kind):
        return needed(kind)
    return f"transformers {VERSION} does not know the model type `{kind}`"


def cached_width(latent: int, heads: int, config: Any) -> int:
    """Return the numbers that latent attention caches of a token: the ``latent`` ones, or ``heads`` keys and values,
    which transformers 5.16 and 5.17 keep where an indexer chooses the tokens."""
    if _at_least("5.18") or not getattr(config, "index_head_dim", None):
        return latent
    return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)


class ConfigSeer(HfQuantizer):
    """A quantizer that sees a model's config before the model is built, by the hook that the version calls then."""

    def see_config(self, config: Any) -> None:
        """Called with the config of the whole model; what it raises ends the loading."""
        raise NotImplementedError

    # transformers 5.18 brought the first; before it there is the second alone
    if hasattr(HfQuantizer, "update_attn_implementation"):

        def update_attn_implementation(self, config: Any) -> Any:
            """The hook of transformers 5.18 and later."""
            self.see_config(config)
            return super().update_attn_implementation(config)

    else:

        def update_tp_plan(self, config: Any) -> Any:
            """The hook of transformers 5.16 and 5.17."""
            self.see_config(config)
            return super().update_tp_plan(config)


def dtypes_of(model: nn.Module, kept: set[str]) -> dict[str, torch.dtype]:
    """Return the dtype that each unquantized floating tensor of a model on the meta device is to have after loading:
    its own, or float32 for those ``kept`` in it."""
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("_meta")}
    return {k: torch.float32 if k in kept else v.dtype for k, v in state.items() if v.is_floating_point()}


def cast_as_declared(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give loaded tensors the dtypes of :func:`dtypes_of`. Before 5.21 transformers leaves a tensor of a quantized
    checkpoint in the file's dtype if its name is another in the model, as those of Mixtral's routers are."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "meta" and tensor.dtype != dtypes.get(name, tensor.dtype):
            tensor.data = tensor.data.to(dtypes[name])
