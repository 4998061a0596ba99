"""A decoding step of a packed model on the CPU as one compiled program (:mod:`gemq.ops.decode`).

The same computation as :class:`gemq.generation.step.LeanStep`, with activations in float32 whatever the model's dtype,
one call a token, and no Python between operations. It serves grouped and latent attention, known routers, experts
packed for the CPU and up to 16 rows; other structures keep their step.

Unquantized weights are read as they are stored. Those of a float32 model whose every element is a bfloat16 or float16
number, as those of a 16-bit checkpoint are, are read from a 16-bit copy: the same products from half the bytes. The
copy is kept for as long as its layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gemq.generation import known
from gemq.generation.attention import GroupedAttention, LatentAttention, is_latent, rotary_tables
from gemq.generation.routers import routing_of
from gemq.generation.step import LeanStep, Progress
from gemq.models.families import shared_expert
from gemq.nn import LowBitExperts, LowBitLinear
from gemq.nn.base import profiled
from gemq.ops import checks, cpu, decode
from gemq.ops.decode import MAX_ROWS, Attention, DecodeProgram, Matrix, Routing

_MLP = ("gate_proj", "up_proj", "down_proj")
# elements that are compared at a time: their float32 form stays in a near cache
_COMPARED = 1 << 17
_narrowed: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def as_stored(linear: Any) -> Tensor:
    """The weight of ``linear``, from a 16-bit copy where that holds every element exactly.

    A copy of an earlier call is compared with the weight before it is used again: weights may have changed.
    """
    weight: Tensor = linear.weight.detach().contiguous()
    if weight.dtype != torch.float32:
        return weight
    held = _narrowed.pop(linear, None)
    if held is None or held.shape != weight.shape or not _holds(held, weight):
        held = _narrow(weight)
    if held is None:
        return weight
    _narrowed[linear] = held
    return held


def _narrow(weight: Tensor) -> Tensor | None:
    for dtype in (torch.bfloat16, torch.float16):
        # a few rows tell in most cases
        if not torch.equal(weight[:4].to(dtype).float(), weight[:4]):
            continue
        narrow = cpu.empty(weight.numel(), dtype).view(weight.shape).copy_(weight)
        if _holds(narrow, weight):
            return narrow
    return None


def _holds(narrow: Tensor, weight: Tensor) -> bool:
    """Return True if all elements are equal. Parts are compared in turn: the float32 form of the whole would be another
    copy."""
    rows = max(_COMPARED // weight.shape[1], 1)
    pairs = zip(narrow.split(rows), weight.split(rows), strict=True)
    return all(torch.equal(part.float(), rows) for part, rows in pairs)


class NativeStep:
    """See the module. ``progress.seen`` of the first call says where each row's text starts."""

    def __init__(self, model: Any, cache: Any, limit: int, batch: int):
        decoder = model.get_decoder()
        # the program reads the memory of the model and the cache
        self.model, self.cache = model, cache
        self.program = program = DecodeProgram(batch)
        self.starts: Tensor | None = None
        hidden = decoder.embed_tokens.embedding_dim
        self.logits = torch.empty(batch, model.lm_head.out_features)
        self.x, self.y = program.buffer(hidden), program.buffer(hidden)
        self.rotary = rotary_tables(decoder, limit, torch.float32)
        program.embed(decoder.embed_tokens.weight.detach().contiguous(), self.x)
        for layer, state in zip(decoder.layers, cache.layers, strict=False):
            self._norm(self.x, layer.input_layernorm, self.y)
            out = (self._latent if is_latent(layer.self_attn) else self._grouped)(layer.self_attn, state)
            self._linear(out, {self.x: layer.self_attn.o_proj}, onto=True)
            self._norm(self.x, layer.post_attention_layernorm, self.y)
            if hasattr(layer.mlp, "experts"):
                self._experts(layer.mlp)
            else:
                gate, up = self._buffers(layer.mlp.gate_proj, layer.mlp.up_proj)
                self._linear(self.y, {gate: layer.mlp.gate_proj, up: layer.mlp.up_proj})
                self._down(layer.mlp, gate, up)
        self._norm(self.x, decoder.norm, self.y)
        self._linear(self.y, {program.buffer(model.lm_head.out_features, self.logits): model.lm_head})

    @staticmethod
    def unfit(model: Any, cache: Any, batch: int) -> str | None:
        """Tell why the program would not compute what the model's modules do, or somebody listens to them; None if it
        serves."""
        if batch > MAX_ROWS:
            return f"a batch of {batch} rows is more than {MAX_ROWS}"
        if reason := LeanStep.unfit(model, cache):
            return reason
        decoder = model.get_decoder()
        if type(decoder.embed_tokens) is not nn.Embedding:
            return f"the embedding is a {type(decoder.embed_tokens).__name__}"
        if reason := _changed(model) or _linear_unfit(model.lm_head):
            return reason
        return next(filter(None, map(_layer_unfit, decoder.layers, cache.layers)), None)

    def __call__(self, tokens: Tensor, progress: Progress) -> Tensor:
        """Logits float32 ``[B, V]`` after ``tokens`` int64 ``[B]``; the next call overwrites them."""
        if self.starts is None:
            seen = progress.seen
            # padding is on the left
            self.starts = torch.zeros_like(tokens) if seen is None else (~seen).sum(1)
        with profiled("gemq::decode_step"):
            self.program.run(tokens, progress.positions, self.starts, progress.length - 1)
        return self.logits

    def _buffers(self, *linears: Any) -> list[int]:
        return [self.program.buffer(linear.out_features) for linear in linears]

    def _norm(self, x: int, norm: Any, out: int) -> None:
        self.program.norm(x, norm.weight, norm.variance_epsilon, out)

    def _linear(self, x: int, layers: dict[int, Any], onto: bool = False, gate: int = -1) -> None:
        """The layers that share ``x``, by the buffer of their result."""
        matrices = [_matrix(layer, out) for out, layer in layers.items()]
        width = _in_features(next(iter(layers.values())))
        self.program.linear(x, width, matrices, onto, gate)

    def _grouped(self, module: Any, state: Any) -> int:
        program, known = self.program, GroupedAttention(module, state.keys, state.values)
        query, key, value = self._buffers(module.q_proj, module.k_proj, module.v_proj)
        out = program.buffer(module.o_proj.in_features)
        self._linear(self.y, {query: module.q_proj, key: module.k_proj, value: module.v_proj})
        norms: dict[str, Any] = {}
        if known.norm_all:
            self._norm(query, known.q_norm, query)
            self._norm(key, known.k_norm, key)
        elif known.q_norm is not None:
            norms = {"query_norm": known.q_norm.weight, "key_norm": known.k_norm.weight,
                     "eps": known.q_norm.variance_epsilon}
        cosines, sines = self.rotary
        heads = module.q_proj.out_features // known.head_dim
        program.attend(Attention(
            query, key, value, out, heads, state.keys, state.values, cosines, sines, known.scale, **norms
        ))
        return out

    def _latent(self, module: Any, state: Any) -> int:
        program, heads, compressed = self.program, module.num_heads, module.q_lora_rank is not None
        first = module.q_a_proj if compressed else module.q_proj
        query, latent = self._buffers(first, module.kv_a_proj_with_mqa)
        self._linear(self.y, {query: first, latent: module.kv_a_proj_with_mqa})
        if compressed:
            self._norm(query, module.q_a_layernorm, query)
            (whole,) = self._buffers(module.q_b_proj)
            self._linear(query, {whole: module.q_b_proj})
            query = whole
        known = LatentAttention(module, state.keys, state.values)
        out = program.buffer(heads * known.v_dim)
        half = known.rope // 2
        cosines, sines = self.rotary[0][:, :half], self.rotary[1][:, -half:]
        program.attend_latent(decode.LatentAttention(
            query, latent, out, known.into_latent.transpose(1, 2).contiguous(),
            known.from_latent.transpose(1, 2).contiguous(), module.kv_a_layernorm.weight,
            module.kv_a_layernorm.variance_epsilon, cosines.contiguous(), sines.contiguous(), known.apart, state.keys,
            state.values, known.scale,
        ))
        return out

    def _experts(self, block: Any) -> None:
        program, experts, rule = self.program, block.experts, cast(Routing, routing_of(block.gate))
        logits = program.buffer(experts.num_experts)
        shared: Any = shared_expert(block)[1]
        layers, gate = {logits: block.gate}, -1
        if shared is not None:
            first, second = self._buffers(shared.gate_proj, shared.up_proj)
            layers |= {first: shared.gate_proj, second: shared.up_proj}
        if shared is not None and hasattr(block, "shared_expert_gate"):
            gate = program.buffer(1)
            layers[gate] = block.shared_expert_gate
        self._linear(self.y, layers)
        if shared is not None:
            self._down(shared, first, second, gate)
        program.experts(logits, self.y, self.x, rule, experts.stack("gate_up_proj"), experts.stack("down_proj"))

    def _down(self, mlp: Any, first: int, second: int, gate: int = -1) -> None:
        inner = self.program.buffer(mlp.gate_proj.out_features)
        self.program.silu_mul(first, second, inner)
        self._linear(inner, {self.x: mlp.down_proj}, onto=True, gate=gate)


