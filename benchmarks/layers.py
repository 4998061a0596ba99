"""The layers that the MoE benchmark runs: gemq's, and what it is measured against.

A layer is called with ``(x [T, hidden], topk_ids [T, top_k], topk_weights [T, top_k])`` and returns ``[T, hidden]``.
``weights()`` gives what it multiplies by, in float32, to check the result; ``bytes_of(experts)`` what a call that
routes to these experts has to read.
"""

from __future__ import annotations

import importlib

import torch
from shapes import GROUP, SHARED_BITS, Block, Case, widths
from torch import Tensor
from torch.nn.functional import linear, silu

from gemq import format as fmt
from gemq import ops
from gemq.ops import measuring


class Unsupported(Exception):
    """This provider cannot run this case; the text says why."""


Pair = tuple[Tensor, Tensor]


def expert_block(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One dense expert on ``[T, hidden]``."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(silu(gate) * up, down)


class Plans:
    """Experts of each token, kept on the host by routing tensor: nothing waits for the device when timed.

    That knowledge is a gift to the providers that loop over experts; a running model has to fetch it.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def __call__(self, ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        plan = self._known.get(id(ids))
        if plan is None:
            plan = [(e, *torch.where(ids == e)) for e in ids.unique().tolist()]
            self._known[id(ids)] = plan
        return plan


class Packed:
    """Random packed experts in ``layout``, the shared expert at :data:`SHARED_BITS`."""

    def __init__(self, block: Block, mix: str, seed: int, device: str, layout: str) -> None:
        self.block, self.layout = block, layout
        self.bits = widths(mix, block.experts, seed)
        generator = torch.Generator(device).manual_seed(seed)

        def stack(bits, n, k):
            return measuring.random_stack(bits, n, k, GROUP, layout, device, generator)

        self.gate_up = stack(self.bits, 2 * block.ffn, block.hidden)
        self.down = stack(self.bits, block.hidden, block.ffn)
        self.shared = None
        if block.shared:
            self.shared = stack([SHARED_BITS], 2 * block.shared, block.hidden), stack(
                [SHARED_BITS], block.hidden, block.shared
            )

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = ops.moe_lowbit_ffn(
            x, self.gate_up, self.down, ids, weights, intermediate=self.block.ffn, group_size=GROUP, layout=self.layout
        )
        return out if self.shared is None else out + self.shared_out(x)

    def shared_out(self, x: Tensor) -> Tensor:
        gate_up, down = self.shared
        options = {"bits": SHARED_BITS, "group_size": GROUP, "layout": self.layout}
        gate, up = ops.lowbit_gemm(x, *gate_up[:2], n=2 * self.block.shared, **options).chunk(2, dim=-1)
        return ops.lowbit_gemm(silu(gate) * up, *down[:2], n=self.block.hidden, **options)

    def _matrix(self, stack, e: int, bits: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
        at, meta_at = int(stack[3][e]), int(stack[4][e])
        codes = stack[0][at : at + fmt.codes_bytes(n, k, bits, self.layout)]
        meta = stack[1][meta_at : meta_at + fmt.meta_elements(n, k, bits, GROUP, self.layout)]
        if self.layout != "canonical":
            codes, meta = ops.repack(codes, meta, bits, n, k, GROUP, source=self.layout, target="canonical")
        return ops.dequantize(codes.view(n, -1), meta.view(n, k // GROUP, 2), bits, k, GROUP, dtype)

    def weights(self, e: int, dtype: torch.dtype = torch.float32) -> Pair:
        b, bits = self.block, self.bits[e]
        return (self._matrix(self.gate_up, e, bits, 2 * b.ffn, b.hidden, dtype),
                self._matrix(self.down, e, bits, b.hidden, b.ffn, dtype))

    def shared_weights(self, dtype: torch.dtype = torch.float32) -> Pair:
        b, (gate_up, down) = self.block, self.shared
        return (self._matrix(gate_up, 0, SHARED_BITS, 2 * b.shared, b.hidden, dtype),
                self._matrix(down, 0, SHARED_BITS, b.hidden, b.shared, dtype))

    def bytes_of(self, experts: list[int]) -> int:
        def both(bits: int, ffn: int) -> int:
            h = self.block.hidden
            return sum(
                fmt.codes_bytes(n, k, bits, self.layout) + 2 * fmt.meta_elements(n, k, bits, GROUP, self.layout)
                for n, k in ((2 * ffn, h), (h, ffn))
            )

        shared = both(SHARED_BITS, self.block.shared) if self.shared else 0
        return shared + sum(both(self.bits[e], self.block.ffn) for e in experts)


class Dequantized(Packed):
    """Canonical codes, dequantized expert by expert at every call, then a dense product; routing known beforehand."""

    def __init__(self, block: Block, mix: str, seed: int, device: str, dtype: torch.dtype) -> None:
        super().__init__(block, mix, seed, device, "canonical")
        self.dtype, self.plans = dtype, Plans()

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, token, slot in self.plans(ids):
            part = expert_block(x[token], *self.weights(e, self.dtype))
            out.index_add_(0, token, part * weights[token, slot, None].to(x.dtype))
        return out if self.shared is None else out + expert_block(x, *self.shared_weights(self.dtype))


class GemLite(Packed):
    """One GemLite module per expert and product (https://github.com/dropbox/gemlite); it has no 3 bits: 4 hold them."""

    def __init__(self, block: Block, mix: str, seed: int, device: str) -> None:
        try:
            import gemlite
        except ImportError as error:
            raise Unsupported(f"gemlite is not installed: {error}") from None
        if device != "cuda":
            raise Unsupported("gemlite runs on CUDA")
        super().__init__(block, mix, seed, device, "canonical")
        self.plans, self.gemlite = Plans(), gemlite
        b = block
        self.modules = [
            (self._module(self.gate_up, e, bits, 2 * b.ffn, b.hidden),
             self._module(self.down, e, bits, b.hidden, b.ffn))
            for e, bits in enumerate(self.bits)
        ]
        if self.shared:
            self.shared_module = (self._module(self.shared[0], 0, SHARED_BITS, 2 * b.shared, b.hidden),
                                  self._module(self.shared[1], 0, SHARED_BITS, b.hidden, b.shared))

    def _module(self, stack, e: int, bits: int, n: int, k: int):
        at, meta_at = int(stack[3][e]), int(stack[4][e])
        packed = stack[0][at : at + fmt.codes_bytes(n, k, bits)].view(n, -1)
        s, m = stack[1][meta_at : meta_at + fmt.meta_elements(n, k, bits, GROUP)].view(n, -1, 2).unbind(-1)
        kind = self.gemlite.DType.FP16
        module = self.gemlite.GemLiteLinear(
            4 if bits == 3 else bits, group_size=GROUP, in_features=k, out_features=n, input_dtype=kind,
            output_dtype=kind,
        )
        # its weights are (q - z) * s
        zeros = (-m.float() / s.float()).half()
        module.pack(ops.unpack(packed, bits, k), s.contiguous(), zeros.contiguous(), bias=None)
        return module

    def _block(self, x: Tensor, modules) -> Tensor:
        gate, up = modules[0](x).chunk(2, dim=-1)
        return modules[1](silu(gate) * up)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, token, slot in self.plans(ids):
            part = self._block(x[token], self.modules[e])
            out.index_add_(0, token, part * weights[token, slot, None].to(x.dtype))
        return out if self.shared is None else out + self._block(x, self.shared_module)


class Peer(Packed):
    """A kernel given with ``--peer module:function``.

    ``function(gate_up, down, *, bits, hidden, intermediate, group_size)`` gets the two canonical stacks as plain
    tensors ``(qweight uint8, meta float16, expert_bits, expert_offsets, meta_offsets)`` (``gemq/format.py`` has the
    layout) and the widths as a list. It may pack them as it likes, untimed, and returns ``run(x, topk_ids,
    topk_weights) -> [T, hidden]``, which is timed. A block's shared expert is gemq's in both.
    """

    def __init__(self, block: Block, mix: str, seed: int, device: str, name: str) -> None:
        super().__init__(block, mix, seed, device, "canonical")
        module, _, function = name.partition(":")
        make = getattr(importlib.import_module(module), function)
        self.run = make(
            self.gate_up, self.down, bits=list(self.bits), hidden=block.hidden, intermediate=block.ffn, group_size=GROUP
        )

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.run(x, ids, weights)
        return out if self.shared is None else out + self.shared_out(x)


def packed_layer(case: Case, seed: int, device: str):
    """The layer of a case that has a mix."""
    if case.provider == "gemq":
        return Packed(case.block, case.mix, seed, device, ops.layout_for(device))
    if case.provider == "dequantize":
        dtype = torch.float16 if device == "cuda" else torch.float32
        return Dequantized(case.block, case.mix, seed, device, dtype)
    if case.provider == "gemlite":
        return GemLite(case.block, case.mix, seed, device)
    return Peer(case.block, case.mix, seed, device, case.provider)
