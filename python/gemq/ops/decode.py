"""A decode step of a whole model on the CPU as one compiled program: buffers, operations, one call a token.

Operations run in the order in which they are added, on buffers ``[batch, width]`` of float32. Weights are read where
they lie: packed ones in the layout ``cpu_tile``, others as float32, bfloat16 or float16; products sum in float32.
Packed products take activations as :func:`gemq.ops.set_cpu_activations` said when the program was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from gemq import format as fmt
from gemq._core import core
from gemq.ops import checks, cpu
from gemq.ops.packed_stack import PackedStack

MAX_ROWS = 16
GROUP_SCORES = (None, "largest", "two_largest")


@dataclass(frozen=True)
class Matrix:
    """A linear layer ``[n, k]``: ``weight`` as stored, or packed ``(codes, meta)`` of ``bits``; its result goes to the
    buffer ``out``."""

    out: int
    n: int
    weight: Tensor | tuple[Tensor, Tensor]
    bits: int = 0
    group_size: int = 0
    bias: Tensor | None = None


@dataclass(frozen=True)
class Attention:
    """Attention over ``keys`` and ``values [batch, groups, slots, dim]``, into which the new ones are written.

    ``query``, ``key``, ``value`` and ``out`` are buffers; ``cosines`` and ``sines`` float32 ``[positions, rotary]``,
    the first half of the sines negated; ``query_norm`` and ``key_norm`` weights ``[dim]`` of norms over a head.
    """

    query: int
    key: int
    value: int
    out: int
    heads: int
    keys: Tensor
    values: Tensor
    cosines: Tensor
    sines: Tensor
    scale: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's attention over ``latents [batch, 1, slots, rank]`` and ``ropes [batch, 1, slots, rope]``, into which
    the new ones are written.

    ``query [heads * (nope + rope)]``, ``latent [rank + rope]`` and ``out [heads * v_dim]`` are buffers. ``into [heads,
    rank, nope]`` folds the expansion of keys into the queries, ``from_ [heads, v_dim, rank]`` expands the values.
    ``norm [rank]`` is of new latents; ``cosines`` and ``sines`` float32 ``[positions, rope / 2]`` turn neighbours,
    which end up half the vector ``apart`` or side by side.
    """

    query: int
    latent: int
    out: int
    into: Tensor
    from_: Tensor
    norm: Tensor
    eps: float
    cosines: Tensor
    sines: Tensor
    apart: bool
    latents: Tensor
    ropes: Tensor
    scale: float


@dataclass(frozen=True)
class Routing:
    """Rule from a router's logits to experts and weights. It is :func:`gemq.ops.topk_routing` with the additions of
    DeepSeek and GLM4. Only the best ``kept_groups`` of ``groups`` runs of experts take part (``group_score`` "largest"
    or "two_largest" of a run), and ``epsilon`` is added to the sum that weights are divided by."""

    top_k: int
    scoring: str = "softmax"
    normalize: bool = True
    epsilon: float = 0.0
    scale: float = 1.0
    bias: Tensor | None = None
    group_score: str | None = None
    groups: int = 1
    kept_groups: int = 1


