"""Options of the method, and the widths that it gives a model for a budget."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemq import distributed
from gemq.algorithms.allocation import ACCOUNTINGS, PER_LAYER, Allocation, solve, wants_matrices
from gemq.algorithms.baselines import global_pmq, pmq, uniform
from gemq.algorithms.given_allocation import GivenAllocation
from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.perturbation import PERTURBATIONS
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.algorithms.tensor_bits import TensorBits, resolve
from gemq.algorithms.two_step import two_step
from gemq.format import UNQUANTIZED
from gemq.models import MoeModel
from gemq.models.ends import check_end_bits, end_widths
from gemq.widths import Widths

METHODS = ("gemq", "pmq", "uniform", "global-pmq", "two-step", "fisher")
# they choose no width for shared experts: those have shared_bits, or the widest candidate, as PMQ gives them
ROUTED_ONLY = ("pmq", "global-pmq", "two-step")
ROUTER_METHODS = ("loss", "alignment")
ESTIMATES = ("fp", "quantized", "tuned")


@dataclass(frozen=True)
class MethodConfig:
    """Options of the method: everything that decides the result besides the model and the text.

    ``budgets`` are bits per expert, visited from the highest to the lowest. ``estimate`` is the model on which the
    coefficients of the second and later budgets are measured: the full-precision one, the one quantized for the
    previous budget, or that with tuned routers (the default when routers are tuned). ``shared_bits`` None lets the
    program choose, and ``accounting`` says what they count of the budget then
    (:func:`gemq.algorithms.allocation.total_bits`); 16 keeps shared experts, attention or dense MLPs unquantized.
    ``router_bits`` below 16 rounds the routers after their tuning. ``head_bits`` and ``embedding_bits``, 4..8 or 16,
    round head and embedding to nearest before all else; where the two are one matrix, either holds for both.
    ``tensor_bits`` are widths by name pattern that win over those of linears and over the allocation, which does not
    know of them: the mean that is reached may leave the budget.

    ``granularity`` says what gets a width of its own by method gemq, an ``expert``, or its gate and up projections and
    its down projection (``matrix``); ``auto`` is the latter unless experts may have 0 bits. The other methods are of
    experts.

    In the paper's terms: ``candidates`` is Table 18, ``per_layer`` (none, c2, c3, c2c3) Table 17, ``attention_bits``
    Table 19, ``router_bits`` Table 20.

    ``given`` are widths decided elsewhere: nothing is measured or solved, ``method``, ``candidates`` and ``per_layer``
    do not matter, and the one budget is the largest mean that is accepted.

    Methods to compare with: ``pmq`` (a program for each layer), ``global-pmq`` (its coefficients in one program),
    ``two-step`` (Eq. 6, layers first, then experts), ``fisher`` (:mod:`gemq.algorithms.fisher` instead of Eq. 6).
    ``router_method`` tunes routers on the task ``loss``, or layer by layer towards the full-precision ones
    (``alignment``, :mod:`gemq.algorithms.router_alignment`). ``affinity`` is that of
    :func:`gemq.engine.quantize.quantize`; costs are measured without it.
    """

    budgets: tuple[float, ...] = (2.5,)
    method: str = "gemq"
    candidates: tuple[int, ...] = (1, 2, 3)
    granularity: str = "auto"
    per_layer: str = "none"
    attention_bits: int = 4
    dense_bits: int = 4
    head_bits: int = UNQUANTIZED
    embedding_bits: int = UNQUANTIZED
    shared_bits: int | None = None
    accounting: str = "exact"
    router_bits: int = 16
    tune: bool = True
    router_method: str = "loss"
    affinity: float = 0.0
    estimate: str = "tuned"
    perturbation: str = "gptq"
    batch_size: int = 4
    gptq: GptqConfig = field(default_factory=GptqConfig)
    router: RouterTuningConfig = field(default_factory=RouterTuningConfig)
    given: GivenAllocation | None = None
    tensor_bits: tuple[TensorBits, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.router_method not in ROUTER_METHODS:
            raise ValueError(f"router_method must be one of {', '.join(ROUTER_METHODS)}, got {self.router_method!r}")
        if not 0 <= self.affinity <= 4:
            raise ValueError(f"affinity must be an exponent in 0..4, got {self.affinity}")
        if self.estimate not in ESTIMATES:
            raise ValueError(f"estimate must be one of {', '.join(ESTIMATES)}, got {self.estimate!r}")
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {self.perturbation!r}")
        if self.per_layer not in PER_LAYER:
            raise ValueError(f"per_layer must be one of {', '.join(PER_LAYER)}, got {self.per_layer!r}")
        if self.granularity == "matrix" and self.method != "gemq":
            raise ValueError(f"granularity 'matrix' is for method gemq, got {self.method!r}, which is of experts")
        wants_matrices(self.granularity, self.candidates)
        if self.accounting not in ACCOUNTINGS:
            raise ValueError(f"accounting must be one of {', '.join(ACCOUNTINGS)}, got {self.accounting!r}")
        if not self.budgets or any(not 0 <= b <= 8 for b in self.budgets):
            raise ValueError(f"budgets must be bits per expert in 0..8, got {self.budgets}")
        for name in ("attention_bits", "dense_bits", "shared_bits", "router_bits"):
            width = getattr(self, name)
            if width is not None and width != 16 and not 1 <= width <= 8:
                raise ValueError(f"{name} must be 1..8, or 16 for unquantized, got {width}")
        check_end_bits("head_bits", self.head_bits)
        check_end_bits("embedding_bits", self.embedding_bits)
        if self.given is not None and len(self.budgets) != 1:
            raise ValueError(f"a given allocation is for one budget, got {self.budgets}")

    @property
    def measures(self) -> bool:
        """True if the widths are computed from measured coefficients."""
        return self.method != "uniform" and self.given is None

    @property
    def per_matrix(self) -> bool:
        """True if the costs of gate and up, and those of down, are measured separately, to give them widths of their
        own."""
        return self.method == "gemq" and wants_matrices(self.granularity, self.candidates)

    @property
    def name(self) -> str:
        """Name of the method that decided the widths, as a checkpoint records it; ``given`` for a given allocation."""
        return self.method if self.given is None else "given"


def needs_whole_model(config: MethodConfig) -> list[str]:
    """List the options of ``config`` that hold the whole model in the memory of one process."""
    return ["method 'fisher'"] if config.measures and config.method == "fisher" else []


def one_process_only(config: MethodConfig) -> list[str]:
    """List the options of ``config`` that several processes cannot share."""
    aligned = config.tune and config.router_method == "alignment"
    return [*needs_whole_model(config), *(["router_method 'alignment'"] if aligned else [])]


def widths_of(moe: MoeModel, allocation: Allocation, config: MethodConfig) -> Widths:
    """The widths of the whole model: those that ``allocation`` gives experts, and the method's for the rest."""
    indices = [layer.index for layer in moe.moe]
    shared: dict[int, int] = {}
    if moe.moe[0].shared is not None:
        if config.shared_bits is not None:
            shared = dict.fromkeys(indices, config.shared_bits)
        elif allocation.shared_bits is not None:
            shared = {index: int(allocation.shared_bits[row]) for row, index in enumerate(indices)}
        else:
            # an allocation decided elsewhere that says nothing of them
            shared = dict.fromkeys(indices, max(config.candidates))
    experts, down = (
        {} if bits is None else {index: [int(b) for b in bits[row]] for row, index in enumerate(indices)}
        for bits in (allocation.bits, allocation.down_bits)
    )
    head, embedding = end_widths(moe.model, config.head_bits, config.embedding_bits)
    return Widths(
        experts, shared, config.attention_bits, config.dense_bits, config.router_bits,
        down={} if down == experts else down, head=head, embedding=embedding,
    )


