"""Quantize a whole model layer by layer with GPTQ, each layer calibrated on the output of the quantized ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.algorithms.compensation import fit_down
from gemq.algorithms.gptq import GptqConfig, GptqReport, gptq
from gemq.algorithms.layer_report import LayerReport, layer_report
from gemq.algorithms.layerwise import Hessian, Routed, capture_layer_calls, expert_hidden, run_layer, watch_experts
from gemq.algorithms.originals import Originals
from gemq.algorithms.sharing import share_linears, share_stack
from gemq.format import UNQUANTIZED, default_group_size, mean_width
from gemq.models import MoeLayer, MoeModel
from gemq.nn.experts import PROJECTIONS, QuantizedStack
from gemq.reference.grid import dequantize_codes

Progress = Callable[[int, int], None]
OnLayer = Callable[[LayerReport], None]
# quantizer(weights [E, n, k], hessians, bits, config) quantizes a stack of experts in place
Quantizer = Callable[..., tuple[QuantizedStack, dict[int, GptqReport]]]


@dataclass(frozen=True)
class BitPlan:
    """Widths of a model: routed experts and shared expert by decoder layer index, one each for the rest.

    16 leaves attention, dense MLPs, routers or a shared expert as they are. Routers are not quantized with the rest
    but after their tuning (:func:`gemq.algorithms.router_bits.quantize_routers`). ``linears`` are exceptions by module
    path. ``down`` are the widths of the experts' down projections, by layer as ``experts``, where they are not those.
    """

    experts: dict[int, list[int]]
    shared: dict[int, int] = field(default_factory=dict)
    attention: int = 4
    dense: int = 4
    router: int = UNQUANTIZED
    linears: dict[str, int] = field(default_factory=dict)
    down: dict[int, list[int]] = field(default_factory=dict)

    def widths(self, layer: int) -> tuple[list[int], list[int]]:
        """The experts' widths of a decoder layer: of gate and up, and of down."""
        return self.experts[layer], self.down.get(layer, self.experts[layer])

    def mean(self, layer: int) -> float | None:
        """Mean width of the routed experts of a decoder layer; None where it has none."""
        return mean_width(*self.widths(layer)) if layer in self.experts else None


@dataclass
class QuantizedWeights:
    """Quantized weights of a model: per layer index the two expert stacks, per module path ``(codes, meta, bits)``;
    ``reports`` by module path (experts: ``path.expert.projection``)."""

    plan: BitPlan
    group_size: int
    stacks: dict[int, tuple[QuantizedStack, QuantizedStack]] = field(default_factory=dict)
    linears: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    reports: dict[str, GptqReport] = field(default_factory=dict)


def layer_linears(moe: MoeModel, index: int, plan: BitPlan) -> dict[str, tuple[nn.Linear, int]]:
    """The plain linears of a decoder layer that are to be quantized, with their widths."""
    prefix = f"{moe.decoder_path}.layers.{index}."
    found = {p: (m, plan.attention) for p, m in moe.attention.items() if p.startswith(prefix)}
    found |= {p: (m, plan.dense) for p, m in moe.dense.items() if p.startswith(prefix)}
    for layer in moe.moe:
        if layer.index == index and layer.shared is not None:
            width = plan.shared[index]
            for name in ("gate_proj", "up_proj", "down_proj"):
                found[f"{layer.shared_path}.{name}"] = (getattr(layer.shared, name), width)
    found = {path: (module, plan.linears.get(path, width)) for path, (module, width) in found.items()}
    return {path: item for path, item in found.items() if item[1] < UNQUANTIZED}


