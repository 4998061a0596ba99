"""The tensors of a model's files by the parameter that they make, checked by the files' headers alone.

A source must mean what it means to transformers' ``from_pretrained``. transformers leaves tensors out that the model
does not use, takes one of two that make the same parameter, and reads integers as if they were weights; here the
first is said by name, and the others are refused.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gemq.engine import mxfp4
from gemq.engine.read_tensor import places, stacked
from gemq.errors import CheckpointError
from gemq.integrity import TensorEntry
from gemq.models.ahead import is_ahead
from gemq.tensor_files import DTYPES, WEIGHTS

_log = logging.getLogger("gemq")
# buffers that old checkpoints hold and that models compute
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
_SHOWN = 5


@dataclass
class Contents:
    """Location of every tensor of a model in the checkpoint's files.

    ``file`` is by tensor of the checkpoint, and ``pattern`` the conversion's pattern that it fits, None for one that
    is stored as it is. ``made_of`` are the tensors of each parameter, ``unused`` those of none, ``ahead`` those of
    layers of multi-token prediction; parameters of ``mxfp4`` are made of blocks and scales.
    """

    folder: Path
    headers: dict[Path, dict[str, TensorEntry]]
    mapping: list
    file: dict[str, Path] = field(default_factory=dict)
    pattern: dict[str, str | None] = field(default_factory=dict)
    made_of: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    ahead: list[str] = field(default_factory=list)
    mxfp4: set[str] = field(default_factory=set)

    def entry(self, original: str) -> TensorEntry:
        """The header's entry of a tensor of the checkpoint."""
        return self.headers[self.file[original]][original]

    def kinds(self, originals: list[str]) -> list[list[str]] | None:
        """Names of a parameter's tensors by kind and expert; None if the conversion does more than stack and join them.
        """
        pattern = self.pattern[originals[0]]
        if pattern is None:
            return [originals] if len(originals) == 1 else None
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        converter = next(c for c in converters if pattern in c.source_patterns)
        if not stacked(converter):
            return None
        return places(converter, {original: self.pattern[original] for original in originals})


def contents(folder: Path, headers: dict[Path, dict[str, TensorEntry]], model: nn.Module) -> Contents:
    """Find which tensors make which parameter of ``model``, a skeleton.

    Raises :class:`CheckpointError` for a tensor that comes twice or makes a parameter that another makes, for one of
    another shape or of a dtype that is no weight's, and for parameters that nothing makes.
    """
    found = Contents(folder, headers, get_model_conversion_mapping(model))
    state = model.state_dict()
    renamings = [entry for entry in found.mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in found.mapping if isinstance(entry, WeightConverter)]
    for file, header in headers.items():
        for original in header:
            if original in found.file:
                raise CheckpointError(
                    f"the tensor {original} is in {found.file[original].name} and in {file.name} of {folder}"
                )
            target, pattern = rename_source_key(original, renamings, converters, model.base_model_prefix, state)
            if target not in state and original in state:
                target = original
            whole = mxfp4.parameter_of(target)
            if target not in state and whole in state:
                target, pattern = whole, None
                found.mxfp4.add(whole)
            found.file[original] = file
            if target in state:
                found.pattern[original] = pattern
                for made in _targets(target, pattern, converters):
                    found.made_of.setdefault(made, []).append(original)
            else:
                (found.ahead if is_ahead(model, original) else found.unused).append(original)
    _swap_tied(found, model, state)
    _check_complete(found, model, state)
    for target, originals in found.made_of.items():
        _check_parameter(found, target, originals, state[target])
    return found


def _targets(target: str, pattern: str | None, converters: list[WeightConverter]) -> list[str]:
    """The parameters that a tensor makes: several where a conversion splits it (a fused q, k and v)."""
    converter = next((c for c in converters if pattern is not None and pattern in c.source_patterns), None)
    if converter is None or len(converter.target_patterns) < 2:
        return [target]
    named = [p.removesuffix("$").removeprefix("^") for p in converter.target_patterns]
    own = next((p for p in named if p in target), None)
    return [target] if own is None else [target.replace(own, other) for other in named]