def overridden(
    moe: MoeModel, allocation: Allocation, config: MethodConfig
) -> tuple[Allocation, Widths]:
    """Apply ``config.tensor_bits`` to an allocation and its widths."""
    experts, linears = resolve(moe, config.tensor_bits)
    widths = widths_of(moe, allocation, config).overridden(experts, linears)
    if experts:
        down = _table(moe, widths.down) if widths.down else None
        # the summed coefficients are those of other widths now
        allocation = replace(
            allocation, bits=_table(moe, widths.experts), down_bits=down, objective=float("nan"), gap=float("nan")
        )
    return allocation, widths


def _table(moe: MoeModel, widths: dict[int, list[int]]) -> np.ndarray:
    """Widths by decoder layer as an array ``[L, E]``."""
    return np.array([widths[layer.index] for layer in moe.moe], dtype=np.int64)


def allocate(moe: MoeModel, statistics: ExpertStatistics | None, budget: float, config: MethodConfig) -> Allocation:
    """Widths for ``budget`` by the configured method; ``uniform`` and a given allocation need no statistics. Rank 0
    solves, for all."""
    if config.given is not None:
        return config.given.fit(moe, budget, config.shared_bits if moe.moe[0].shared is not None else None)
    if config.method == "uniform":
        found = uniform(len(moe.moe), moe.num_experts, budget)
        return _with_shared(moe, found, budget, config, np.maximum(found.bits[:, 0], 1))
    if statistics is None:
        raise ValueError(f"method {config.method!r} needs statistics")
    if config.method in ROUTED_ONLY:
        found = distributed.on_first(lambda: _routed(statistics, routed_budget(moe, budget, config), config))
        return _with_shared(moe, found, budget, config, np.full(len(moe.moe), max(config.candidates)))
    has_shared = moe.moe[0].shared is not None
    fixed = config.shared_bits if has_shared else None
    options: dict[str, Any] = {
        "per_layer": config.per_layer, "fixed_shared_bits": fixed, "accounting": config.accounting,
        "granularity": config.granularity,
    }
    return distributed.on_first(lambda: solve(statistics.costs, budget, **options))


