"""Build a model of a real architecture with random packed weights; its 16-bit experts never exist."""

from __future__ import annotations

import math
import random
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from gemq.bench.architectures import meta_model
from gemq.errors import OutOfMemoryError
from gemq.format import check_bits
from gemq.generation.memory import GIB, cache_bytes_per_token, free_bytes
from gemq.models import Packed, describe, packed_modules, replace_with_packed
from gemq.models.ends import end_widths
from gemq.models.packed import fill_computed_buffers
from gemq.nn import LowBitExperts, LowBitLinear, TiedHead
from gemq.nn.experts import PROJECTIONS
from gemq.packed_config import PackedConfig
from gemq.packed_model import packed_skeleton
from gemq.widths import Widths

Mix = tuple[tuple[int, float], ...]
# standard deviation of weights, as in transformers' initialisation
_STD = 0.02
_CHUNK = 1 << 26


def mix_for(bits: float) -> Mix:
    """Widths and shares for a budget: 2 is all at 2 bits, 2.5 half at 2 and half at 3."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8 (or 16 for the unquantized model), got {bits:g}")
    low = math.floor(bits)
    high = bits - low
    return ((low, 1.0),) if high == 0 else ((low, 1 - high), (low + 1, high))


def check_mix(mix: Mix) -> Mix:
    """Return ``mix`` if its widths are in 0..8 and its shares are positive and sum to 1. Raises ``ValueError``
    otherwise."""
    for width, share in mix:
        check_bits(width, allow_zero=True, name="mix: the width")
        if not share > 0:
            raise ValueError(f"mix: the share of {width} bits must be positive, got {share:g}")
    total = sum(share for _, share in mix)
    if len({w for w, _ in mix}) != len(mix) or abs(total - 1) > 1e-6:
        raise ValueError(f"mix: the shares of different widths must sum to 1, got {total:g}")
    return mix


def widths(mix: Mix, experts: int, seed: int) -> list[int]:
    """A width for every expert of a layer by largest remainders, in random order."""
    exact = [(width, share * experts) for width, share in mix]
    counts = [int(count) for _, count in exact]
    by_remainder = sorted(range(len(mix)), key=lambda i: counts[i] - exact[i][1])
    for index in by_remainder[: experts - sum(counts)]:
        counts[index] += 1
    found = [width for (width, _), count in zip(exact, counts, strict=True) for _ in range(count)]
    random.Random(seed).shuffle(found)
    return found


def packed_plan(
    config: Any, mix: Mix, attention_bits: int, shared_bits: int, head_bits: int = 16, embedding_bits: int = 16
) -> PackedConfig:
    """The widths of every part, as a checkpoint would state them; dense MLPs have those of attention."""
    moe = describe(meta_model(config))
    head, embedding = end_widths(moe.model, head_bits, embedding_bits)
    check_mix(mix)
    layers = [layer.index for layer in moe.moe]
    return PackedConfig(Widths(
        {n: widths(mix, moe.num_experts, n) for n in layers},
        {n: shared_bits for n in layers} if moe.shared_multiple else {},
        attention_bits, attention_bits, head=head, embedding=embedding,
    ))


def build_packed(config: Any, plan: PackedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """The model of ``config`` with random weights of the widths of ``plan``, ready to run on ``device``.

    Packed modules are allocated packed and laid out for their kernels one by one; what stays unquantized is ``dtype``.
    Raises :class:`OutOfMemoryError` with the sizes if it cannot fit.
    """
    model = meta_model(config)
    modules = packed_skeleton(describe(model), plan.widths, plan.group_size, "meta")
    replace_with_packed(model, modules)
    check_fits(model, dtype, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for path, module in packed_skeleton(
        describe(meta_model(config)), plan.widths, plan.group_size, cast(Any, device)
    ).items():
        _fill_packed(module, generator)
        module.prepare()
        replace_with_packed(model, {path: module})
    _materialise(model, dtype, device, generator)
    return model.requires_grad_(False)


def build_unquantized(config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """The 16-bit model with random weights. Raises :class:`OutOfMemoryError` with the sizes if it cannot fit."""
    model = meta_model(config)
    check_fits(model, dtype, device)
    _materialise(model, dtype, device, torch.Generator(device=device).manual_seed(seed))
    return model


def check_fits(model: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of a meta model's tensors with its parameters in ``dtype``; :class:`OutOfMemoryError` above what is
    free."""
    needed = _bytes(model, dtype)
    free = free_bytes(device)
    if free is not None and needed > free:
        cache = cache_bytes_per_token(model) / 2**20
        layers = [_bytes(layer, dtype) for layer in model.model.layers]
        ends = list(accumulate(layers, initial=needed - sum(layers)))
        fitting = sum(end <= free for end in ends) - 1
        what = f"--layers {fitting} would fit" if fitting > 0 else "not one layer would fit"
        raise OutOfMemoryError(
            f"the weights need {needed / GIB:.1f} GiB (and {cache:.2f} MiB for each cached token), "
            f"{free / GIB:.1f} GiB free on {device}: {what}"
        )
    return needed


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    size = torch.empty(0, dtype=dtype).element_size()
    packed = (b for _, m in packed_modules(module) for b in m.buffers(recurse=False))
    return sum(p.numel() * size for p in module.parameters()) + sum(b.numel() * b.element_size() for b in packed)


