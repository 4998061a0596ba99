"""The ops as torch sees them: schemas and fake implementations, gradients, ``torch.compile``."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from placements import DEVICES, PLACEMENTS, Placement
from stacks import random_stack
from torch import Tensor

from gemq import ops, reference

BITS = (3, 0, 1, 2)
HIDDEN, INTERMEDIATE, GROUP, DOWN_GROUP = 128, 96, 64, 32
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
places = pytest.mark.parametrize("place", PLACEMENTS)


class Block:
    """The inputs of every product for ``tokens`` tokens, two experts each; one id is no expert's."""

    def __init__(self, place: Placement, tokens: int, dtype: torch.dtype = torch.float32):
        def move(tensors):
            return tuple(t.to(place.device) for t in tensors)

        generator = torch.Generator().manual_seed(tokens)
        self.layout = place.layout
        self.gate_up = move(random_stack(BITS, 2 * INTERMEDIATE, HIDDEN, GROUP, place.layout, 1))
        self.down = move(random_stack(BITS, HIDDEN, INTERMEDIATE, DOWN_GROUP, place.layout, 2))
        self.dense = move(random_stack([3], 47, HIDDEN, GROUP, place.layout, 3)[:2])
        ids = torch.rand(tokens, len(BITS), generator=generator).argsort(-1)[:, :2]
        ids[0, 1] = -1
        x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        slots = torch.randn(tokens, 2, HIDDEN, generator=generator).to(dtype)
        weights = torch.rand(tokens, 2, generator=generator)
        self.x, self.slots, self.ids, self.weights = move((x, slots, ids, weights))

    def gemm(self, x: Tensor, weights: Tensor | None, f=ops.moe_lowbit_gemm, **options) -> Tensor:
        return f(
            x, *self.gate_up, self.ids, weights, n=2 * INTERMEDIATE, group_size=GROUP, layout=self.layout, **options
        )

    def ffn(self, x: Tensor, weights: Tensor, f=ops.moe_lowbit_ffn, **options) -> Tensor:
        return f(
            x, self.gate_up, self.down, self.ids, weights, intermediate=INTERMEDIATE, group_size=GROUP,
            down_group_size=DOWN_GROUP, layout=self.layout, **options,
        )

    def linear(self, x: Tensor, weights: None = None, f=ops.lowbit_gemm, **options) -> Tensor:
        return f(x, *self.dense, bits=3, n=47, group_size=GROUP, layout=self.layout, **options)


def opcheck(name: str, *args) -> None:
    torch.library.opcheck(getattr(torch.ops.gemq, name).default, args)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_packing(device: str) -> None:
    codes = torch.randint(0, 8, (17, 64), dtype=torch.uint8, device=device)
    packed, meta = ops.pack(codes, 3), torch.randn(17, 2, 2, device=device).to(torch.float16)
    opcheck("pack", codes, 3)
    opcheck("unpack", packed, 3, 64)
    opcheck("dequantize", packed, meta, 3, 64, 32, torch.bfloat16)
    for layout in ("cpu_tile", "gpu_tile"):
        tile = ops.repack(packed.flatten(), meta.flatten(), 3, 17, 64, 32, target=layout)
        opcheck("repack", packed.flatten(), meta.flatten(), 3, 17, 64, 32, layout, False)
        opcheck("repack", *tile, 3, 17, 64, 32, layout, True)


@places
def test_opcheck_of_products(place: Placement) -> None:
    """With gradients wanted, weights that are not contiguous, and without either."""
    block = Block(place, 5)
    x, slots = (t.clone().requires_grad_() for t in (block.x, block.slots))
    strided = block.weights.T.contiguous().T.requires_grad_()
    static = (2 * INTERMEDIATE, GROUP, place.layout)
    opcheck("moe_lowbit_gemm", x, *block.gate_up, block.ids, strided, *static)
    opcheck("moe_lowbit_gemm", slots, *block.gate_up, block.ids.to(torch.int32), None, *static)
    opcheck(
        "moe_lowbit_ffn", x, *block.gate_up, *block.down, block.ids, strided, INTERMEDIATE, GROUP, DOWN_GROUP,
        place.layout,
    )
    opcheck("lowbit_gemm", x, *block.dense, 3, 47, GROUP, place.layout)
    grad = torch.randn(5, 2 * INTERMEDIATE, device=place.device)
    shared = (*block.gate_up, block.ids)
    opcheck("moe_lowbit_gemm_backward", grad, block.x, *shared, strided.detach(), *static)
    opcheck("moe_lowbit_gemm_backward", torch.stack([grad, grad], 1), block.slots, *shared, None, *static)
    opcheck("lowbit_gemm_backward", grad[:, :47].contiguous(), *block.dense, 3, HIDDEN, GROUP, place.layout)


