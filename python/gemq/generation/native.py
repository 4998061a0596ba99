"""A decoding step of a packed model on the CPU as one compiled program (:mod:`gemq.ops.decode`).

The same computation as :class:`gemq.generation.step.LeanStep`, with activations in float32 whatever the model's dtype,
one call a token, and no Python between operations. It serves the mixers of :mod:`gemq.generation.native_mixers`, known
routers, experts packed for the CPU and up to 16 rows; other structures keep their step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gemq.generation import known, native_mixers
from gemq.generation.attention import rotary_tables
from gemq.generation.native_program import Writer, out_features
from gemq.generation.routers import routing_of
from gemq.generation.states import State
from gemq.generation.step import LeanStep, Progress, capped
from gemq.models.experts import mlp_activation
from gemq.models.families import shared_expert
from gemq.models.forward import decoder_of
from gemq.nn import LowBitEmbedding, LowBitExperts, LowBitLinear, TiedHead
from gemq.nn.base import profiled
from gemq.ops import checks
from gemq.ops.decode import MAX_ROWS, Routing

_EMBEDDINGS = ("Embedding", "Gemma4TextScaledWordEmbedding")


class NativeStep:
    """See the module. ``progress`` of the first call says where each row's text starts; steps of one model may share
    ``kept``."""

    def __init__(
        self, model: Any, states: list[State], limit: int, batch: int, kept: dict[Any, Any] | None = None
    ):
        decoder, embedding, head = decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings()
        # the program reads the memory of the model and the states
        self.model, self.states = model, states
        rotary = rotary_tables(decoder, limit, torch.float32)
        self.writer = writer = Writer(batch, embedding.embedding_dim, rotary, {} if kept is None else kept)
        self.program, self.cap = writer.program, known.softcap(model)
        self.starts: Tensor | None = None
        self.logits = torch.empty(batch, out_features(head))
        self._embed(embedding)
        for layer, state in zip(decoder.layers, states, strict=False):
            (self._sandwich if known.is_sandwich(layer) else self._layer)(layer, state)
        writer.norm(writer.x, known.final_norm(decoder), writer.y)
        writer.linear(writer.y, {writer.program.buffer(out_features(head), self.logits): head})

    @staticmethod
    def unfit(model: Any, cache: Any, batch: int) -> str | None:
        """Tell why the program would not compute what the model's modules do, or somebody listens to them; None if it
        serves."""
        if batch > MAX_ROWS:
            return f"a batch of {batch} rows is more than {MAX_ROWS}"
        if reason := LeanStep.unfit(model, cache):
            return reason
        reason = _embedding_unfit(model.get_input_embeddings()) or _changed(model)
        if reason := reason or _linear_unfit(model.get_output_embeddings()):
            return reason
        return next(filter(None, map(_layer_unfit, decoder_of(model).layers, cache.layers)), None)

    def __call__(self, tokens: Tensor, progress: Progress) -> Tensor:
        """Logits float32 ``[B, V]`` after ``tokens`` int64 ``[B]``; the next call overwrites them."""
        if self.starts is None:
            self.starts = progress.starts()
        with profiled("gemq::decode_step"):
            self.program.run(tokens, progress.positions, self.starts, progress.length - 1)
        return capped(self.logits, self.cap)

    def _embed(self, embedding: Any) -> None:
        program, x = self.program, self.writer.x
        if not isinstance(embedding, LowBitEmbedding):
            program.embed(embedding.weight.detach().contiguous(), x, _scale(embedding))
            return
        program.embed_packed(
            embedding.weight_codes, embedding.weight_meta, *embedding.matrix, embedding.layout, x, _scale(embedding)
        )

    def _layer(self, layer: Any, state: State) -> None:
        writer, module, feed = self.writer, known.mixer_of(layer), known.feed_of(layer)
        norms = known.layer_norms(layer)
        if module is not None:
            writer.norm(writer.x, norms[0], writer.y)
            out, last = native_mixers.mixer(writer, module, state)
            writer.linear(out, {writer.x: last}, onto=True)
        if feed is None:
            return
        writer.norm(writer.x, norms[-1], writer.y)
        if hasattr(feed, "experts"):
            self._experts(feed)
            return
        firsts = writer.first_of(feed)
        writer.linear(writer.y, firsts)
        writer.linear(writer.inner_of(feed, firsts), {writer.x: feed.down_proj}, onto=True)

    def _experts(self, block: Any) -> None:
        """The router, the shared expert and the experts of a block whose input is ``y``, added to ``x``."""
        writer, experts, router = self.writer, block.experts, _router(block)
        logits, gate = writer.program.buffer(experts.num_experts), -1
        shared: Any = shared_expert(block)[1]
        firsts = {} if shared is None else writer.first_of(shared)
        layers = {logits: router} | firsts
        if shared is not None and hasattr(block, "shared_expert_gate"):
            gate = writer.program.buffer(1)
            layers[gate] = block.shared_expert_gate
        latent, read = getattr(block, "fc1_latent_proj", None), writer.y
        if isinstance(latent, (nn.Linear, LowBitLinear)):
            (read,) = writer.buffers(latent)
            layers[read] = latent
        writer.linear(writer.y, layers)
        if shared is not None:
            inner = writer.inner_of(shared, firsts)
            writer.linear(inner, {writer.x: shared.down_proj}, onto=True, gate=gate)
        if read == writer.y:
            self._routed(experts, router, logits, read, writer.x)
            return
        out = writer.program.buffer(experts.hidden)
        self._routed(experts, router, logits, read, out, onto=False)
        writer.linear(out, {writer.x: block.fc2_latent_proj}, onto=True)

    def _routed(self, experts: Any, router: Any, logits: int, x: int, out: int, onto: bool = True) -> None:
        self.writer.program.experts(
            logits, x, out, cast(Routing, routing_of(router)), experts.stack("gate_up_proj"),
            experts.stack("down_proj"), experts.between(), onto,
        )

    def _sandwich(self, layer: Any, state: State) -> None:
        """A layer of Gemma 4: what goes into ``x`` passes a norm, and the last one multiplies by the layer's factor."""
        writer, hidden = self.writer, self.writer.hidden
        x, y, program = writer.x, writer.y, self.writer.program
        writer.norm(x, layer.input_layernorm, y)
        out, last = native_mixers.mixer(writer, layer.self_attn, state)
        writer.norm(writer.apply(out, last), layer.post_attention_layernorm, x, onto=True)
        writer.norm(x, layer.pre_feedforward_layernorm, y)
        firsts = writer.first_of(layer.mlp)
        writer.linear(y, firsts)
        dense = writer.apply(writer.inner_of(layer.mlp, firsts), layer.mlp.down_proj)
        if layer.enable_moe_block:
            writer.norm(dense, layer.post_feedforward_layernorm_1, dense)
            router = layer.router
            scale = router.scale.detach().float() * router.scalar_root_size
            program.norm(x, scale, router.eps, y)
            logits = writer.apply(y, router.proj)
            writer.norm(x, layer.pre_feedforward_layernorm_2, y)
            routed = program.buffer(hidden)
            self._routed(layer.experts, router, logits, y, routed, onto=False)
            writer.norm(routed, layer.post_feedforward_layernorm_2, dense, onto=True)
        factor = float(layer.layer_scalar)
        writer.norm(dense, layer.post_feedforward_layernorm, x, onto=True, scale=factor)


