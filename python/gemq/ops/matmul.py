"""The low-bit matrix products as torch custom ops: validation, fake implementations, autograd."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from gemq import format as fmt
from gemq.activation import SILU, Activation, Between, parse_activation
from gemq.ops import backends, batching, checks, cpu
from gemq.ops.packed_stack import PackedStack, Stack


@torch.library.custom_op("gemq::moe_lowbit_gemm", mutates_args=())
def _moe_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None, n: int, group_size: int, layout: str,
) -> Tensor:
    stack = (qweight, meta, expert_bits, expert_offsets, meta_offsets)
    return backends.moe_gemm(x, stack, topk_ids, topk_weights, n, group_size, layout)


@_moe_gemm.register_fake
def _(x, qweight, meta, expert_bits, expert_offsets, meta_offsets, topk_ids, topk_weights, n, group_size, layout):
    tokens, top_k = topk_ids.shape
    return x.new_empty((tokens, top_k, n) if topk_weights is None else (tokens, n))


@torch.library.custom_op("gemq::moe_lowbit_gemm_backward", mutates_args=())
def _moe_gemm_backward(
    grad: Tensor, x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor,
    meta_offsets: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, n: int, group_size: int, layout: str,
) -> tuple[Tensor, Tensor]:
    stack = (qweight, meta, expert_bits, expert_offsets, meta_offsets)
    return backends.moe_gemm_backward(grad, x, stack, topk_ids, topk_weights, n, group_size, layout)


@_moe_gemm_backward.register_fake
def _(grad, x, qweight, meta, expert_bits, expert_offsets, meta_offsets, topk_ids, topk_weights, n, group_size,
      layout):
    weights = topk_ids.new_empty(0, dtype=torch.float32) if topk_weights is None else topk_weights
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _save_gemm(ctx, inputs, output):
    *tensors, n, group_size, layout = inputs
    ctx.save_for_backward(*tensors)
    ctx.static = (n, group_size, layout)


def _gemm_vjp(ctx, grad):
    *tensors, topk_weights = ctx.saved_tensors
    grad_x, grad_weights = _moe_gemm_backward(grad.contiguous(), *tensors, topk_weights, *ctx.static)
    no_grads = (None,) * 6
    return (grad_x, *no_grads, None if topk_weights is None else grad_weights, None, None, None)


_moe_gemm.register_autograd(_gemm_vjp, setup_context=_save_gemm)
_moe_gemm.register_vmap(batching.routed(_moe_gemm, 6))


@torch.library.custom_op("gemq::moe_lowbit_ffn", mutates_args=())
def _moe_ffn(
    x: Tensor, gu_qweight: Tensor, gu_meta: Tensor, gu_bits: Tensor, gu_offsets: Tensor, gu_meta_offsets: Tensor,
    down_qweight: Tensor, down_meta: Tensor, down_bits: Tensor, down_offsets: Tensor, down_meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor, intermediate: int, group_size: int, down_group_size: int, layout: str,
    activation: str = SILU.name, alpha: float = SILU.alpha, limit: float | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
) -> Tensor:
    gate_up = (gu_qweight, gu_meta, gu_bits, gu_offsets, gu_meta_offsets)
    down = (down_qweight, down_meta, down_bits, down_offsets, down_meta_offsets)
    between = Between(Activation(activation, alpha, limit), gate_up_bias, down_bias)
    return backends.moe_ffn(
        x, gate_up, down, topk_ids, topk_weights, intermediate, group_size, down_group_size, layout, between
    )


@_moe_ffn.register_fake
def _(x, *args):
    return x.new_empty(x.shape)


def _save_ffn(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:13], *inputs[20:])
    ctx.static = inputs[13:20]


def _ffn_vjp(ctx, grad):
    x, *stacks, topk_ids, topk_weights, gate_up_bias, down_bias = ctx.saved_tensors
    gate_up, down = stacks[:5], stacks[5:]
    intermediate, group_size, down_group_size, layout, *activation = ctx.static
    activation = Activation(*activation)
    rows = activation.rows(intermediate)
    # float32 between the two products, as in the forward pass
    hidden = _moe_gemm(x.float(), *gate_up, topk_ids, None, rows, group_size, layout)
    hidden = hidden if gate_up_bias is None else hidden + backends.bias_of(gate_up_bias, topk_ids, gate_up)
    act, grad = activation(hidden), grad.contiguous()
    grad_act, grad_weights = _moe_gemm_backward(
        grad, act, *down, topk_ids, topk_weights, x.shape[-1], down_group_size, layout
    )
    if down_bias is not None:
        more = (grad[:, None].float() * backends.bias_of(down_bias, topk_ids, down)).sum(-1)
        grad_weights = grad_weights + more.to(grad_weights.dtype)
    grad_x, _ = _moe_gemm_backward(
        activation.backward(hidden, grad_act), x, *gate_up, topk_ids, None, rows, group_size, layout
    )
    return (grad_x, *(None,) * 11, grad_weights, *(None,) * 9)


_moe_ffn.register_autograd(_ffn_vjp, setup_context=_save_ffn)
_moe_ffn.register_vmap(batching.routed(_moe_ffn, 11))


@torch.library.custom_op("gemq::lowbit_gemm", mutates_args=())
def _lowbit_gemm(x: Tensor, qweight: Tensor, meta: Tensor, bits: int, n: int, group_size: int, layout: str) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return backends.dense_gemm(flat, qweight, meta, bits, n, group_size, layout).reshape(*x.shape[:-1], n)


@_lowbit_gemm.register_fake
def _(x, qweight, meta, bits, n, group_size, layout):
    return x.new_empty(*x.shape[:-1], n)


@torch.library.custom_op("gemq::lowbit_gemm_backward", mutates_args=())
def _lowbit_gemm_backward(
    grad: Tensor, qweight: Tensor, meta: Tensor, bits: int, k: int, group_size: int, layout: str
) -> Tensor:
    weight = backends.dense_weight(qweight, meta, bits, grad.shape[-1], k, group_size, layout, torch.float32)
    return (grad.float() @ weight).to(grad.dtype)


@_lowbit_gemm_backward.register_fake
def _(grad, qweight, meta, bits, k, group_size, layout):
    return grad.new_empty(*grad.shape[:-1], k)


def _save_dense(ctx, inputs, output):
    x, qweight, meta, bits, _, group_size, layout = inputs
    ctx.save_for_backward(qweight, meta)
    ctx.static = (bits, x.shape[-1], group_size, layout)


def _dense_vjp(ctx, grad):
    grad_x = _lowbit_gemm_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.static)
    return grad_x, None, None, None, None, None, None


_lowbit_gemm.register_autograd(_dense_vjp, setup_context=_save_dense)
_lowbit_gemm.register_vmap(batching.dense(_lowbit_gemm))


def _check_stack(name: str, stack: Stack, n: int, k: int, group_size: int, layout: str, device: torch.device) -> None:
    """Check a stack's shapes, dtypes and layout. A stack that passed before is recognised and not checked again."""
    shape = (n, k, group_size, layout, device)
    tracing = torch.compiler.is_compiling()
    if not tracing and checks.SEEN.knows(stack, shape):
        return
    if len(stack) != 5:
        fields = "(qweight, meta, expert_bits, expert_offsets, meta_offsets)"
        raise ValueError(f"{name} must be {fields}, got {len(stack)} entries")
    qweight, meta, bits, offsets, meta_offsets = stack
    fmt.check_group_size(group_size, k)
    if isinstance(n, float):
        raise TypeError(f"{name}: the number of output features must be an integer, got {n}")
    if n <= 0:
        raise ValueError(f"{name}: the number of output features must be positive, got {n}")
    checks.tensor(f"{name} qweight", qweight, dtype=torch.uint8, dim=1, device=device)
    checks.tensor(f"{name} meta", meta, dtype=torch.float16, dim=1, device=device)
    checks.tensor(f"{name} expert_bits", bits, dtype=torch.int32, dim=1, device=device)
    for label, value in (("expert_offsets", offsets), ("meta_offsets", meta_offsets)):
        checks.tensor(f"{name} {label}", value, dtype=torch.int64, dim=1, device=device)
        if value.numel() != bits.numel():
            raise ValueError(f"{name} {label} has {value.numel()} entries for {bits.numel()} experts")
    backends.check(layout, device)
    if not tracing:
        checks.SEEN.add(stack, shape)


