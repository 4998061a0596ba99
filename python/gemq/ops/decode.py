"""A decode step of a whole model on the CPU as one compiled program: buffers, operations, one call a token.

Operations run in the order in which they are added, on buffers ``[batch, width]`` of float32. Weights are read where
they lie: packed ones in the layout ``cpu_tile``, others as float32, bfloat16 or float16; products sum in float32.
Packed products take activations as :func:`gemq.ops.set_cpu_activations` said when the program was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gemq import format as fmt
from gemq._core import core
from gemq.activation import PLAIN, SILU, Activation, Between
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
    the first half of the sines negated (None: nothing turns); ``query_norm``, ``key_norm`` and ``value_norm`` weights
    ``[dim]`` of norms over a head. ``gated``: each head of the query, ``[2 * dim]``, ends with a gate, whose sigmoid
    its output is multiplied by. ``sinks [heads]`` are scores beside those of the keys. ``window``: the token at
    position ``p`` of a row's own text is in slot ``p % slots``, so the slots hold the newest tokens.
    """

    query: int
    key: int
    value: int
    out: int
    heads: int
    keys: Tensor
    values: Tensor
    cosines: Tensor | None
    sines: Tensor | None
    scale: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0
    value_norm: Tensor | None = None
    gated: bool = False
    sinks: Tensor | None = None
    window: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's attention over ``latents [batch, 1, slots, rank]`` and ``ropes [batch, 1, slots, rope]``, into which
    the new ones are written.

    ``query [heads * (nope + rope)]``, ``latent [rank + rope]`` and ``out [heads * v_dim]`` are buffers. ``into [heads,
    rank, nope]`` folds the expansion of keys into the queries, ``from_ [heads, v_dim, rank]`` expands the values.
    ``norm [rank]`` is of new latents; ``cosines`` and ``sines`` float32 ``[positions, rope / 2]`` turn neighbours,
    which end up half the vector ``apart`` or side by side; ``window`` is as in :class:`Attention`.
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
    window: bool = False


class Part(NamedTuple):
    """Numbers of key head ``j``: ``buffer[:, offset + j * stride :]``."""

    buffer: int
    offset: int
    stride: int


@dataclass(frozen=True)
class DeltaNet:
    """Linear attention by the gated delta rule: convolution, state and gated norm.

    ``query`` and ``key`` are ``key_dim`` numbers a key head; ``value`` and ``gate`` are ``value_dim`` numbers, ``beta``
    and ``decay`` one each, for every value head that shares the key head. ``out`` is a buffer ``[value_heads *
    value_dim]``. ``weights`` float32 ``[taps, channels]`` convolve all queries, keys and values. ``rate`` and ``offset
    [value_heads]`` give a state's decay, ``e^(rate * softplus(decay + offset))``; ``norm [value_dim]``. ``past``
    float32 ``[batch, taps - 1, channels]`` and ``state`` float32 ``[batch, value_heads, key_dim, value_dim]`` move on.
    """

    query: Part
    key: Part
    value: Part
    gate: Part
    beta: Part
    decay: Part
    out: int
    key_heads: int
    weights: Tensor
    rate: Tensor
    offset: Tensor
    norm: Tensor
    eps: float
    past: Tensor
    state: Tensor


@dataclass(frozen=True)
class Mamba:
    """Mamba-2 between its two projections. The buffer ``projected`` is ``gate [heads * dim]``, the convolution's
    ``channels`` (``heads * dim``, and twice ``groups * states``) and ``step [heads]``; ``out [heads * dim]``.

    ``weights`` float32 ``[taps, channels]`` and ``bias [channels]`` or None convolve. A step is ``softplus(step +
    offset)``, a decay ``e^(rate * step)``; ``rate``, ``offset`` and ``skip [heads]``; ``norm [heads * dim]`` is one of
    ``groups`` groups. ``past`` float32 ``[batch, taps - 1, channels]`` and ``state`` float32 ``[batch, heads, dim,
    states]`` move on.
    """

    projected: int
    out: int
    groups: int
    weights: Tensor
    bias: Tensor | None
    rate: Tensor
    offset: Tensor
    skip: Tensor
    norm: Tensor
    eps: float
    past: Tensor
    state: Tensor


