"""GPTQ's group step on CUDA: the kernel is the CPU's text, and the reference decides."""

from __future__ import annotations

import pytest
import torch

from gemq import reference
from gemq._core import core
from gemq.ops.gptq import gptq_group

needs_cuda = pytest.mark.skipif(not (torch.cuda.is_available() and core().cuda_built()), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("clip", ["none", "paper", "mse"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_cuda_group_step_is_the_reference(group: int, clip: str) -> None:
    generator = torch.Generator().manual_seed(group)
    block = torch.randn(8, 70, group, generator=generator) * 0.03
    x = torch.randn(8, 400, group, generator=generator)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.mT @ x), upper=True)
    bits = torch.arange(1, 9, dtype=torch.int32)
    for propagate_from in (1, 4):
        found = gptq_group(block.cuda(), factor.cuda(), bits.cuda(), clip, propagate_from)
        expected = reference.gptq_group(block, factor, bits, clip, propagate_from)
        assert (found[0].cpu() == expected[0]).double().mean() > (0.98 if clip == "paper" else 0.9999)
        assert float(found[2].square().sum()) == pytest.approx(float(expected[2].square().sum()), rel=1e-2)


def test_tensors_on_different_devices_are_refused() -> None:
    block, factor = torch.zeros(1, 4, 32), torch.eye(32)[None]
    with pytest.raises(ValueError, match="factor is on meta, block on cpu"):
        gptq_group(block, factor.to("meta"), torch.tensor([2]))