class _Calibration:
    """Hessians of one decoder layer, gathered while it runs with its original weights.

    Of several processes each runs its own batches and sums the Hessians of its own matrices, over the batches of all
    in their order.
    """

    def __init__(self, moe: MoeModel, linears: dict, layer: MoeLayer | None, affinity: float = 0.0, keep: bool = False):
        self._device = next(moe.model.parameters()).device
        here = distributed.world()
        owned = list(linears)[here.rank :: here.size]
        self.linears = {path: Hessian(linears[path][0].in_features, self._device) for path in owned}
        self.layer, self.affinity = layer, affinity
        self._batch: dict[str, Tensor] = {}
        self.experts = distributed.share(moe.num_experts if layer is not None else 0)
        self.inputs = [Hessian(moe.hidden, self._device) for _ in self.experts]
        self.inner = [] if keep else [Hessian(moe.intermediate, self._device) for _ in self.experts]
        # the experts' calls, for Hessians that depend on quantized projections
        self.kept: list[Routed] | None = [] if keep else None

    def watch(self, modules: dict, stack: ExitStack) -> None:
        for path, (module, _) in modules.items():
            handle = module.register_forward_pre_hook(lambda m, args, p=path: self._batch.update({p: args[0]}))
            stack.callback(handle.remove)
        if self.layer is not None:
            stack.enter_context(watch_experts(self.layer, self._see))

    def _see(self, routed: Routed, output: Tensor) -> None:
        self._batch |= routed.tensors()

    def end_batch(self, ran: bool) -> None:
        """Sum the Hessians of a batch over this process (if it ``ran`` one) and the others."""
        batch, self._batch = self._batch, {}
        for tensors in distributed.exchange(batch if ran else None, self._device):
            for path, hessian in self.linears.items():
                if path in tensors:
                    hessian.add(tensors[path])
            if self.layer is not None:
                self._add_experts(Routed(tensors["x"], tensors["ids"], tensors["weights"]))

    def _rows(self, routed: Routed, expert: int) -> tuple[Tensor, Tensor | float]:
        x, token = routed.rows(expert)
        # x x' weighted by w ** affinity
        return x, routed.weight_of(expert, token).clamp(min=0) ** (self.affinity / 2) if self.affinity else 1.0

    def _add_experts(self, routed: Routed) -> None:
        if self.kept is not None:
            self.kept.append(routed)
        for at, e in enumerate(self.experts):
            x, scale = self._rows(routed, e)
            if len(x):
                self.inputs[at].add(x * scale)
                if self.kept is None:
                    self.inner[at].add(expert_hidden(self.layer.experts.gate_up_proj[e], x) * scale)

    def rows(self) -> Iterator[list[tuple[Tensor, Tensor | float]]]:
        """Batch by batch the inputs of each of this process's experts, and their scales."""
        return ([self._rows(routed, e) for e in self.experts] for routed in self.kept)


# bytes of a batch of matrices on a CPU: memory that is reused is neither mapped nor fetched again
_BATCH_BYTES = 64 << 20


def _batches(matrices: list[int], weights: Tensor) -> list[list[int]]:
    """Matrices ``[n, k]`` to be quantized together: some on a CPU, all on a device that needs many to be busy."""
    n, k = weights.shape[1:]
    # the Hessian and its factor; the weights, what is carried and products
    size = _BATCH_BYTES // (4 * (2 * k * k + 3 * n * k)) if weights.device.type == "cpu" else len(matrices)
    return [matrices[at : at + max(1, size)] for at in range(0, len(matrices), max(1, size))]


def quantize_stack(
    weights: Tensor, hessians: list[Hessian], bits: list[int], config: GptqConfig
) -> tuple[QuantizedStack, dict[int, GptqReport]]:
    """Quantize ``weights [E, n, k]`` in batches of experts above 0 bits, writing the result back in place."""
    size = default_group_size(weights.shape[-1], config.group_size)
    codes: list[Tensor | None] = [None] * len(bits)
    meta: list[Tensor | None] = [None] * len(bits)
    reports: dict[int, GptqReport] = {}
    kept = [e for e, width in enumerate(bits) if width]
    for e in set(range(len(bits))) - set(kept):
        weights[e].zero_()
        reports[e] = GptqReport(hessians[e].tokens, 0.0, "", 1.0)
    for batch in _batches(kept, weights):
        hessian = torch.stack([hessians[e].value for e in batch])
        tokens = [hessians[e].tokens for e in batch]
        found, pairs, report = gptq(weights[batch], hessian, [bits[e] for e in batch], tokens, config, size)
        for at, e in enumerate(batch):
            codes[e], meta[e], reports[e] = found[at], pairs[at], report[at]
            weights[e].copy_(dequantize_codes(found[at], pairs[at], weights.dtype))
    return QuantizedStack(codes, meta, list(bits)), reports


