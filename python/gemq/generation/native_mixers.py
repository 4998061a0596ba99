"""Attention, linear attention and Mamba of known classes as operations of a decode program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from gemq.generation import known
from gemq.generation.attention import GroupedAttention, LatentAttention
from gemq.generation.native_program import Writer, out_features
from gemq.generation.norms import epsilon, factors
from gemq.generation.states import KeyValues, Numbers, Recurrent, State, numbers
from gemq.ops import decode
from gemq.ops.decode import Attention, Mamba, Part


def mixer(writer: Writer, module: Any, state: State) -> tuple[int, Any]:
    """Write a mixer up to its last projection; returns the buffer of that one's input, and that projection."""
    return _WRITERS[cast(str, known.kind_of(module))](writer, module, state)


def linears(module: Any) -> list[Any]:
    """The linears of a mixer that the program reads."""
    names = [*_LINEARS[cast(str, known.kind_of(module))]]
    return [found for name in names if (found := getattr(module, name, None)) is not None]


def _grouped(writer: Writer, module: Any, state: KeyValues) -> tuple[int, Any]:
    program, form = writer.program, GroupedAttention(module, state)
    own = getattr(module, "v_proj", None) is not None
    layers = [module.q_proj, module.k_proj, *([module.v_proj] if own else [])]
    query, key, *rest = buffers = writer.buffers(*layers)
    writer.linear(writer.y, dict(zip(buffers, layers, strict=True)))
    norms: dict[str, Any] = {}
    if form.norm_all:
        for buffer, norm, layer in ((query, form.q_norm, module.q_proj), (key, form.k_norm, module.k_proj)):
            writer.norm(buffer, norm, buffer, out_features(layer))
    elif form.q_norm is not None:
        norms = {
            name: factors(norm, form.head_dim)
            for name, norm in (("query_norm", form.q_norm), ("key_norm", form.k_norm), ("value_norm", form.v_norm))
            if norm is not None
        } | {"eps": epsilon(form.q_norm)}
    cosines, sines = writer.rotary.get(form.kind, writer.rotary.get(None, (None, None)))
    heads = module.o_proj.in_features // form.head_dim
    out = program.buffer(module.o_proj.in_features)
    program.attend(Attention(
        query, key, rest[0] if rest else key, out, heads, state.keys, state.values, cosines, sines, form.scale,
        gated=form.gated, sinks=form.sinks, window=state.window, **norms,
    ))
    return out, module.o_proj


def _latent(writer: Writer, module: Any, state: KeyValues) -> tuple[int, Any]:
    program, heads, compressed = writer.program, module.num_heads, module.q_lora_rank is not None
    first = module.q_a_proj if compressed else module.q_proj
    query, latent = writer.buffers(first, module.kv_a_proj_with_mqa)
    writer.linear(writer.y, {query: first, latent: module.kv_a_proj_with_mqa})
    if compressed:
        writer.norm(query, module.q_a_layernorm, query, out_features(first))
        query = writer.apply(query, module.q_b_proj)
    form, (into, back) = _folded(writer, module, state)
    out = program.buffer(heads * form.v_dim)
    half = form.rope // 2
    cosines, sines = writer.rotary[None]
    program.attend_latent(decode.LatentAttention(
        query, latent, out, into, back, module.kv_a_layernorm.weight, module.kv_a_layernorm.variance_epsilon,
        cosines[:, :half].contiguous(), sines[:, -half:].contiguous(), form.apart, state.keys, state.values, form.scale,
        state.window,
    ))
    return out, module.o_proj


def _folded(writer: Writer, module: Any, state: KeyValues) -> tuple[LatentAttention, tuple[Tensor, Tensor]]:
    """An attention, and the expansions of its keys and values, which programs of one model share."""
    if module not in writer.kept:
        form = LatentAttention(module, state)
        parts = (form.into_latent.transpose(1, 2).contiguous(), form.from_latent.transpose(1, 2).contiguous())
        writer.kept[module] = form, parts
    return writer.kept[module]


def _delta(writer: Writer, module: Any, state: Recurrent | Numbers) -> tuple[int, Any]:
    shared, key = module.num_v_heads // module.num_k_heads, module.head_k_dim
    values = shared * module.head_v_dim
    if hasattr(module, "in_proj_qkv"):
        layers = (module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a)
        mixed, gate, beta, decay = writer.buffers(*layers)
        writer.linear(writer.y, dict(zip((mixed, gate, beta, decay), layers, strict=True)))
        parts = (
            Part(mixed, 0, key), Part(mixed, module.key_dim, key), Part(mixed, 2 * module.key_dim, values),
            Part(gate, 0, values), Part(beta, 0, shared), Part(decay, 0, shared),
        )
    else:
        mixed, small = writer.buffers(module.in_proj_qkvz, module.in_proj_ba)
        writer.linear(writer.y, {mixed: module.in_proj_qkvz, small: module.in_proj_ba})
        stride = 2 * key + 2 * values
        parts = (
            Part(mixed, 0, stride), Part(mixed, key, stride), Part(mixed, 2 * key, stride),
            Part(mixed, 2 * key + values, stride), Part(small, 0, 2 * shared), Part(small, shared, 2 * shared),
        )
    out = writer.program.buffer(module.value_dim)
    past, moved = numbers(state)
    writer.program.delta_net(decode.DeltaNet(
        *parts, out=out, key_heads=module.num_k_heads, weights=_taps(module), rate=_rate(module),
        offset=module.dt_bias, norm=module.norm.weight, eps=module.norm.variance_epsilon, past=past,
        state=moved,
    ))
    return out, module.out_proj


def _mamba(writer: Writer, module: Any, state: Recurrent | Numbers) -> tuple[int, Any]:
    projected = writer.apply(writer.y, module.in_proj)
    out = writer.program.buffer(module.intermediate_size)
    writer.program.mamba(Mamba(
        projected, out, module.n_groups, _taps(module), module.conv1d.bias, _rate(module), module.dt_bias, module.D,
        module.norm.weight, module.norm.variance_epsilon, *numbers(state),
    ))
    return out, module.out_proj


def _taps(module: Any) -> Tensor:
    """The convolution's weights, tap by tap."""
    return module.conv1d.weight.detach().float()[:, 0].T.contiguous()


def _rate(module: Any) -> Tensor:
    return -module.A_log.detach().float().exp()


_WRITERS: dict[str, Callable[[Writer, Any, Any], tuple[int, Any]]] = {
    "grouped": _grouped, "latent": _latent, "delta": _delta, "mamba": _mamba,
}
_LINEARS = {
    "grouped": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "latent": ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_proj", "q_a_proj", "q_b_proj"),
    "delta": ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    "mamba": ("in_proj", "out_proj"),
}
