"""Swap the linears and experts of a model for their packed forms, or find the packed ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gemq.models.weighted_inputs import call_by_ids, takes_inputs_alone
from gemq.nn import LowBitEmbedding, LowBitExperts, LowBitLinear, TiedHead
from gemq.nn.base import PackedModule

Packed = LowBitExperts | LowBitLinear | LowBitEmbedding


def empty_twin(model: Any) -> Any:
    """A transformers model of the class and config of ``model``, with the family's own modules and no storage."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def fill_computed_buffers(model: Any, device: torch.device | str) -> None:
    """Fill the buffers that no checkpoint holds (rotary frequencies) by the family's own initialisation."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            continue
        names = [n for n in module._non_persistent_buffers_set if getattr(module, n) is not None]
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if names:
            model._init_weights(module)


def replace_with_packed(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace the module at each path (``model.layers.0.mlp.experts``) by the packed one, in the model's own training
    mode."""
    for path, module in modules.items():
        module.train(model.training)
        before = model.get_submodule(path)
        if isinstance(module, LowBitExperts) and takes_inputs_alone(before):
            call_by_ids(model.get_submodule(path.rpartition(".")[0]))
        model.set_submodule(path, module)
    ends = [path for path, module in modules.items() if isinstance(module, (LowBitEmbedding, TiedHead))]
    if ends:
        _forget_ties(model, {f"{path}.weight" for path in ends})


def _forget_ties(model: nn.Module, names: set[str]) -> None:
    """Take parameters that are no more out of transformers' maps of tied weights: a tied pair is one packed matrix, and
    ``tie_weights`` would look for the plain one."""
    for prefix, module in model.named_modules():
        for held in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, held, None)
            if isinstance(ties, dict):
                under = f"{prefix}." if prefix else ""
                kept = {t: s for t, s in ties.items() if not {under + t, under + s} & names}
                # on the instance: the map of the class stays
                setattr(module, held, kept)


def remember_ties(model: Any, plain: Any) -> None:
    """Tie the weights of ``model``, whose packed ends were replaced by plain ones, as those of ``plain``, a model of
    the same class and config."""
    forgotten = [path for path, module in model.named_modules() if "_tied_weights_keys" in vars(module)]
    for path in forgotten:
        module: Any = model.get_submodule(path)
        del module._tied_weights_keys
        module.all_tied_weights_keys = dict(plain.get_submodule(path).all_tied_weights_keys)
    if forgotten:
        model.tie_weights()


def packed_modules(model: nn.Module) -> Iterable[tuple[str, Packed]]:
    """Yield all packed modules of a model with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, (LowBitExperts, LowBitLinear, LowBitEmbedding)):
            yield path, module


def prepare(model: nn.Module) -> None:
    """Move every packed module to the layout of its device's kernels."""
    for _, module in packed_modules(model):
        module.prepare()