@dataclass(frozen=True)
class Routing:
    """Rule from a router's logits to experts and weights. It is :func:`gemq.ops.topk_routing` with the additions of
    DeepSeek and GLM4. Only the best ``kept_groups`` of ``groups`` runs of experts take part (``group_score`` "largest"
    or "two_largest" of a run), and ``epsilon`` is added to the sum that weights are divided by. ``expert_scale [E]``
    multiplies the weights at last."""

    top_k: int
    scoring: str = "softmax"
    normalize: bool = True
    epsilon: float = 0.0
    scale: float = 1.0
    bias: Tensor | None = None
    group_score: str | None = None
    groups: int = 1
    kept_groups: int = 1
    expert_scale: Tensor | None = None


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

    def embed(self, table: Tensor, out: int, scale: float = 1.0) -> None:
        """``out`` = ``scale`` times rows of ``table [vocabulary, width]``."""
        at = self._address("table", table)
        self._program.embed(at, cpu.TYPES[table.dtype], table.shape[0], scale, out)

    def embed_packed(
        self, codes: Tensor, meta: Tensor, bits: int, rows: int, width: int, group_size: int, layout: str, out: int,
        scale: float = 1.0,
    ) -> None:
        """``out`` = ``scale`` times rows of the packed table ``[rows, width]``, in ``layout`` canonical or cpu_tile."""
        if layout not in ("canonical", "cpu_tile"):
            raise ValueError(f"layout must be canonical or cpu_tile, got {layout!r}")
        fmt.check_bits(bits)
        fmt.check_group_size(group_size, width)
        at, meta_at = self._address("codes", codes, torch.uint8), self._address("meta", meta, torch.float16)
        what = f"{rows} x {width} at {bits} bits"
        checks.size_at_least("codes", codes, fmt.codes_bytes(rows, width, bits, layout), what)
        checks.size_at_least("meta", meta, fmt.meta_elements(rows, width, bits, group_size, layout), what)
        self._program.embed_packed(at, meta_at, bits, group_size, layout == "cpu_tile", rows, scale, out)

    def norm(
        self, x: int, weight: Tensor, eps: float, out: int, *, onto: bool = False, scale: float = 1.0
    ) -> None:
        """``out = weight * x / sqrt(mean(x^2) + eps)``; ``out`` may be ``x``. ``onto`` adds that to ``out``, and
        multiplies the sum by ``scale``."""
        self._program.norm(x, self._floats("weight", weight, weight.numel()), eps, out, onto, scale)

    def activate(self, gate: int, up: int, out: int, activation: Activation = SILU) -> None:
        """``out`` = the activation of the buffers ``gate`` and ``up``; one without a gate reads ``gate`` alone."""
        self._program.activate(gate, up, out, activation.gated, *activation.gating)

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
        positions, rotary, cosines, sines = 0, 0, 0, 0
        if a.cosines is not None and a.sines is not None:
            positions, rotary = a.cosines.shape
            cosines = self._address("cosines", a.cosines, torch.float32)
            sines = self._address("sines", a.sines, torch.float32, (positions, rotary))
        self._program.attend(core().attention_address(
            query=a.query, key=a.key, value=a.value, out=a.out, heads=a.heads, groups=shape[1], dim=shape[3],
            rotary=rotary, gated=a.gated, cosines=cosines, sines=sines, positions=positions,
            keys=self._address("keys", a.keys), values=self._address("values", a.values, a.keys.dtype, shape),
            type=cpu.TYPES[a.keys.dtype], slots=shape[2], window=a.window, scale=a.scale,
            query_norm=self._floats("query_norm", a.query_norm, shape[3]),
            key_norm=self._floats("key_norm", a.key_norm, shape[3]),
            value_norm=self._floats("value_norm", a.value_norm, shape[3]), eps=a.eps,
            sinks=self._floats("sinks", a.sinks, a.heads),
        ))

    def delta_net(self, d: DeltaNet) -> None:
        """Convolve, move the states on, read them, and apply the gated norm."""
        _, value_heads, key_dim, value_dim = d.state.shape
        taps, channels = d.weights.shape
        expected = 2 * d.key_heads * key_dim + value_heads * value_dim
        if channels != expected:
            raise ValueError(f"weights must be of {expected} channels, got {channels}")
        parts = {
            name: core().part_address(**getattr(d, name)._asdict())
            for name in ("query", "key", "value", "gate", "beta", "decay")
        }
        self._program.delta_net(core().delta_address(
            **parts, out=d.out, key_heads=d.key_heads, value_heads=value_heads, key_dim=key_dim, value_dim=value_dim,
            taps=taps, weights=self._table("weights", d.weights, (taps, channels)),
            rate=self._floats("rate", d.rate, value_heads), offset=self._floats("offset", d.offset, value_heads),
            norm=self._floats("norm", d.norm, value_dim), eps=d.eps,
            **self._states(d.past, d.state, taps, channels),
        ))

    def mamba(self, m: Mamba) -> None:
        """Convolve, move the states on, read them, and apply the gated norm."""
        _, heads, dim, states = m.state.shape
        taps, channels = m.weights.shape
        expected = heads * dim + 2 * m.groups * states
        if channels != expected:
            raise ValueError(f"weights must be of {expected} channels, got {channels}")
        self._program.mamba(core().mamba_address(
            projected=m.projected, out=m.out, heads=heads, dim=dim, groups=m.groups, states=states, taps=taps,
            weights=self._table("weights", m.weights, (taps, channels)),
            bias=self._floats("bias", m.bias, channels), rate=self._floats("rate", m.rate, heads),
            offset=self._floats("offset", m.offset, heads), skip=self._floats("skip", m.skip, heads),
            norm=self._floats("norm", m.norm, heads * dim), eps=m.eps,
            **self._states(m.past, m.state, taps, channels),
        ))

    def _states(self, past: Tensor, state: Tensor, taps: int, channels: int) -> dict[str, int]:
        """Addresses of the tensors that a recurrent operation moves on."""
        return {
            "past": self._address("past", past, torch.float32, (self.batch, taps - 1, channels)),
            "state": self._address("state", state, torch.float32, (self.batch, *state.shape[1:])),
        }

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
            type=cpu.TYPES[a.latents.dtype], slots=slots, window=a.window, scale=a.scale,
        ))

    def experts(
        self, logits: int, x: int, out: int, routing: Routing, gate_up: PackedStack, down: PackedStack,
        between: Between = PLAIN, onto: bool = True,
    ) -> None:
        """Set ``out`` to the outputs for ``x`` of the experts chosen by ``logits [batch, E]``, or add them to it. The
        stacks and what is ``between`` are as in :func:`gemq.ops.moe_lowbit_ffn`, in the layout ``cpu_tile``."""
        for name, stack in (("gate_up", gate_up), ("down", down)):
            if stack.layout != "cpu_tile":
                raise ValueError(f"{name} must be in cpu_tile, got {stack.layout}")
            self._held += stack.tensors
        how, experts = between.activation.gating, gate_up.experts
        rows = between.activation.rows(down.k)
        self._program.experts(core().experts_address(
            logits=logits, x=x, out=out, top_k=routing.top_k, sigmoid=routing.scoring == "sigmoid",
            normalize=routing.normalize, epsilon=routing.epsilon, scale=routing.scale,
            bias=self._floats("bias", routing.bias, experts),
            group_score=GROUP_SCORES.index(routing.group_score), groups=routing.groups,
            kept_groups=routing.kept_groups,
            expert_scale=self._floats("expert_scale", routing.expert_scale, experts),
            gate_up=cpu.address(gate_up.tensors), down=cpu.address(down.tensors), experts=experts,
            intermediate=down.k, group_size=gate_up.group_size, down_group_size=down.group_size,
            gated=between.activation.gated, slope=how.slope, cubic=how.cubic, limit=how.limit, shift=how.shift,
            gate_up_bias=self._table("gate_up_bias", between.gate_up_bias, (experts, rows)),
            down_bias=self._table("down_bias", between.down_bias, (experts, down.n)), onto=onto,
        ))

    def _table(self, name: str, tensor: Tensor | None, shape: tuple[int, int]) -> int:
        """Address of a small matrix as float32, 0 for none."""
        return 0 if tensor is None else self._address(name, tensor.detach().float().contiguous(), shape=shape)

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
