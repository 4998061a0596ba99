"""Measure how much the task loss rises if one expert is quantized: the coefficients of the paper's Eq. 6.

``c[l, i, b] = sum over tokens, d of (g_d * dz_d)^2`` with ``g = dL/dz`` at the output ``z`` of MoE layer ``l`` and
``dz = w_i * (E_i(x) - E_i^b(x))``, the change of that output when expert ``i`` is quantized to ``b`` bits. Only
tokens routed to an expert change, so only they are evaluated. ``L`` is the token-mean cross-entropy of a window;
coefficients are summed over windows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.algorithms.costs import Costs
from gemq.algorithms.gptq import GptqConfig, gptq
from gemq.algorithms.layer_costs import DOWN, GATE_UP, LayerCosts
from gemq.algorithms.layerwise import Routed, expert_hidden, watch_experts
from gemq.algorithms.originals import Originals
from gemq.format import default_group_size
from gemq.models import MoeLayer, MoeModel
from gemq.models.forward import call
from gemq.reference.grid import dequantize_codes, round_to_nearest

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExpertStatistics:
    """Measurements from which allocations are computed, per MoE layer and expert.

    ``costs`` are Eq. 6; ``frequency`` the share of tokens routed to an expert ``[L, E]``, ``weight`` its mean
    routing weight over all tokens ``[L, E]``, ``error`` the Frobenius norm of ``dz`` summed over windows
    ``[L, E, B]`` (these three are what PMQ uses, and None where costs alone were measured).
    """

    costs: Costs
    frequency: np.ndarray | None = None
    weight: np.ndarray | None = None
    error: np.ndarray | None = None


@dataclass
class Capture:
    """One layer, one batch: the experts' call and the gradient at the block's output ``[T, H]``."""

    routed: Routed
    gradient: Tensor | None = None


def capture_batch(moe: MoeModel, ids: Tensor) -> list[Capture]:
    """Forward and backward of a batch of windows ``[B, T]``: by MoE layer the experts' call and the gradient of the sum
    of the windows' mean losses at their output. The caller takes the parameters' gradients away first."""
    captures: list[Capture] = []

    def seen(routed: Routed, output: Tensor) -> None:
        capture = Capture(routed)
        captures.append(capture)
        output.register_hook(lambda g: setattr(capture, "gradient", g.detach()))

    with ExitStack() as stack, torch.enable_grad():
        embeddings = moe.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        stack.callback(handle.remove)
        for layer in moe.moe:
            stack.enter_context(watch_experts(layer, seen))
        logits = call(moe.model, input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (loss / (ids.shape[1] - 1)).backward()
    return captures


PERTURBATIONS = ("gptq", "rtn")


@dataclass(frozen=True)
class Perturbation:
    """Method by which an expert is quantized when its cost is measured.

    ``gptq`` is GPTQ with ``config`` on the expert's own inputs, without the steps that follow the column loop.
    Refinement, compensation and rescaling are skipped: they are too slow for their effect on costs. ``rtn`` rounds to
    nearest with no clipping, as the paper's scripts do.
    """

    kind: str = "gptq"
    config: GptqConfig = field(default_factory=GptqConfig)

    def __post_init__(self) -> None:
        if self.kind not in PERTURBATIONS:
            raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {self.kind!r}")

    def quantized(self, weight: Tensor, widths: tuple[int, ...], inputs: Callable[[], Tensor]) -> list[Tensor]:
        """``weight [n, k]`` quantized to every width and back; ``inputs()`` are its inputs ``[t, k]``."""
        size = default_group_size(weight.shape[-1], self.config.group_size)
        kept = [b for b in widths if b]
        if self.kind == "rtn":
            found = {b: dequantize_codes(*round_to_nearest(weight, b, size), dtype=weight.dtype) for b in kept}
        elif kept:
            x = inputs().float()
            batch = (len(kept), -1, -1)
            codes, meta, _ = gptq(
                weight.expand(batch), (x.T @ x).expand(batch), kept, [len(x)] * len(kept),
                replace(self.config, refine=0, rescale=False), size,
            )
            found = dict(zip(kept, dequantize_codes(codes, meta, weight.dtype), strict=True))
        return [found[b] if b else torch.zeros_like(weight) for b in widths]

    def ffn(
        self, gate_up: Tensor, down: Tensor, widths: tuple[int, ...], x: Callable[[], Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Quantize both projections of an expert at every width and back, calibrated on its inputs ``x() [t, hidden]``.
        """
        first = self.quantized(gate_up, widths, x)
        second = self.quantized(down, widths, lambda: expert_hidden(gate_up, x()))
        return list(zip(first, second, strict=True))


def _expert_costs(
    sums: LayerCosts, expert: int, captures: list[Capture], base: tuple[Tensor, Tensor],
    weights: list[tuple[Tensor, Tensor]], window: int,
) -> None:
    """Add to ``sums`` what one expert's tokens say of its projections ``weights`` at every width."""
    for capture in captures:
        x, token = capture.routed.rows(expert)
        if not len(token):
            continue
        scale = capture.routed.weight_of(expert, token)
        sums.seen(expert, scale)
        gradient, windows = capture.gradient[token].float() * scale, token // window
        inner = expert_hidden(base[0], x)
        out = inner @ base[1].T
        for column, (gate_up, down) in enumerate(weights):
            given = expert_hidden(gate_up, x)
            for part in sums.parts:
                after = (inner if part == DOWN else given) @ (base[1] if part == GATE_UP else down).T
                sums.add(expert, column, part, out - after, gradient, scale, windows)


