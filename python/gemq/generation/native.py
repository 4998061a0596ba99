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

import torch
from torch import Tensor, nn

from gemq.generation.attention import GroupedAttention, LatentAttention, rotary_tables
from gemq.generation.routers import routing_of
from gemq.generation.step import LeanStep, Progress
from gemq.nn import LowBitExperts, LowBitLinear
from gemq.nn.base import profiled
from gemq.ops import checks, cpu, decode
from gemq.ops.decode import MAX_ROWS, Attention, DecodeProgram, Matrix

_MLP = ("gate_proj", "up_proj", "down_proj")
# elements that are compared at a time: their float32 form stays in a near cache
_COMPARED = 1 << 17
_narrowed: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def as_stored(linear: nn.Module) -> Tensor:
    """The weight of ``linear``, from a 16-bit copy where that holds every element exactly.

    A copy of an earlier call is compared with the weight before it is used again: weights may have changed.
    """
    weight = linear.weight.detach().contiguous()
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
    """Whether every element is the same, compared in parts: the float32 form of the whole would be another copy."""
    rows = max(_COMPARED // weight.shape[1], 1)
    pairs = zip(narrow.split(rows), weight.split(rows), strict=True)
    return all(torch.equal(part.float(), rows) for part, rows in pairs)


class NativeStep:
    """See the module. ``progress.seen`` of the first call says where each row's text starts."""

    def __init__(self, model: nn.Module, cache, limit: int, batch: int):
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
            latent = hasattr(layer.self_attn, "kv_lora_rank")
            out = (self._latent if latent else self._grouped)(layer.self_attn, state)
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
    def fits(model: nn.Module, cache, batch: int) -> bool:
        """Whether the program computes what the model's modules would, and nothing listens to them."""
        if batch > MAX_ROWS or not LeanStep.fits(model, cache):
            return False
        decoder = model.get_decoder()
        if type(decoder.embed_tokens) is not nn.Embedding or not _is_linear(model.lm_head) or _hooked(model):
            return False
        return all(map(_known, decoder.layers, cache.layers))

    def __call__(self, tokens: Tensor, progress: Progress) -> Tensor:
        """Logits float32 ``[B, V]`` after ``tokens`` int64 ``[B]``; the next call overwrites them."""
        if self.starts is None:
            seen = progress.seen
            # padding is on the left
            self.starts = torch.zeros_like(tokens) if seen is None else (~seen).sum(1)
        with profiled("gemq::decode_step"):
            self.program.run(tokens, progress.positions, self.starts, progress.length - 1)
        return self.logits

    def _buffers(self, *linears: nn.Module) -> list[int]:
        return [self.program.buffer(linear.out_features) for linear in linears]

    def _norm(self, x: int, norm: nn.Module, out: int) -> None:
        self.program.norm(x, norm.weight, norm.variance_epsilon, out)

    def _linear(self, x: int, layers: dict[int, nn.Module], onto: bool = False, gate: int = -1) -> None:
        """The layers that share ``x``, by the buffer of their result."""
        matrices = [_matrix(layer, out) for out, layer in layers.items()]
        width = _in_features(next(iter(layers.values())))
        self.program.linear(x, width, matrices, onto, gate)

    def _grouped(self, module: nn.Module, state) -> int:
        program, known = self.program, GroupedAttention(module, state.keys, state.values)
        query, key, value = self._buffers(module.q_proj, module.k_proj, module.v_proj)
        out = program.buffer(module.o_proj.in_features)
        self._linear(self.y, {query: module.q_proj, key: module.k_proj, value: module.v_proj})
        norms = {}
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

    def _latent(self, module: nn.Module, state) -> int:
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

    def _experts(self, block: nn.Module) -> None:
        program, experts, rule = self.program, block.experts, routing_of(block.gate)
        logits = program.buffer(experts.num_experts)
        layers, shared, gate = {logits: block.gate}, _shared(block), -1
        if shared is not None:
            first, second = self._buffers(shared.gate_proj, shared.up_proj)
            layers |= {first: shared.gate_proj, second: shared.up_proj}
        if hasattr(block, "shared_expert_gate"):
            gate = program.buffer(1)
            layers[gate] = block.shared_expert_gate
        self._linear(self.y, layers)
        if shared is not None:
            self._down(shared, first, second, gate)
        sizes = experts.group_sizes
        program.experts(
            logits, self.y, self.x, rule, experts.stack("gate_up_proj"), experts.stack("down_proj"),
            experts.intermediate, sizes["gate_up_proj"], sizes["down_proj"],
        )

    def _down(self, mlp: nn.Module, first: int, second: int, gate: int = -1) -> None:
        inner = self.program.buffer(mlp.gate_proj.out_features)
        self.program.silu_mul(first, second, inner)
        self._linear(inner, {self.x: mlp.down_proj}, onto=True, gate=gate)


def _matrix(layer: nn.Module, out: int) -> Matrix:
    bias = getattr(layer, "bias", None)
    if isinstance(layer, LowBitLinear):
        packed = (layer.weight_codes, layer.weight_meta)
        return Matrix(out, layer.out_features, packed, layer.bits, layer.group_size, bias)
    return Matrix(out, layer.weight.shape[0], as_stored(layer), bias=bias)


def _in_features(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, LowBitLinear) else layer.weight.shape[1]


def _shared(block: nn.Module) -> nn.Module | None:
    return getattr(block, "shared_experts", getattr(block, "shared_expert", None))


def _hooked(model: nn.Module) -> bool:
    """Whether somebody waits to be told of a module's call; the program calls none."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _is_linear(layer: nn.Module | None) -> bool:
    if isinstance(layer, LowBitLinear):
        return layer.layout == "cpu_tile"
    return type(layer) is nn.Linear and layer.weight.is_cpu and layer.weight.dtype in checks.FLOATS


def _is_mlp(mlp: nn.Module) -> bool:
    activation = type(getattr(mlp, "act_fn", None)).__name__
    return activation in ("SiLU", "SiLUActivation") and all(_is_linear(getattr(mlp, n, None)) for n in _MLP)


def _is_attention(module: nn.Module, keys: Tensor, values: Tensor) -> bool:
    """Whether an attention of a form that :class:`LeanStep` knows has linears and a cache that the program reads."""
    if keys.dtype not in checks.FLOATS or not (keys.is_contiguous() and values.is_contiguous()):
        return False
    if GroupedAttention.fits(module, keys, values):
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    else:
        names = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        names += ["q_proj"] if module.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    return all(_is_linear(getattr(module, name)) for name in names)


def _known(layer: nn.Module, state) -> bool:
    mlp = layer.mlp
    if not _is_attention(layer.self_attn, state.keys, state.values):
        return False
    experts = getattr(mlp, "experts", None)
    if experts is None:
        return _is_mlp(mlp)
    shared, gate = _shared(mlp), getattr(mlp, "shared_expert_gate", None)
    return (
        isinstance(experts, LowBitExperts) and experts.layout == "cpu_tile" and routing_of(mlp.gate) is not None
        and (shared is None or _is_mlp(shared)) and (gate is None or _is_linear(gate))
    )