@overload
def moe_lowbit_gemm(x: Tensor, stack: PackedStack, topk_ids: Tensor, topk_weights: Tensor | None = None) -> Tensor: ...


@overload
def moe_lowbit_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, *, n: int, group_size: int = 128,
    layout: str = "canonical",
) -> Tensor: ...


def moe_lowbit_gemm(x, *arguments, **named):
    """Each token times the packed matrices of its experts, all widths in one call.

    Called ``moe_lowbit_gemm(x, stack, topk_ids, topk_weights)`` with a :class:`PackedStack`, or with what one holds:
    ``moe_lowbit_gemm(x, qweight, meta, expert_bits, expert_offsets, meta_offsets, topk_ids, topk_weights, n=n, ...)``.

    Args:
        x: ``[T, k]``, or ``[T, top_k, k]`` with one row per slot (a down projection); float32, float16, bfloat16.
        qweight: uint8, all experts' codes in ``layout`` (:mod:`gemq.format`).
        meta: float16, all experts' ``(s, m)`` in ``layout``.
        expert_bits: int32 ``[E]``, the width of each expert; 0 contributes zero.
        expert_offsets: int64 ``[E]``, bytes into ``qweight``.
        meta_offsets: int64 ``[E]``, elements into ``meta``.
        topk_ids: int32 or int64 ``[T, top_k]``; ids below 0 or at least ``E`` contribute zero.
        topk_weights: ``[T, top_k]`` or None. Scaling of routed experts belongs into these weights.
        n: output features of every expert.
        group_size: columns that share one ``(s, m)``: 32, 64 or 128.
        layout: ``canonical``, ``cpu_tile`` or ``gpu_tile``; see :mod:`gemq.ops`.
        stack: these tensors, sizes and the layout as one.

    Returns:
        ``[T, top_k, n]``, or the weighted sum ``[T, n]`` when ``topk_weights`` is given; in the dtype of ``x``.
        Differentiable with respect to ``x`` and ``topk_weights``.

    Raises:
        TypeError, ValueError: a dtype, shape, device, stride, layout or group size out of the above; on the CPU also
            a width above 8 or an offset that leads out of the buffers. On CUDA the tables are trusted, as reading
            them would wait for the device.
    """
    if "stack" in named or (arguments and isinstance(arguments[0], PackedStack)):
        return _gemm_of_stack(x, *arguments, **named)
    return _gemm_of_tensors(x, *arguments, **named)