def _matrix(layer: Any, out: int) -> Matrix:
    bias = getattr(layer, "bias", None)
    if isinstance(layer, LowBitLinear):
        packed = (layer.weight_codes, layer.weight_meta)
        return Matrix(out, layer.out_features, packed, layer.bits, layer.group_size, bias)
    return Matrix(out, layer.weight.shape[0], as_stored(layer), bias=bias)


def _in_features(layer: Any) -> int:
    return layer.in_features if isinstance(layer, LowBitLinear) else layer.weight.shape[1]


def _changed(model: nn.Module) -> str | None:
    """Tell which module's call is replaced or listened to; the program calls none."""
    return next(filter(None, map(known.edited, model.modules())), None)


def _linear_unfit(layer: Any) -> str | None:
    """Tell why the program does not read a linear's weight; None if it does."""
    if type(layer) is LowBitLinear:
        return None if layer.layout == "cpu_tile" else f"a linear is packed as {layer.layout}"
    if type(layer) is not nn.Linear:
        return f"a linear is a {type(layer).__name__}"
    weight = layer.weight
    fits = weight.is_cpu and weight.dtype in checks.FLOATS
    return None if fits else f"a linear is {weight.dtype} on {weight.device}"


def _mlp_unfit(mlp: Any) -> str | None:
    if reason := known.unknown(mlp, "mlp"):
        return reason
    activation = type(mlp.act_fn).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        return f"an activation is {activation}, not SiLU"
    return _first_unfit(getattr(mlp, name) for name in _MLP)