def gradients(call, upstream: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Of ``(call(*inputs) * upstream).sum()`` with respect to the inputs."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = call(*leaves)
    out.backward(upstream.to(out))
    return [t.grad for t in leaves if t is not None]


@places
@DTYPES
@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("case", ["gemm", "gemm-weighted", "gemm-slots", "gemm-slots-weighted", "ffn", "linear"])
def test_gradients(place: Placement, dtype: torch.dtype, tokens: int, case: str) -> None:
    """As autograd's through the dequantized weights in float64; none for an id that is no expert's."""
    kind, _, _ = case.partition("-")
    block, truth = Block(place, tokens, dtype), Block(Placement(place.layout, "cpu"), tokens, dtype)
    oracle = {"gemm": reference.moe_lowbit_gemm, "ffn": reference.moe_lowbit_ffn, "linear": reference.lowbit_gemm}

    def exact(x, weights):
        return getattr(truth, kind)(x, weights, f=oracle[kind], compute_dtype=torch.float64)

    x = block.slots if "slots" in case else block.x
    weights = block.weights if "weighted" in case or kind == "ffn" else None
    shape = getattr(block, kind)(x, weights).shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = gradients(getattr(block, kind), upstream, x, weights)
    wide = [t if t is None else t.cpu().double() for t in (x, weights)]
    expected = gradients(exact, upstream.double(), *wide)
    assert [g.dtype for g in got] == [t.dtype for t in (x, weights) if t is not None]
    for grad, ref in zip(got, expected, strict=True):
        assert_close(grad, ref, dtype=place.precision(dtype))
    if weights is not None:
        assert got[1][0, 1] == 0


def test_no_gradient_is_kept_for_packed_weights() -> None:
    block = Block(PLACEMENTS[0].values[0], 3)
    out = block.ffn(block.x.requires_grad_(), block.weights)
    out.sum().backward()
    assert block.x.grad is not None
    assert all(t.grad is None and not t.requires_grad for t in (*block.gate_up, *block.down))


def compiled(f, backend: str):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=True, backend=backend)


@places
def test_compiled_products(place: Placement) -> None:
    """One graph for any number of tokens, forward and backward."""

    def step(x: Tensor, slots: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        block.ids = ids
        mixed = block.gemm(slots, weights).float().sum() + block.gemm(x, None).float().square().sum()
        return block.ffn(x, weights).float().sum() + mixed + block.linear(x).float().sum()

    graph = compiled(step, "aot_eager")
    for tokens in (5, 17):
        block = Block(place, tokens)
        args = (block.slots, block.ids)
        expected = gradients(lambda x, w: step(x, *args, w), torch.ones(()), block.x, block.weights)  # noqa: B023
        with torch._dynamo.config.patch(error_on_recompile=tokens > 5):
            out = gradients(lambda x, w: graph(x, *args, w), torch.ones(()), block.x, block.weights)  # noqa: B023
        for grad, eager in zip(out, expected, strict=True):
            assert_close(grad, eager.double().cpu())


@places
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
def test_compiled_with_inductor(place: Placement) -> None:
    block = Block(place, 5)
    graph = compiled(lambda x, weights: torch.relu(block.ffn(x * 2, weights)) + 1, "inductor")
    eager = torch.relu(block.ffn(block.x * 2, block.weights)) + 1
    assert_close(graph(block.x, block.weights), eager.double())


def test_compiled_packing() -> None:
    def there_and_back(codes: Tensor, meta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = ops.pack(codes, 3)
        rows, k = codes.shape
        tile = ops.repack(packed.flatten(), meta.flatten(), 3, rows, k, 32, target="cpu_tile")
        return ops.unpack(packed, 3, k), ops.dequantize(packed, meta, 3, k, 32), tile[0]

    codes = torch.randint(0, 8, (17, 64), dtype=torch.uint8)
    meta = torch.randn(17, 2, 2).to(torch.float16)
    torch._dynamo.reset()
    graph = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for out, eager in zip(graph(codes, meta), there_and_back(codes, meta), strict=True):
        assert torch.equal(out, eager)