def _gemm_of_stack(x: Tensor, stack: PackedStack, topk_ids: Tensor, topk_weights: Tensor | None = None) -> Tensor:
    _check_columns("x", x, "stack", stack.k)
    return _gemm_of_tensors(
        x, *stack.tensors, topk_ids, topk_weights, n=stack.n, group_size=stack.group_size, layout=stack.layout
    )


def _check_columns(name: str, x: Tensor, stack: str, k: int) -> None:
    if isinstance(x, Tensor) and x.dim() and x.shape[-1] != k:
        raise ValueError(f"{name} has {x.shape[-1]} columns, {stack} {k}")


def _gemm_of_tensors(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, *, n: int, group_size: int = 128,
    layout: str = "canonical",
) -> Tensor:
    checks.tensor("x", x, dtype=checks.FLOATS, dim=(2, 3), contiguous=False)
    checks.routing(x, topk_ids, topk_weights)
    if x.dim() == 3 and x.shape[1] != topk_ids.shape[1]:
        raise ValueError(f"x has {x.shape[1]} rows a token, topk_ids {topk_ids.shape[1]} slots")
    stack = (qweight, meta, expert_bits, expert_offsets, meta_offsets)
    _check_stack("weight", stack, n, x.shape[-1], group_size, layout, x.device)
    if layout == "cpu_tile" and checks.unwatched(x, topk_ids, topk_weights):
        return cpu.moe_gemm(x.contiguous(), stack, topk_ids, topk_weights, n, group_size)
    checks.no_tangent(x, topk_weights)
    return _moe_gemm(x.contiguous(), *stack, topk_ids, topk_weights, n, group_size, layout)


