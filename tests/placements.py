"""List the layouts to test: each on the devices whose kernels read it, so far as this machine has them.

``TRITON_INTERPRET=1`` adds Triton's interpreter, slow but good for any op test.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()


class Placement(NamedTuple):
    """A layout on a device."""

    layout: str
    device: str

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which products of activations of ``dtype`` are computed: Triton's kernels take 11 bits at most."""
        return torch.float16 if self.layout == "gpu_tile" and dtype == torch.float32 else dtype


def _param(layout: str, device: str):
    marks = pytest.mark.gpu if device == "cuda" else ()
    return pytest.param(Placement(layout, device), id=f"{layout}-{device}", marks=marks)


PLACEMENTS = [_param("canonical", "cpu"), _param("cpu_tile", "cpu")]
DEVICES = [pytest.param("cpu", id="cpu")]
if INTERPRETED:
    PLACEMENTS.append(_param("gpu_tile", "cpu"))
elif HAS_GPU:
    PLACEMENTS += [_param("canonical", "cuda"), _param("gpu_tile", "cuda")]
    DEVICES.append(pytest.param("cuda", id="cuda", marks=pytest.mark.gpu))
