"""Compare a checkpoint's routers with the original model's, read from the files."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from gemq.checkpoint import load_packed_config
from gemq.errors import CheckpointError
from gemq.integrity import read_header, weight_files

_ROUTER = re.compile(r"\.layers\.(\d+)\.[a-z_]+\.(?:gate|router|gate\.wg|router\.gate|router\.layer)\.weight$")


def _routers(folder: Path) -> dict[int, tuple[Path, str]]:
    """File and name of every router's weight, by decoder layer."""
    found = {}
    for file in weight_files(folder):
        # the library's own errors say less
        read_header(file)
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                match = _ROUTER.search(name)
                if match:
                    found[int(match[1])] = (file, name)
    return found


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name).double()


def weight_shift(checkpoint: Path, source: Path) -> dict[int, float]:
    """``||W - W0|| / ||W0||`` of every MoE layer's router, ``W0`` that of the unquantized model in ``source``.

    Raises :class:`CheckpointError` if ``source`` is no folder with safetensors, or its routers are of other layers or
    another shape.
    """
    layers = set(load_packed_config(checkpoint).widths.experts)
    tuned, original = _routers(checkpoint), _routers(source)
    missing = sorted(layers - (set(tuned) & set(original)))
    if missing:
        raise CheckpointError(f"{source} is not the original of {checkpoint}: no router of layer {missing[0]} in both")
    shift = {}
    for layer in sorted(layers):
        after, before = _read(*tuned[layer]), _read(*original[layer])
        if after.shape != before.shape:
            raise CheckpointError(f"{source} is not the original of {checkpoint}: its router of layer {layer} has the "
                                  f"shape {list(before.shape)}, not {list(after.shape)}")
        shift[layer] = float((after - before).norm() / before.norm().clamp(min=1e-30))
    return shift
