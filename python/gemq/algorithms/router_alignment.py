"""Alternatives to tuning routers on the task loss: align each with its full-precision original, or replay its
decisions.

Alignment is layer by layer, as in EAQuant (arXiv 2506.13329): the router of a layer is trained on what it is given in
the quantized model until its distribution over experts is again the one that the full-precision model had for the
same token. With ``p`` the softmax of the full-precision router's logits and ``q`` that of the quantized model's, it
minimises the token-mean ``KL(p || q) = sum_e p_e * (log p_e - log q_e)``. Routers that turn logits into scores by a
sigmoid are aligned in the same measure. Replay puts the full-precision routers' decisions themselves into the
quantized model: no method, since it runs both models, but what perfect routing would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.algorithms.layerwise import capture_layer_calls, run_layer, watch_experts
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.models import MoeLayer, MoeModel
from gemq.models.forward import call

Progress = Callable[[int, int], None]


@contextmanager
def _router_inputs(layer: MoeLayer, seen: list[Tensor]) -> Iterator[None]:
    """Append the inputs ``[T, H]`` of every call of the layer's router to ``seen``."""
    hidden = layer.router.weight.shape[1]
    handle = layer.router.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].detach().reshape(-1, hidden)),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def router_logits(moe: MoeModel, windows: Tensor, batch_size: int = 4) -> list[Tensor]:
    """Logits of every router's linear for ``windows`` int64 ``[N, T]``: float32 ``[N * T, E]`` per MoE layer."""
    was_training, device = moe.model.training, next(moe.model.parameters()).device
    moe.model.eval()
    inputs: list[list[Tensor]] = [[] for _ in moe.moe]
    found: list[list[Tensor]] = [[] for _ in moe.moe]
    with ExitStack() as stack:
        for layer, seen in zip(moe.moe, inputs, strict=True):
            stack.enter_context(_router_inputs(layer, seen))
        for at in range(0, len(windows), batch_size):
            call(moe.decoder, input_ids=windows[at : at + batch_size].to(device), use_cache=False)
            for layer, seen, logits in zip(moe.moe, inputs, found, strict=True):
                logits += [nn.functional.linear(x.float(), layer.router.weight.float()) for x in seen]
                seen.clear()
    moe.model.train(was_training)
    return [torch.cat(logits) for logits in found]


def routing_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Token-mean ``KL(softmax(target) || softmax(logits))`` in nats of logits ``[T, E]``."""
    return nn.functional.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
    )


def _align(weight: nn.Parameter, x: Tensor, target: Tensor, config: RouterTuningConfig, rows: int) -> None:
    """Train one router on ``x [T, H]`` in steps of ``rows`` tokens; float32 master weights."""
    master = weight.detach().float().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([master], lr=config.learning_rate, weight_decay=config.weight_decay)
    with torch.enable_grad():
        for _ in range(config.epochs):
            for at in range(0, len(x), rows):
                logits = nn.functional.linear(x[at : at + rows].float(), master)
                (master.grad,) = torch.autograd.grad(routing_divergence(target[at : at + rows], logits), master)
                optimizer.step()
    with torch.no_grad():
        weight.copy_(master)


@torch.no_grad()
def align_routers(
    moe: MoeModel, windows: Tensor, targets: list[Tensor], config: RouterTuningConfig | None = None, *,
    batch_size: int = 4, progress: Progress | None = None,
) -> list[tuple[float, float]]:
    """Align every router of a quantized model, in place, to ``targets`` of :func:`router_logits` on the same windows.

    A router's inputs are those that the layers before it give with their routers aligned already. ``config`` is that
    of the tuning on the task loss, a step being ``config.batch_size`` windows. Returns each layer's divergence
    ``(before, after)`` on these inputs. Raises ``ValueError`` if ``targets`` are not of these windows.
    """
    config = config or RouterTuningConfig()
    shape = (windows.numel(), moe.num_experts)
    if len(targets) != len(moe.moe) or any(tuple(t.shape) != shape for t in targets):
        given = [list(t.shape) for t in targets]
        raise ValueError(f"targets must be {len(moe.moe)} tensors {list(shape)}, got {given}")
    by_index = {layer.index: (row, layer) for row, layer in enumerate(moe.moe)}
    was_training, divergences = moe.model.training, []
    moe.model.eval()
    calls = capture_layer_calls(moe, distributed.batches(windows, batch_size))
    hidden = calls.hidden
    for index, module in enumerate(moe.layers):
        if index in by_index:
            row, layer = by_index[index]
            seen: list[Tensor] = []
            with _router_inputs(layer, seen):
                for h, kwargs in zip(hidden, calls.kwargs, strict=True):
                    run_layer(module, h, kwargs[index])
            x, weight = torch.cat(seen), layer.router.weight
            before = float(routing_divergence(targets[row], nn.functional.linear(x.float(), weight.float())))
            _align(weight, x, targets[row], config, config.batch_size * windows.shape[1])
            after = float(routing_divergence(targets[row], nn.functional.linear(x.float(), weight.float())))
            divergences.append((before, after))
        hidden = [run_layer(module, h, kw[index]) for h, kw in zip(hidden, calls.kwargs, strict=True)]
        if progress:
            progress(index + 1, len(moe.layers))
    moe.model.train(was_training)
    return divergences


@contextmanager
def replayed_routing(moe: MoeModel, reference: MoeModel) -> Iterator[None]:
    """Route every token in ``moe.model`` as ``reference.model`` does, with its weights, for the duration of the block.

    Each call of ``moe.model`` first runs ``reference.model``, of the same architecture and in evaluation mode, on the
    same arguments. Use it without a cache of keys and values.
    """
    found: dict[int, object] = {}
    with ExitStack() as stack:
        for row, (own, other) in enumerate(zip(moe.moe, reference.moe, strict=True)):
            handles = [
                other.router.register_forward_hook(lambda m, args, output, row=row: found.__setitem__(row, output)),
                own.router.register_forward_hook(lambda m, args, output, row=row: found.pop(row)),
            ]
            for handle in handles:
                stack.callback(handle.remove)

        def first(module: nn.Module, args: tuple, kwargs: dict) -> None:
            with torch.no_grad():
                reference.model(*args, **kwargs)

        stack.callback(moe.model.register_forward_pre_hook(first, with_kwargs=True).remove)
        yield


@torch.no_grad()
def chosen_experts(moe: MoeModel, windows: Tensor, batch_size: int = 4) -> list[Tensor]:
    """The experts of every token, bool ``[N * T, E]`` per MoE layer, for ``windows`` int64 ``[N, T]``."""
    was_training, device = moe.model.training, next(moe.model.parameters()).device
    moe.model.eval()
    found: list[list[Tensor]] = [[] for _ in moe.moe]
    with ExitStack() as stack:
        for layer, masks in zip(moe.moe, found, strict=True):
            stack.enter_context(watch_experts(layer, lambda routed, output, masks=masks: masks.append(
                torch.zeros(len(routed.x), moe.num_experts, dtype=torch.bool, device=routed.x.device)
                .scatter_(1, routed.ids.long(), True)
            )))
        for at in range(0, len(windows), batch_size):
            call(moe.decoder, input_ids=windows[at : at + batch_size].to(device), use_cache=False)
    moe.model.train(was_training)
    return [torch.cat(masks) for masks in found]


def changed_routes(before: list[Tensor], after: list[Tensor]) -> list[float]:
    """Per MoE layer the share of tokens whose set of experts differs between two of :func:`chosen_experts`."""
    return [float((a != b).any(-1).float().mean()) for a, b in zip(before, after, strict=True)]