def _swap_tied(found: Contents, model: nn.Module, state: dict) -> None:
    """Assign the stored weight of a tied pair to the parameter that the model keeps, as transformers does, where the
    files hold it under the other name."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if source not in found.made_of and target in found.made_of and source in state:
            found.made_of[source] = found.made_of.pop(target)


def _check_complete(found: Contents, model: nn.Module, state: dict) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(set(state) - set(found.made_of) - tied)
    if missing:
        held = f"; they hold others that it does not use: {listed(found.unused)}" if found.unused else ""
        raise CheckpointError(f"{found.folder} lacks weights of the model: {listed(missing)}{held}")


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check_mxfp4(found: Contents, target: str, originals: list[str], parameter: Tensor) -> None:
    """Raise :class:`CheckpointError` unless a parameter has blocks and scales of its shape."""
    for part, shape in mxfp4.shapes(list(parameter.shape)).items():
        names = [name for name in originals if name.endswith(part)]
        if len(names) != 1 or len(originals) != len(mxfp4.PARTS):
            raise CheckpointError(f"{found.folder}: {target} in MXFP4 must have blocks and scales, got {originals}")
        entry = found.entry(names[0])
        if entry.dtype != "U8" or entry.shape != shape:
            raise CheckpointError(
                f"{found.folder} does not fit its config: {names[0]} is {entry.dtype} {entry.shape}, expected U8 "
                f"{shape}"
            )


def _check_parameter(found: Contents, target: str, originals: list[str], parameter: Tensor) -> None:
    if target in found.mxfp4:
        _check_mxfp4(found, target, originals, parameter)
        return
    for original in originals:
        _check_dtype(found, original, parameter.dtype)
    kinds = found.kinds(originals)
    if kinds is None:
        if found.pattern[originals[0]] is None:
            raise CheckpointError(f"{found.folder}: {listed(originals)} all make {target} of the model")
        # put together by transformers, which checks the result
        return
    whole = list(parameter.shape)
    stack = found.pattern[originals[0]] is not None
    wanted = [whole[1] // len(kinds), *whole[2:]] if stack else whole
    for names in kinds:
        if stack:
            _check_numbers(found, target, names, whole[0])
        for original in names:
            if found.entry(original).shape != wanted:
                raise CheckpointError(
                    f"{found.folder} does not fit its config: {original} has shape {found.entry(original).shape}, "
                    f"expected {wanted}"
                )


def _check_dtype(found: Contents, original: str, dtype: torch.dtype) -> None:
    stored = found.entry(original).dtype
    allowed = WEIGHTS if dtype.is_floating_point else [name for name, kind in DTYPES.items() if kind == dtype]
    if stored in allowed:
        return
    if stored.startswith("F8"):
        what = f"in fp8 ({stored}): convert the model to bfloat16 first, each weight times its weight_scale_inv"
    else:
        what = f"as {stored}, expected {', '.join(allowed)}: is the model quantized?"
    raise CheckpointError(f"{found.folder}: {original} is stored {what}")


def _check_numbers(found: Contents, target: str, names: list[str], experts: int) -> None:
    """Raise :class:`CheckpointError` unless each expert's number occurs once: experts are stacked in the order of the
    numbers in their names."""
    numbers = [tuple(int(n) for n in re.findall(r"\d+", name)) for name in names]
    if len(names) != experts or len(set(numbers)) != experts:
        twice = [name for name, own in zip(names, numbers, strict=True) if numbers.count(own) > 1]
        what = f": {listed(twice)} are the same one" if twice else ""
        raise CheckpointError(
            f"{found.folder} does not fit its config: {target} is made of {len(names)} matrices such as "
            f"{names[0] if names else 'none'}, expected {experts}{what}"
        )
    counted = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
    if experts > 1 and [sorted(column) for column in counted] != [list(range(experts))]:
        raise CheckpointError(
            f"{found.folder}: the experts of {target} are numbered otherwise than 0..{experts - 1}: {listed(names)}"
        )


def tell_unused(found: Contents, layers: str, count: int) -> None:
    """Warn, by the logger ``gemq``, of the tensors that are left out, as transformers leaves them out. Layers of
    multi-token prediction are not: they are kept as they are.

    ``layers`` is the path of the decoder layers, of which there are ``count``.
    """
    unused = [name for name in found.unused if not _COMPUTED.search(name)]
    beyond = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    more = [name for name in unused if (m := beyond.match(name)) and int(m[1]) >= count]
    if more:
        _log.warning(
            "%s: %d tensors of layers that the model does not have (more than the %d of num_hidden_layers) are left "
            "out: %s", found.folder, len(more), count, listed(more),
        )
    rest = [name for name in unused if name not in set(more)]
    if rest:
        _log.warning(
            "%s: %d tensors are not part of the model and are left out: %s", found.folder, len(rest), listed(rest)
        )
