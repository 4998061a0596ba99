"""The same blocks unquantized in torch: three ways that ``torch.compile`` takes whole, and a loop over experts."""

from __future__ import annotations

import torch
from layers import Plans, Unsupported, expert_block
from shapes import Block
from torch import Tensor
from torch.nn.functional import silu


def grouped_mm(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Tokens sorted by expert, one grouped product: what transformers' ``grouped_mm`` experts do."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.histc(flat.float(), bins=gate_up.shape[0], min=0, max=gate_up.shape[0] - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    rows = x[order // ids.shape[1]]
    gate, up = torch._grouped_mm(rows, gate_up.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    out = torch._grouped_mm(silu(gate) * up, down.transpose(-2, -1), offs=ends)
    back = torch.empty_like(out).index_copy(0, order, out).view(*ids.shape, -1)
    return (back * weights[..., None].to(x.dtype)).sum(1)


def batched_mm(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A batch of matrix-vector products over gathered experts: what transformers' ``batched_mm`` experts do."""
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(ids.shape[1], 0)
    gate, up = torch.bmm(gate_up[flat], rows[..., None]).squeeze(-1).chunk(2, dim=-1)
    out = torch.bmm(down[flat], (silu(gate) * up)[..., None]).squeeze(-1)
    return (out.view(*ids.shape, -1) * weights[..., None].to(x.dtype)).sum(1)


def gather_einsum(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Gathered experts and einsum: the baseline of the paper's authors."""
    gate, up = torch.einsum("th,tknh->tkn", x, gate_up[ids]).chunk(2, dim=-1)
    return torch.einsum("tkn,tkhn,tk->th", silu(gate) * up, down[ids], weights.to(x.dtype))


WAYS = {"grouped_mm": grouped_mm, "batched_mm": batched_mm, "gather_einsum": gather_einsum}
# bytes of gathered copies of experts that a call may make
GATHER_LIMIT = {"cuda": 16 << 30, "cpu": 1 << 30}


class Weights:
    """Random dense experts ``gate_up [E, 2 ffn, hidden]`` and ``down [E, hidden, ffn]``, shared ones likewise."""

    def __init__(self, block: Block, seed: int, device: str, dtype: torch.dtype) -> None:
        self.block = block
        generator = torch.Generator(device).manual_seed(seed)
        # a million numbers over and over: drawing hundreds of millions would take longer than the measurement
        tile = torch.randn(1 << 20, generator=generator, device=device)

        def tensor(*shape: int) -> Tensor:
            count = torch.Size(shape).numel()
            whole = (tile * shape[-1] ** -0.5).to(dtype).repeat(-(-count // tile.numel()))
            return whole[:count].view(shape)

        self.gate_up = tensor(block.experts, 2 * block.ffn, block.hidden)
        self.down = tensor(block.experts, block.hidden, block.ffn)
        self.shared = None
        if block.shared:
            self.shared = tensor(2 * block.shared, block.hidden), tensor(block.hidden, block.shared)

    def weights(self, e: int) -> tuple[Tensor, Tensor]:
        return self.gate_up[e].float(), self.down[e].float()

    def shared_weights(self) -> tuple[Tensor, Tensor]:
        return self.shared[0].float(), self.shared[1].float()

    def bytes_of(self, experts: list[int]) -> int:
        b = self.block
        return 3 * b.hidden * (b.ffn * len(experts) + b.shared) * self.gate_up.element_size()


class Unquantized:
    """A way through dense weights, compiled or not."""

    def __init__(self, held: Weights, provider: str, tokens: int, compiled: bool) -> None:
        b, device = held.block, held.gate_up.device.type
        gathered = tokens * b.top_k * 3 * b.hidden * b.ffn * held.gate_up.element_size()
        if provider in ("batched_mm", "gather_einsum") and gathered > GATHER_LIMIT[device]:
            raise Unsupported(f"would gather {gathered / 1e9:.0f} GB of expert weights")
        if provider == "grouped_mm" and not hasattr(torch, "_grouped_mm"):
            raise Unsupported("this torch has no _grouped_mm")
        self.held, self.plans = held, Plans()
        self.weights, self.shared_weights, self.bytes_of = held.weights, held.shared_weights, held.bytes_of
        way = WAYS.get(provider)
        self.way = None if way is None else (compiled_way if compiled else _block)(way)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = self.held
        if self.way is not None:
            return self.way(x, h.gate_up, h.down, ids, weights, h.shared)
        out = torch.zeros_like(x)
        for e, token, slot in self.plans(ids):
            part = expert_block(x[token], h.gate_up[e], h.down[e])
            out.index_add_(0, token, part * weights[token, slot, None].to(x.dtype))
        return out if h.shared is None else out + expert_block(x, *h.shared)


def _block(way):
    def block(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, shared) -> Tensor:
        out = way(x, gate_up, down, ids, weights)
        return out if shared is None else out + expert_block(x, *shared)

    return block


_compiled: dict = {}


def compiled_way(way):
    """``torch.compile``d once for all layers of a case; :func:`forget_compiled` before the next case's shapes."""
    if way not in _compiled:
        _compiled[way] = torch.compile(_block(way), dynamic=False, fullgraph=True)
    return _compiled[way]


def forget_compiled() -> None:
    """Reset torch's compiler: it falls back to eager, without a warning, after a few recompilations of one function."""
    _compiled.clear()
    torch._dynamo.reset()