def _shared_costs(
    layer: MoeLayer, captures: list[Capture], originals: Originals, sums: LayerCosts, candidates: tuple[int, ...],
    perturbation: Perturbation,
) -> None:
    gate, up, down = originals.shared(layer)
    base = (torch.cat([gate, up]), down)
    weights = perturbation.ffn(*base, candidates, lambda: torch.cat([c.routed.x for c in captures]))
    for capture in captures:
        x = capture.routed.x
        out, gradient = expert_hidden(base[0], x) @ base[1].T, capture.gradient.float()
        if layer.shared_gate is not None:
            gradient = gradient * torch.sigmoid(layer.shared_gate(x))
        sums.add_shared((out - expert_hidden(gate_up, x) @ down_b.T for gate_up, down_b in weights), gradient)


def measure(
    moe: MoeModel, windows: Tensor, candidates: tuple[int, ...], originals: Originals, *,
    perturbation: Perturbation | None = None, batch_size: int = 4, progress: Progress | None = None,
    matrices: bool = False,
) -> ExpertStatistics:
    """Measure Eq. 6 for every expert and candidate width, with the routing, inputs and gradients of ``moe`` in its
    current state.

    ``windows`` is int64 ``[N, T]``; ``originals`` are the weights that are perturbed and measured against, so in a
    progression the statistics come from the quantized model but the change is that of the original expert.
    ``perturbation`` says how an expert is quantized for this (default: as it will be, by GPTQ). ``matrices`` measures
    its gate and up projections alone and its down projection alone, too.
    A merged shared expert is measured on every token (with its sigmoid gate where there is one).
    """
    was_training, device = moe.model.training, next(moe.model.parameters()).device
    frozen = [p for p in moe.model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    moe.model.eval()
    batches = distributed.batches(windows, batch_size)
    steps, done = len(batches) + len(moe.moe), 0
    captured: list[list[Capture]] = [[] for _ in moe.moe]
    for batch in batches:
        for index, capture in enumerate(capture_batch(moe, batch.to(device))):
            captured[index].append(capture)
        done += 1
        if progress:
            progress(done, steps)
    rows = []
    with torch.no_grad():
        for layer, captures in zip(moe.moe, captured, strict=True):
            rows.append(LayerCosts.zeros(moe.num_experts, len(candidates), matrices))
            everyones = _of_all(captures, distributed.rounds(windows, batch_size), device)
            _layer_costs(
                layer, everyones, originals, rows[-1], candidates, perturbation or Perturbation(), windows.shape[1]
            )
            rows[-1].complete()
            captures.clear()
            done += 1
            if progress:
                progress(done, steps)
    for p in frozen:
        p.requires_grad_(True)
    moe.model.train(was_training)
    return statistics_of(moe, rows, candidates)


def _of_all(captures: list[Capture], rounds: int, device: torch.device) -> list[Capture]:
    """Collect one layer's captures from all processes, in the order of the batches."""
    found = []
    for turn in range(rounds):
        one = captures[turn] if turn < len(captures) else None
        mine = None if one is None else {"gradient": one.gradient, **one.routed.tensors()}
        for tensors in distributed.exchange(mine, device):
            gradient = tensors["gradient"]
            found.append(Capture(Routed(tensors["x"], tensors["ids"], tensors["weights"]), gradient))
    return found


def _layer_costs(
    layer: MoeLayer, captures: list[Capture], originals: Originals, sums: LayerCosts, candidates: tuple[int, ...],
    perturbation: Perturbation, window: int,
) -> None:
    gate_up, down = originals.experts(layer)
    for e in distributed.share(len(gate_up)):
        base = (gate_up[e], down[e])
        weights = perturbation.ffn(
            *base, candidates, lambda e=e: torch.cat([c.routed.rows(e)[0] for c in captures])
        )
        _expert_costs(sums, e, captures, base, weights, window)
    if layer.shared is not None and distributed.world().first:
        _shared_costs(layer, captures, originals, sums, candidates, perturbation)
    sums.tokens = sum(len(c.routed.x) for c in captures)


def statistics_of(moe: MoeModel, rows: list[LayerCosts], candidates: tuple[int, ...]) -> ExpertStatistics:
    """The statistics of a model from its MoE layers' sums, in layer order. Raises :class:`gemq.errors.NumberError`
    for sums that are not finite."""
    for layer, row in zip(moe.moe, rows, strict=True):
        row.check(layer.index)
    tokens = np.array([[row.tokens] for row in rows], dtype=float)
    costs = Costs(
        candidates=candidates,
        routed=np.stack([row.routed for row in rows]),
        shared=np.stack([row.shared for row in rows]) if moe.moe[0].shared is not None else None,
        shared_multiple=moe.shared_multiple,
        layers=tuple(layer.index for layer in moe.moe),
        matrices=None if rows[0].matrices is None else np.stack([row.matrices for row in rows]),
    )
    return ExpertStatistics(
        costs,
        np.stack([row.count for row in rows]) / tokens,
        np.stack([row.weight for row in rows]) / tokens,
        np.stack([row.error for row in rows]),
    )
