"""Calls of the CPU kernels that skip torch's dispatcher and checks already made: same results, same refusals."""

from __future__ import annotations

import gc

import pytest
import torch
from stacks import random_stack
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemq import ops
from gemq.ops import checks

HIDDEN, INTERMEDIATE = 128, 64


class Block:
    def __init__(self) -> None:
        self.gate_up = random_stack([2, 3, 1], 2 * INTERMEDIATE, HIDDEN, 64, "cpu_tile", seed=0)
        self.down = random_stack([3, 1, 2], HIDDEN, INTERMEDIATE, 64, "cpu_tile", seed=1)
        self.x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(2))
        self.ids, self.weights = torch.tensor([[0, 1], [1, 2], [2, 0], [1, -1]]), torch.rand(4, 2)

    def __call__(self, x: Tensor | None = None) -> Tensor:
        return ops.moe_lowbit_ffn(
            self.x if x is None else x, self.gate_up, self.down, self.ids, self.weights, intermediate=INTERMEDIATE,
            group_size=64, layout="cpu_tile",
        )


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_both_ways_give_the_same() -> None:
    block = Block()
    direct = block()
    tracked = block(block.x.clone().requires_grad_())
    assert tracked.requires_grad
    assert torch.equal(direct, tracked.detach())
    with torch.no_grad():
        assert not block(block.x.clone().requires_grad_()).requires_grad


def test_whoever_watches_sees_the_op() -> None:
    block = Block()
    with Recorder() as recorder:
        out = block()
    assert "gemq.moe_lowbit_ffn.default" in recorder.seen
    assert torch.equal(out, block())


def test_transforms_are_not_passed_by() -> None:
    seen = []
    torch.func.grad(lambda x: (seen.append(checks.unwatched(x)), x.sum())[1])(torch.ones(3))
    torch.vmap(lambda x: (seen.append(checks.unwatched(x)), x.sum())[1])(torch.ones(3, 2))
    assert seen == [False, False]
    assert checks.unwatched(torch.ones(3))


@pytest.mark.parametrize("table, value, message", [
    (2, 9, r"gate_up expert_bits\[1\] must be an integer in 0\.\.8, got 9"),
    (3, 1 << 40, r"gate_up expert_offsets\[1\] is 1099511627776, where the 128 x 128 of expert 1"),
    (4, -1, r"gate_up meta_offsets\[1\] is -1"),
])  # fmt: skip
def test_tables_changed_after_a_good_call_are_refused(table: int, value: int, message: str) -> None:
    """Also through numpy, which torch's version counter does not see."""
    block = Block()
    block()
    block.gate_up[table].numpy()[1] = value
    with pytest.raises(ValueError, match=message):
        block()


def test_tensors_that_became_others_are_checked_again() -> None:
    block = Block()
    good = block()
    qweight = block.gate_up[0]
    data = qweight.data
    qweight.data = data[:-1].clone()
    with pytest.raises(ValueError, match=r"not inside the .* elements of qweight"):
        block()
    qweight.data = data
    assert torch.equal(block(), good)
    block.gate_up = (qweight, block.gate_up[1], block.gate_up[2].long(), *block.gate_up[3:])
    with pytest.raises(TypeError, match="gate_up expert_bits must be int32, got int64"):
        block()


def test_a_stack_is_checked_for_every_shape_it_is_used_with() -> None:
    block = Block()
    block()
    with pytest.raises(ValueError, match="not inside"):
        ops.moe_lowbit_gemm(
            block.x, *block.gate_up, block.ids, n=4 * INTERMEDIATE, group_size=64, layout="cpu_tile"
        )
    with pytest.raises(ValueError, match=r"layout gpu_tile is read on|layout must be one of"):
        ops.moe_lowbit_gemm(block.x, *block.gate_up, block.ids, n=2 * INTERMEDIATE, group_size=64, layout="tile")


def test_nothing_is_kept_of_a_stack_that_is_gone() -> None:
    gc.collect()
    before = len(checks.SEEN._entries)
    block = Block()
    block()
    assert len(checks.SEEN._entries) == before + 2
    del block
    gc.collect()
    assert len(checks.SEEN._entries) == before