def _block_of_stacks(
    x: Tensor, gate_up: PackedStack, down: PackedStack, given: dict[str, int | str | None], activation: Activation
) -> tuple[Stack, Stack, int, int, int, str]:
    """``(gate_up, down, intermediate, group_size, down_group_size, layout)`` as the flat form has them."""
    for name, stack in (("gate_up", gate_up), ("down", down)):
        if not isinstance(stack, PackedStack):
            raise TypeError(f"{name} must be a PackedStack as the other stack is, got {type(stack).__name__}")
    _check_columns("x", x, "gate_up", gate_up.k)
    if (gate_up.n, gate_up.k) != (activation.rows(down.k), down.n):
        with_a = "" if activation.name == "silu" else f" with {activation.name} between them"
        raise ValueError(
            f"gate_up {gate_up.n} x {gate_up.k} and down {down.n} x {down.k} are of no one block{with_a}"
        )
    if gate_up.layout != down.layout:
        raise ValueError(f"gate_up is in {gate_up.layout}, down in {down.layout}")
    held = {
        "intermediate": down.k, "group_size": gate_up.group_size, "down_group_size": down.group_size,
        "layout": gate_up.layout,
    }
    for name, value in given.items():
        if value is not None and value != held[name]:
            raise ValueError(f"{name}={value} was given, but the stacks say {held[name]}")
    return gate_up.tensors, down.tensors, down.k, gate_up.group_size, down.group_size, gate_up.layout


@overload
def moe_lowbit_ffn(
    x: Tensor, gate_up: PackedStack, down: PackedStack, topk_ids: Tensor, topk_weights: Tensor, *,
    activation: Activation | str = "silu", gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
) -> Tensor: ...


@overload
def moe_lowbit_ffn(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, *, intermediate: int,
    group_size: int = 128, down_group_size: int | None = None, layout: str = "canonical",
    activation: Activation | str = "silu", gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
) -> Tensor: ...