def _first_unfit(linears: Iterable[nn.Module | None]) -> str | None:
    return next(filter(None, map(_linear_unfit, linears)), None)


def _attention_unfit(module: Any, keys: Tensor, values: Tensor) -> str | None:
    """Tell why the program does not read the linears or the cache of an attention that :class:`LeanStep` knows."""
    if keys.dtype not in checks.FLOATS or not (keys.is_contiguous() and values.is_contiguous()):
        return f"the cache is {keys.dtype} of strides {keys.stride()}"
    if not is_latent(module):
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    else:
        names = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        names += ["q_proj"] if module.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    return _first_unfit(getattr(module, name) for name in names)


def _layer_unfit(layer: Any, state: Any) -> str | None:
    mlp = layer.mlp
    if reason := _attention_unfit(layer.self_attn, state.keys, state.values):
        return reason
    if not hasattr(mlp, "experts"):
        return _mlp_unfit(mlp)
    if reason := known.unknown(mlp, "block"):
        return reason
    if type(mlp.experts) is not LowBitExperts:
        return f"the experts are {type(mlp.experts).__name__}, not packed"
    if mlp.experts.layout != "cpu_tile":
        return f"the experts are packed as {mlp.experts.layout}"
    if routing_of(mlp.gate) is None:
        return f"{type(mlp.gate).__name__} was not compared"
    shared, gate = shared_expert(mlp)[1], getattr(mlp, "shared_expert_gate", None)
    return (None if shared is None else _mlp_unfit(shared)) or (None if gate is None else _linear_unfit(gate))
