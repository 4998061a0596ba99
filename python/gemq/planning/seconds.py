"""Predict how long quantizing takes: operations counted by stage, divided by the rates of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from gemq.planning.machine import Rates
from gemq.planning.memory import Work
from gemq.planning.model_parts import LayerParts, ModelParts


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of ``products`` and ``factors``, weights ``rounded``, bytes ``read`` and written."""

    products: float = 0.0
    factors: float = 0.0
    rounded: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            self.products + other.products, self.factors + other.factors, self.rounded + other.rounded,
            self.moved + other.moved,
        )

    def seconds(self, rates: Rates) -> float:
        """One after another: nothing is taken to overlap."""
        return (self.products / rates.matmul + self.factors / rates.factor + self.rounded / rates.rounding
                + self.moved / rates.disk)


def layer_forward(parts: ModelParts, layer: LayerParts, tokens: int, length: int) -> float:
    """Operations of a decoder layer on ``tokens`` tokens in windows of ``length``: 2 for each weight that a token is
    multiplied by, and the scores and values of attention over the whole window."""
    return tokens * (2 * parts.active(layer) + 4 * length * layer.attention)


def forward(parts: ModelParts, tokens: int, length: int) -> float:
    """Operations of all decoder layers and the head."""
    body = sum(layer_forward(parts, layer, tokens, length) for layer in parts.layers)
    return body + 2 * tokens * parts.hidden * parts.vocabulary


def _gptq(n: int, k: int, count: float = 1.0, factors: float | None = None, products: int = 0) -> Operations:
    # the factor; the lazy updates of later columns, and the output error: n k^2 multiply-adds each, about; products
    # with the Hessian afterwards
    factorised = 8 / 3 * k**3 * (count if factors is None else factors)
    return Operations((3 + 2 * products) * n * k * k * count, factorised, n * k * count)


def measuring(parts: ModelParts, work: Work) -> Operations:
    """Operations of Eq. 6: forward, again, and backward, GPTQ of every expert at every width, and each of these experts
    on its tokens. A Hessian is factorised once for all widths."""
    widths, tokens = sum(b > 0 for b in work.method.candidates), work.tokens
    total = Operations(3 * forward(parts, tokens, work.length))
    for layer in parts.layers:
        if not layer.routed:
            continue
        # a shared expert has a gate where routed ones have
        first = parts.expert_rows // parts.intermediate
        blocks = [(parts.expert_hidden, parts.intermediate, parts.experts, parts.top_k)]
        if layer.mlp:
            blocks.append((parts.hidden, layer.mlp, 1, 1))
        for hidden, inner, count, share in blocks:
            run = 2 * (first + 1) * hidden * inner * tokens * share
            # per matrix two more down projections a width, of routed experts
            evaluated = (first + 3) / (first + 1) if work.method.per_matrix and count > 1 else 1
            total += Operations((1 + evaluated * widths) * run)
            if work.method.perturbation == "gptq":
                total += Operations(run + 2 * tokens * share * (hidden**2 + inner**2))
                total += _gptq(first * inner, hidden, count * widths, count)
                total += _gptq(hidden, inner, count * widths, count)
            else:
                total += Operations(rounded=(first + 1) * hidden * inner * count * widths)
    return total


def quantizing(parts: ModelParts, work: Work) -> Operations:
    """Operations of quantizing: two runs of every layer, Hessians, and GPTQ of every matrix."""
    tokens, total, config = work.tokens, Operations(), work.method.gptq
    # five a round of refinement, two to rescale
    products = 5 * config.refine + 2 * config.rescale
    for layer in parts.layers:
        total += Operations(2 * layer_forward(parts, layer, tokens, work.length))
        for n, k in layer.linears:
            total += Operations(2 * tokens * k * k) + _gptq(n, k, products=products)
        if layer.routed:
            routed = tokens * parts.top_k
            hidden, inner, rows = parts.expert_hidden, parts.intermediate, parts.expert_rows
            total += Operations(routed * (2 * hidden**2 + 2 * inner**2 + 2 * hidden * rows))
            total += _gptq(rows, hidden, parts.experts, products=products)
            total += _gptq(hidden, inner, parts.experts, products=products)
            if config.compensate:
                # the first projection once more, quantized, the second statistic, and its solution
                solved = parts.experts * 4 * hidden * inner**2
                total += Operations(routed * (2 * inner**2 + 2 * hidden * rows) + solved)
    return total


def tuning(parts: ModelParts, work: Work) -> Operations:
    """Operations of router tuning: forward, again, and backward of every window, ``epochs`` times."""
    passes = 3 * work.method.router.epochs
    return Operations(passes * forward(parts, work.tokens, work.length))


def stage_operations(parts: ModelParts, work: Work, keep: str, output: int, element: int) -> dict[str, Operations]:
    """Operations of one budget by stage. ``element`` is the bytes an element of the model's files has."""
    again = 0 if keep == "model" else parts.parameters * element
    activations = len(parts.layers) * work.tokens * parts.hidden * work.element if keep == "layer" else 0
    found = {"load": Operations(moved=parts.parameters * element)} if keep == "model" else {}
    if work.method.measures:
        # forward and reverse sweep; layer inputs written once and read once
        found["measure"] = measuring(parts, work) + Operations(moved=2 * (again + activations))
    found["quantize"] = quantizing(parts, work) + Operations(moved=again)
    if work.method.tune:
        found["tune routers"] = tuning(parts, work)
    found["save"] = Operations(moved=output)
    return found
