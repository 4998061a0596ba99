"""GPTQ's group step and descent on CUDA: the kernels are the CPU's text, and the reference decides."""

from __future__ import annotations

import pytest
import torch
from comparing import output_error

from gemq import reference
from gemq._core import core
from gemq.ops.gptq import descend_codes, gptq_group
from gemq.reference.grid import dequantize_codes, round_to_nearest

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


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("group", [32, 64, 128])
def test_cuda_descent_is_the_reference(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    x = torch.randn(8, 400, group, generator=generator)
    hessian, bits = x.mT @ x, torch.arange(1, 9, dtype=torch.int32)
    weight = torch.randn(8, 70, group, generator=generator) * 0.03
    grids = [round_to_nearest(w, int(b), group) for w, b in zip(weight, bits, strict=True)]
    codes, meta = (torch.stack(part) for part in zip(*grids, strict=True))
    products = (weight - dequantize_codes(codes, meta)) @ hessian
    given = (products, hessian, codes, meta[:, :, 0], bits)
    found, expected = descend_codes(*(t.cuda() for t in given)).cpu(), reference.descend_codes(*given)
    assert (found == expected).double().mean() > 0.99
    error = output_error(weight, hessian, found, meta)
    assert error == pytest.approx(output_error(weight, hessian, expected, meta), rel=1e-3)


def test_tensors_on_different_devices_are_refused() -> None:
    block, factor = torch.zeros(1, 4, 32), torch.eye(32)[None]
    with pytest.raises(ValueError, match="factor is on meta, block on cpu"):
        gptq_group(block, factor.to("meta"), torch.tensor([2]))