def routed_budget(moe: MoeModel, budget: float, config: MethodConfig) -> float:
    """Bits per routed expert that a method of :data:`ROUTED_ONLY` may spend, so that ``budget`` is the mean of all
    experts, shared ones included; with ``shared_bits`` given it is of the routed ones."""
    shared = moe.shared_multiple
    if not shared or config.shared_bits is not None:
        return budget
    return (budget * (moe.num_experts + shared) - shared * max(config.candidates)) / moe.num_experts


def _routed(statistics: ExpertStatistics, budget: float, config: MethodConfig) -> Allocation:
    """Widths of routed experts by a method that chooses no others."""
    if config.method == "two-step":
        return two_step(statistics.costs, budget, per_layer=config.per_layer)
    # these are there: costs alone are refused for the methods that follow
    sums: tuple[Any, Any, Any] = (statistics.frequency, statistics.weight, statistics.error)
    if config.method == "pmq":
        return pmq(*sums, config.candidates, budget)
    return global_pmq(*sums, config.candidates, budget, per_layer=config.per_layer)


def _with_shared(
    moe: MoeModel, allocation: Allocation, budget: float, config: MethodConfig, widths: np.ndarray
) -> Allocation:
    """Add the ``widths [L]`` of shared experts, counted in the budget, where the model has some and the method is to
    choose."""
    if not moe.shared_multiple or config.shared_bits is not None:
        return allocation
    return replace(allocation, shared_bits=widths, shared_multiple=moe.shared_multiple, budget=float(budget))


def must_measure(config: MethodConfig, step: int, statistics: ExpertStatistics | None) -> bool:
    """Return True if budget number ``step`` (from 0) needs coefficients that have not been measured yet."""
    if not config.measures:
        return False
    return statistics is None or (step > 0 and config.estimate != "fp")