class DecodeProgram:
    """Operations for ``batch`` rows, 1 to 16; see the module. Every tensor given is kept alive.

    Raises ``TypeError`` or ``ValueError`` for a tensor of another dtype, shape, device or layout than stated, and for
    buffers whose widths do not fit.
    """

    def __init__(self, batch: int):
        if not 1 <= batch <= MAX_ROWS:
            raise ValueError(f"batch must be in 1..{MAX_ROWS}, got {batch}")
        self.batch = batch
        self._program = core().DecodeProgram(batch, cpu.ACTIVATIONS.index(cpu.cpu_activations()))
        self._held: list[Tensor] = []

    def _address(self, name: str, tensor: Tensor, dtype=checks.FLOATS, shape: tuple[int, ...] | None = None) -> int:
        checks.tensor(name, tensor, dtype=dtype, device=torch.device("cpu"))
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        self._held.append(tensor)
        return tensor.data_ptr()

    def _floats(self, name: str, tensor: Tensor | None, count: int) -> int:
        """Address of a small vector as float32, 0 for none."""
        return 0 if tensor is None else self._address(name, tensor.detach().float().contiguous(), shape=(count,))

    def buffer(self, width: int, tensor: Tensor | None = None) -> int:
        """The number of a new buffer ``[batch, width]``, in the program's memory or that of ``tensor``, float32."""
        at = 0 if tensor is None else self._address("tensor", tensor, torch.float32, (self.batch, width))
        return self._program.buffer(width, at)

    def embed(self, table: Tensor, out: int) -> None:
        """``out`` = rows of ``table [vocabulary, width]``."""
        at = self._address("table", table)
        self._program.embed(at, cpu.TYPES[table.dtype], table.shape[0], out)

    def norm(self, x: int, weight: Tensor, eps: float, out: int) -> None:
        """``out = weight * x / sqrt(mean(x^2) + eps)``; ``out`` may be ``x``."""
        self._program.norm(x, self._floats("weight", weight, weight.numel()), eps, out)

    def silu_mul(self, gate: int, up: int, out: int) -> None:
        """``out = SiLU(gate) * up``."""
        self._program.silu_mul(gate, up, out)

    def linear(self, x: int, width: int, matrices: Sequence[Matrix], onto: bool = False, gate: int = -1) -> None:
        """Multiply every matrix by ``x [batch, width]``. ``onto`` adds the results to the contents of the buffers,
        multiplied by the sigmoid of the buffer ``gate [batch, 1]`` if it is given."""
        self._program.linear(x, [self._matrix(m, width) for m in matrices], onto, gate)

    def _matrix(self, m: Matrix, k: int):
        bias = self._floats("bias", m.bias, m.n)
        if m.bits == 0:
            weight = cast(Tensor, m.weight)
            at = self._address("weight", weight, shape=(m.n, k))
            return core().matrix_address(
                weights=at, meta=0, bits=0, group_size=0, type=cpu.TYPES[weight.dtype], n=m.n, bias=bias, out=m.out
            )
        codes, meta = m.weight
        fmt.check_bits(m.bits)
        fmt.check_group_size(m.group_size, k)
        at, meta_at = self._address("codes", codes, torch.uint8), self._address("meta", meta, torch.float16)
        what = f"{m.n} x {k} at {m.bits} bits"
        checks.size_at_least("codes", codes, fmt.codes_bytes(m.n, k, m.bits, "cpu_tile"), what)
        checks.size_at_least("meta", meta, fmt.meta_elements(m.n, k, m.bits, m.group_size, "cpu_tile"), what)
        return core().matrix_address(
            weights=at, meta=meta_at, bits=m.bits, group_size=m.group_size, type=0, n=m.n, bias=bias, out=m.out
        )

    def attend(self, a: Attention) -> None:
        """Apply norms and rotation, write the new entries to the cache, and run attention."""
        shape = tuple(a.keys.shape)
        if len(shape) != 4 or shape[0] != self.batch:
            raise ValueError(f"keys must be [{self.batch}, groups, slots, dim], got {list(shape)}")
        positions, rotary = a.cosines.shape
        self._program.attend(core().attention_address(
            query=a.query, key=a.key, value=a.value, out=a.out, heads=a.heads, groups=shape[1], dim=shape[3],
            rotary=rotary, cosines=self._address("cosines", a.cosines, torch.float32),
            sines=self._address("sines", a.sines, torch.float32, (positions, rotary)), positions=positions,
            keys=self._address("keys", a.keys), values=self._address("values", a.values, a.keys.dtype, shape),
            type=cpu.TYPES[a.keys.dtype], slots=shape[2], scale=a.scale,
            query_norm=self._floats("query_norm", a.query_norm, shape[3]),
            key_norm=self._floats("key_norm", a.key_norm, shape[3]), eps=a.eps,
        ))

    def attend_latent(self, a: LatentAttention) -> None:
        """Fold the queries, write the new entries to the cache, run attention, and expand the values."""
        heads, rank, nope = a.into.shape
        slots, rope = a.ropes.shape[2:]
        v_dim, positions = a.from_.shape[1], a.cosines.shape[0]
        self._program.attend_latent(core().latent_address(
            query=a.query, latent=a.latent, out=a.out, heads=heads, nope=nope, rope=rope, rank=rank, v_dim=v_dim,
            into=self._address("into", a.into),
            from_=self._address("from_", a.from_, a.into.dtype, (heads, v_dim, rank)),
            expand_type=cpu.TYPES[a.into.dtype], norm=self._floats("norm", a.norm, rank), eps=a.eps,
            cosines=self._address("cosines", a.cosines, torch.float32, (positions, rope // 2)),
            sines=self._address("sines", a.sines, torch.float32, (positions, rope // 2)), positions=positions,
            apart=a.apart, latents=self._address("latents", a.latents, shape=(self.batch, 1, slots, rank)),
            ropes=self._address("ropes", a.ropes, a.latents.dtype, (self.batch, 1, slots, rope)),
            type=cpu.TYPES[a.latents.dtype], slots=slots, scale=a.scale,
        ))

    def experts(
        self, logits: int, x: int, out: int, routing: Routing, gate_up: PackedStack, down: PackedStack
    ) -> None:
        """Add to ``out`` the outputs for ``x`` of the experts chosen by ``logits [batch, E]``. The stacks are as in
        :func:`gemq.ops.moe_lowbit_ffn`, in the layout ``cpu_tile``."""
        for name, stack in (("gate_up", gate_up), ("down", down)):
            if stack.layout != "cpu_tile":
                raise ValueError(f"{name} must be in cpu_tile, got {stack.layout}")
            self._held += stack.tensors
        self._program.experts(core().experts_address(
            logits=logits, x=x, out=out, top_k=routing.top_k, sigmoid=routing.scoring == "sigmoid",
            normalize=routing.normalize, epsilon=routing.epsilon, scale=routing.scale,
            bias=self._floats("bias", routing.bias, gate_up.experts),
            group_score=GROUP_SCORES.index(routing.group_score), groups=routing.groups,
            kept_groups=routing.kept_groups, gate_up=cpu.address(gate_up.tensors), down=cpu.address(down.tensors),
            experts=gate_up.experts, intermediate=down.k, group_size=gate_up.group_size,
            down_group_size=down.group_size,
        ))

    def run(self, tokens: Tensor, positions: Tensor, starts: Tensor, slot: int) -> None:
        """Run one step. ``tokens``, ``positions`` in each row's own text, and ``starts``, the first cache slot that is
        not padding, are int64 ``[batch]``. ``slot`` is the index of the new tokens in the cache.

        Raises ``ValueError`` for a number outside the vocabulary, the rotary tables or the cache.
        """
        for name, tensor in (("tokens", tokens), ("positions", positions), ("starts", starts)):
            if tensor.dtype != torch.int64 or tensor.shape != (self.batch,) or not tensor.is_contiguous():
                raise ValueError(f"{name} must be int64 [{self.batch}], got {tensor.dtype} {list(tensor.shape)}")
        self._program.run(
            tokens.data_ptr(), positions.data_ptr(), starts.data_ptr(), slot, torch.get_num_threads()
        )

    def measure(self, on: bool = True) -> None:
        """Start (or stop) summing the time of every operation."""
        self._program.measure(on)

    def seconds(self) -> list[tuple[str, float]]:
        """``(operation, seconds)`` in order, since :meth:`measure`."""
        return self._program.seconds()