def quantize_linears(
    linears: dict[str, tuple[nn.Linear, int]], hessians: dict[str, Hessian], config: GptqConfig,
    result: QuantizedWeights,
) -> None:
    """Quantize the plain linears of a layer into ``result``, and write the dequantized weights back."""
    for path, (module, width) in linears.items():
        size = default_group_size(module.in_features, config.group_size)
        hessian = hessians[path]
        codes, meta, (report,) = gptq(
            module.weight[None], hessian.value[None], [width], [hessian.tokens], config, size
        )
        result.linears[path] = (codes[0], meta[0], width)
        result.reports[path] = report
        module.weight.copy_(dequantize_codes(codes[0], meta[0], module.weight.dtype))


def _quantize_layer(
    linears: dict, layer: MoeLayer | None, seen: _Calibration, plan: BitPlan, config: GptqConfig,
    result: QuantizedWeights, quantizer: Quantizer,
) -> None:
    own = QuantizedWeights(plan, config.group_size)
    quantize_linears({path: linears[path] for path in seen.linears}, seen.linears, config, own)
    found, reports = share_linears(linears, own.linears, own.reports)
    result.linears |= found
    result.reports |= reports
    if layer is None:
        return
    stacks, part = [], seen.experts
    own = slice(part.start, part.stop)
    original = layer.experts.gate_up_proj[own].clone()
    for name, bits in zip(PROJECTIONS, plan.widths(layer.index), strict=True):
        weights, hessians = getattr(layer.experts, name), seen.inputs if name == "gate_up_proj" else seen.inner
        if name == "down_proj" and config.compensate:
            quantized = layer.experts.gate_up_proj[own]
            hessians = fit_down(weights[own], bits[own], original, quantized, seen.rows(), config.damping)
        # a slice is a view: what is written back reaches the layer
        stack, reports = quantizer(weights[own], hessians, bits[own], config)
        stack, reports = share_stack(weights, bits, part, stack, reports)
        stacks.append(stack)
        for e, report in sorted(reports.items()):
            result.reports[f"{layer.path}.experts.{e}.{name}"] = report
    result.stacks[layer.index] = tuple(stacks)


@torch.no_grad()
def quantize_weights(
    moe: MoeModel, windows: Tensor, plan: BitPlan, originals: Originals, config: GptqConfig | None = None, *,
    batch_size: int = 8, progress: Progress | None = None, on_layer: OnLayer | None = None,
    affinity: float = 0.0, quantizer: Quantizer | None = None,
) -> QuantizedWeights:
    """Quantize the original weights by ``plan`` and leave the dequantized result in the model.

    Layer by layer: the inputs are those that the already quantized layers give; Hessians come from one run of the
    layer with its original weights; after quantization the layer runs again for the next one's inputs. Routers are
    the original ones. ``windows`` is int64 ``[N, T]``. ``progress(done, total)`` counts decoder layers,
    and ``on_layer`` gets the :class:`LayerReport` of each.

    ``affinity`` weights a token in its experts' Hessians by its routing weight to that power: 1 is the affinity-guided
    quantization of MoEQuant (arXiv 2505.03804), 2 the error of the block's output. ``quantizer`` quantizes a stack of
    experts in place of GPTQ.
    """
    config = config or GptqConfig()
    originals.restore()
    was_training = moe.model.training
    moe.model.eval()
    calls = capture_layer_calls(moe, distributed.batches(windows, batch_size))
    hidden = calls.hidden
    result = QuantizedWeights(plan, config.group_size)
    by_index = {layer.index: layer for layer in moe.moe}
    for index, module in enumerate(moe.layers):
        linears, layer = layer_linears(moe, index, plan), by_index.get(index)
        start, known = time.perf_counter(), len(result.reports)
        seen = _Calibration(moe, linears, layer, affinity, keep=config.compensate)
        with ExitStack() as stack:
            seen.watch(linears, stack)
            for turn in range(distributed.rounds(windows, batch_size)):
                if turn < len(hidden):
                    run_layer(module, hidden[turn], calls.kwargs[turn][index])
                seen.end_batch(ran=turn < len(hidden))
        _quantize_layer(linears, layer, seen, plan, config, result, quantizer or quantize_stack)
        hidden = [run_layer(module, h, kw[index]) for h, kw in zip(hidden, calls.kwargs, strict=True)]
        if on_layer:
            # a dict keeps the order of insertion: what was added last is this layer's
            own = list(result.reports.items())[known:]
            on_layer(layer_report(index, plan.mean(index), own, time.perf_counter() - start))
        if progress:
            progress(index + 1, len(moe.layers))
    moe.model.train(was_training)
    return result