def _scale(embedding: Any) -> float:
    """The factor of an embedding's rows, as its dtype holds it."""
    packed = isinstance(embedding, LowBitEmbedding)
    scale = embedding.scale if packed else getattr(embedding, "embed_scale", 1.0)
    return float(torch.as_tensor(scale).to(embedding.weight.dtype))


def _router(block: Any) -> Any:
    return block.gate if hasattr(block, "gate") else block.router


def _changed(model: nn.Module) -> str | None:
    """Tell which module's call is replaced or listened to; the program calls none."""
    return next(filter(None, map(known.edited, model.modules())), None)


def _embedding_unfit(layer: Any) -> str | None:
    """Tell why the program does not read an embedding's rows; None if it does."""
    if type(layer) is LowBitEmbedding:
        return None if layer.layout != "gpu_tile" else f"the embedding is packed as {layer.layout}"
    name = type(layer).__name__
    return None if name in _EMBEDDINGS else f"the embedding is a {name}"


def _linear_unfit(layer: Any) -> str | None:
    """Tell why the program does not read a linear's weight; None if it does."""
    if type(layer) in (LowBitLinear, TiedHead):
        return None if layer.layout == "cpu_tile" else f"a linear is packed as {layer.layout}"
    if type(layer) is not nn.Linear:
        return f"a linear is a {type(layer).__name__}"
    weight = layer.weight
    fits = weight.is_cpu and weight.dtype in checks.FLOATS
    return None if fits else f"a linear is {weight.dtype} on {weight.device}"


def _mlp_unfit(mlp: Any) -> str | None:
    if reason := known.unknown(mlp, "mlp"):
        return reason
    activation = mlp_activation(mlp)
    if activation is None:
        return f"an activation is {type(mlp.act_fn).__name__}"
    names = ("gate_proj", "up_proj", "down_proj") if activation.gated else ("up_proj", "down_proj")
    return _first_unfit(getattr(mlp, name) for name in names)


def _first_unfit(linears: Iterable[nn.Module | None]) -> str | None:
    return next(filter(None, map(_linear_unfit, linears)), None)


def _mixer_unfit(module: Any, state: Any) -> str | None:
    """Tell why the program does not read the linears or the cache of a mixer that :class:`LeanStep` knows."""
    if known.kind_of(module) in ("grouped", "latent"):
        keys, values = state.keys, state.values
        # growing buffers are copied to fixed ones first
        apart = hasattr(state, "max_cache_len") and not (keys.is_contiguous() and values.is_contiguous())
        if keys.dtype not in checks.FLOATS or apart:
            return f"the cache is {keys.dtype} of strides {keys.stride()}"
    return _first_unfit(native_mixers.linears(module))


def _experts_unfit(block: Any) -> str | None:
    if type(block.experts) is not LowBitExperts:
        return f"the experts are {type(block.experts).__name__}, not packed"
    if block.experts.layout != "cpu_tile":
        return f"the experts are packed as {block.experts.layout}"
    router = _router(block)
    return None if routing_of(router) is not None else f"{type(router).__name__} was not compared"


def _block_unfit(block: Any) -> str | None:
    if reason := known.unknown(block, "block") or _experts_unfit(block):
        return reason
    shared, gate = shared_expert(block)[1], getattr(block, "shared_expert_gate", None)
    others = (gate, getattr(block, "fc1_latent_proj", None), getattr(block, "fc2_latent_proj", None))
    reason = None if shared is None else _mlp_unfit(shared)
    return reason or _first_unfit(layer for layer in others if layer is not None and type(layer) is not nn.Identity)


def _layer_unfit(layer: Any, state: Any) -> str | None:
    module, feed = known.mixer_of(layer), known.feed_of(layer)
    if module is not None and (reason := _mixer_unfit(module, state)):
        return reason
    if known.is_sandwich(layer) and layer.enable_moe_block:
        return _mlp_unfit(feed) or _experts_unfit(layer) or _linear_unfit(layer.router.proj)
    if feed is None:
        return None
    return _block_unfit(feed) if hasattr(feed, "experts") else _mlp_unfit(feed)