def moe_lowbit_ffn(
    x, gate_up, down, topk_ids, topk_weights, *, intermediate=None, group_size=None, down_group_size=None, layout=None,
    activation="silu", gate_up_bias=None, down_bias=None,
):
    """The whole expert block: ``sum_j w_j * down_j(SiLU(gate_j(x)) * up_j(x))``, or with another activation.

    Args:
        x: ``[T, hidden]``; float32, float16 or bfloat16.
        gate_up: a :class:`PackedStack`, each expert ``2 * intermediate`` x ``hidden`` with the gate rows first
            (``intermediate`` rows with an activation that has no gate); or its five tensors
            ``(qweight, meta, expert_bits, expert_offsets, meta_offsets)``.
        down: the same for ``hidden`` x ``intermediate``.
        topk_ids: int32 or int64 ``[T, top_k]``; ids below 0 or at least ``E`` contribute zero.
        topk_weights: ``[T, top_k]``.
        intermediate: the experts' inner width; like what follows, for stacks given as five tensors.
        group_size: of ``gate_up`` (default 128); ``down_group_size`` (default the same) of ``down``.
        layout: of both stacks (default ``canonical``).
        activation: between the products, a name or an :class:`Activation` (:mod:`gemq.activation`).
        gate_up_bias: float32 ``[E, rows of gate_up]``, or None; where an expert has no bits, its bias counts as zero.
        down_bias: float32 ``[E, hidden]``, or None.

    Returns:
        ``[T, hidden]`` in the dtype of ``x``. Differentiable with respect to ``x`` and ``topk_weights``.

    Raises:
        TypeError, ValueError: a dtype, shape, device, stride, layout or group size out of the above.
    """
    checks.tensor("x", x, dtype=checks.FLOATS, dim=2, contiguous=False)
    activation = parse_activation(activation)
    if topk_weights is None:
        raise TypeError("topk_weights must be a tensor, got None")
    checks.routing(x, topk_ids, topk_weights)
    if isinstance(gate_up, PackedStack) or isinstance(down, PackedStack):
        given = {
            "intermediate": intermediate, "group_size": group_size, "down_group_size": down_group_size, "layout": layout
        }
        gate_up, down, intermediate, group_size, down_group_size, layout = _block_of_stacks(
            x, gate_up, down, given, activation
        )
    else:
        if intermediate is None:
            raise TypeError("moe_lowbit_ffn() needs intermediate with stacks of five tensors")
        group_size, layout = group_size or 128, layout or "canonical"
    down_group_size = down_group_size or group_size
    rows = activation.rows(intermediate)
    _check_stack("gate_up", gate_up, rows, x.shape[-1], group_size, layout, x.device)
    _check_stack("down", down, x.shape[-1], intermediate, down_group_size, layout, x.device)
    if gate_up[2].numel() != down[2].numel():
        raise ValueError(f"gate_up has {gate_up[2].numel()} experts, down {down[2].numel()}")
    checks.bias("gate_up_bias", gate_up_bias, gate_up[2].numel(), rows, x.device)
    checks.bias("down_bias", down_bias, down[2].numel(), x.shape[-1], x.device)
    if layout == "cpu_tile" and checks.unwatched(x, topk_ids, topk_weights):
        return cpu.moe_ffn(
            x.contiguous(), gate_up, down, topk_ids, topk_weights, intermediate, group_size, down_group_size,
            Between(activation, gate_up_bias, down_bias),
        )
    checks.no_tangent(x, topk_weights)
    return _moe_ffn(
        x.contiguous(), *gate_up, *down, topk_ids, topk_weights, intermediate, group_size, down_group_size, layout,
        activation.name, activation.alpha, activation.limit, gate_up_bias, down_bias,
    )


def lowbit_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, *, bits: int, n: int, group_size: int = 128, layout: str = "canonical"
) -> Tensor:
    """``x @ W.T`` for one packed matrix ``n`` x ``k``.

    Args:
        x: ``[..., k]``; float32, float16 or bfloat16.
        qweight: uint8 flat codes of exactly one matrix in ``layout``; ``meta`` float16 likewise.
        bits: 1..8.

    Returns ``[..., n]`` in the dtype of ``x``, differentiable with respect to ``x``. Raises ``TypeError`` or
    ``ValueError`` for a dtype, shape, device, stride, layout or size out of this.
    """
    checks.tensor("x", x, dtype=checks.FLOATS, contiguous=False)
    if x.dim() == 0:
        raise ValueError("x must have at least 1 dimension, got a scalar")
    fmt.check_bits(bits)
    if isinstance(n, float):
        raise TypeError(f"n, the number of output features, must be an integer, got {n}")
    if n <= 0:
        raise ValueError(f"n, the number of output features, must be positive, got {n}")
    k = x.shape[-1]
    fmt.check_group_size(group_size, k)
    checks.tensor("qweight", qweight, dtype=torch.uint8, dim=1, device=x.device)
    checks.tensor("meta", meta, dtype=torch.float16, dim=1, device=x.device)
    fmt.check_layout(layout)
    checks.size_at_least("qweight", qweight, fmt.codes_bytes(n, k, bits, layout), f"{n} x {k} at {bits} bits")
    checks.size_at_least("meta", meta, fmt.meta_elements(n, k, bits, group_size, layout), f"{n} x {k}")
    backends.check(layout, x.device)
    if layout == "cpu_tile" and checks.unwatched(x, qweight, meta):
        flat = x.reshape(-1, k).contiguous()
        return cpu.dense_gemm(flat, qweight, meta, bits, n, group_size).view(*x.shape[:-1], n)
    checks.no_tangent(x)
    return _lowbit_gemm(x.contiguous(), qweight, meta, bits, n, group_size, layout)
