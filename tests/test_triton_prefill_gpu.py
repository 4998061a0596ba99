"""The cases of the prefill kernels, compiled and run on the GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA GPU and compiled kernels", allow_module_level=True)

from prefill_cases import *  # noqa: F403

pytestmark = pytest.mark.gpu