def _fill_packed(module: Packed, generator: torch.Generator) -> None:
    """Fill packed buffers with random codes, and scales that give weights mean 0 and the standard deviation of a fresh
    model."""
    for buffer in module.buffers(recurse=False):
        if buffer.dtype == torch.uint8:
            _random_bytes(buffer, generator)
    if not isinstance(module, LowBitExperts):
        if not isinstance(module, TiedHead):
            _fill_metadata(module.weight_meta, [(0, module.weight_meta.numel(), module.bits)], generator)
        if isinstance(module, LowBitLinear) and module.bias is not None:
            module.bias.data.zero_()
        return
    for name in PROJECTIONS:
        n, k = module.shape(name)
        size, at, ranges = n * (k // module.group_sizes[name]) * 2, 0, []
        for bits in module.bits[name]:
            if bits:
                ranges.append((at, at + size, bits))
                at += size
        _fill_metadata(module.stored(name)[1], ranges, generator)


def _random_bytes(buffer: Tensor, generator: torch.Generator) -> None:
    whole = buffer.numel() // 8 * 8
    # eight bytes a draw
    buffer[:whole].view(torch.int64).random_(-(2**63), None, generator=generator)
    buffer[whole:].random_(0, 256, generator=generator)


def _fill_metadata(meta: Tensor, ranges: list[tuple[int, int, int]], generator: torch.Generator) -> None:
    for start, end, bits in ranges:
        pairs = meta[start:end].view(-1, 2)
        step = _STD / math.sqrt((4**bits - 1) / 12)
        pairs[:, 0].uniform_(0.8 * step, 1.2 * step, generator=generator)
        pairs[:, 1] = pairs[:, 0] * (-(2**bits - 1) / 2)


def _materialise(model: Any, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Give every parameter that is still on the meta device a random value, module by module."""
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                _random_parameter(value, path, generator)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                # correction biases of routers; rotary frequencies are made anew below
                setattr(module, name, torch.zeros_like(buffer, device=device))
    fill_computed_buffers(model, device)
    model.tie_weights()
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise AssertionError(f"tensors without values: {left[:5]}")


def _random_parameter(value: Tensor, path: str, generator: torch.Generator) -> None:
    if value.dim() == 1:
        value.fill_(1.0 if "norm" in path.rpartition(".")[2] else 0.0)
        return
    flat = value.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        flat[start : start + _CHUNK].normal_(0, _STD, generator=generator)
