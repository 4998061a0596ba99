"""The paper's tables and figures as lists of cells, each with the orders that the paper reports in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cells import Run

ALL_SEEDS, FIRST_SEED = "all", "first"
UNIFORM, PMQ = Run(method="uniform"), Run(method="pmq")
GEMQ = Run(estimate="quantized")
TUNED = Run(estimate="tuned", routers="loss")
# an expert has one width, as in the paper
EXPERTS = Run(estimate="quantized", granularity="expert")
FP, FP_TUNED = Run(kind="fp"), Run(kind="fp", routers="loss")
PAPER = replace(EXPERTS, perturbation="rtn", per_layer="c2c3", quantizer="paper", accounting="paper")
LOW = (2.0, 1.5)


@dataclass(frozen=True)
class Table:
    """``rows`` are ``(label, run)``; ``orders`` are ``(better, worse)`` labels, as the paper has them. ``view`` says
    how it is rendered: ``perplexity`` by budget and text, or a name of :mod:`render`; ``varied`` heads the labels."""

    key: str
    title: str
    rows: tuple[tuple[str, Run], ...]
    orders: tuple[tuple[str, str], ...] = ()
    view: str = "perplexity"
    seeds: str = ALL_SEEDS
    varied: str = "method"


def control(run: Run) -> Run:
    """Run in full precision that ``run`` is compared with: its routers are tuned alike, on the same windows."""
    if run.routers != "loss":
        return FP
    return replace(
        FP_TUNED, calibration=run.calibration, samples=run.samples, balanced=run.balanced,
        self_sampled=run.self_sampled, router_samples=run.router_samples, router_epochs=run.router_epochs,
        router_lr=run.router_lr,
    )


def _rows(base: Run, budgets: tuple[float, ...], **options: tuple) -> tuple[tuple[str, Run], ...]:
    """One row a value of the one option given; labels are ``option value``."""
    ((name, values),) = options.items()
    return tuple((str(value), replace(base, budgets=budgets, **{name: value})) for value in values)


def build(calibrations: list[str], budgets: tuple[float, ...], low: tuple[float, ...]) -> dict[str, Table]:
    """Build all tables for the names of the calibration texts and the budgets; ``low`` are the budgets of the
    ablations."""

    def at(run: Run, chosen: tuple[float, ...] = budgets, **options: object) -> Run:
        return replace(run, budgets=chosen, **options)

    def alone(run: Run, **options: object) -> Run:
        return at(run, quantizer="gptq", **options)

    mixed = [*calibrations, *(["+".join(calibrations)] if len(calibrations) > 1 else [])]
    tables = [
        Table("1", "Methods: perplexity by budget", (
            ("FP", FP), ("FP, routers tuned", FP_TUNED), ("uniform", at(UNIFORM)), ("PMQ", at(PMQ)),
            ("GEMQ, paper's options", at(replace(PAPER, routers="loss", estimate="tuned"))),
            ("GEMQ, GPTQ alone", alone(TUNED)),
            ("GEMQ, one width an expert", at(EXPERTS)), ("GEMQ, no tuning", at(GEMQ)), ("GEMQ", at(TUNED)),
        ), (("PMQ", "uniform"), ("GEMQ", "PMQ"), ("GEMQ", "uniform"), ("GEMQ, paper's options", "PMQ"),
            ("GEMQ", "GEMQ, paper's options"))),
        Table("1s", "The same with every method's shared experts at 3 bits, beside the budget", (
            ("FP", FP), ("FP, routers tuned", FP_TUNED), ("uniform", at(UNIFORM, shared_bits=3)),
            ("PMQ", at(PMQ, shared_bits=3)), ("GEMQ, no tuning", at(GEMQ, shared_bits=3)),
            ("GEMQ", at(TUNED, shared_bits=3)),
        ), (("GEMQ", "PMQ"), ("GEMQ", "uniform"))),
        # outliers cannot be refined, so all are compared by GPTQ alone
        Table("2", "Stand-ins for SpQR, MoEQuant and EAQuant at equal bits per expert", (
            ("uniform", alone(UNIFORM)), ("SpQR-style outliers", alone(UNIFORM, kind="spqr")),
            ("MoEQuant-style: affinity, self-sampled windows", alone(UNIFORM, affinity=1.0, self_sampled=True)),
            ("EAQuant-style: balanced windows, aligned routers", alone(UNIFORM, balanced=True, routers="alignment")),
            ("GEMQ, GPTQ alone", alone(TUNED)), ("GEMQ", at(TUNED)),
        ), (("GEMQ, GPTQ alone", "SpQR-style outliers"),
            ("GEMQ, GPTQ alone", "MoEQuant-style: affinity, self-sampled windows"),
            ("GEMQ, GPTQ alone", "EAQuant-style: balanced windows, aligned routers"))),
        Table("3", "Calibration text", tuple((name, at(TUNED, calibration=name)) for name in mixed), varied="text"),
        Table("5", "How routers are handled, experts as GEMQ has them", (
            ("FP", FP), ("FP, routers tuned", FP_TUNED), ("none", at(GEMQ, low, replay=True)),
            ("aligned layer by layer", at(GEMQ, low, routers="alignment")),
            ("tuned on the loss", at(GEMQ, low, routers="loss")),
        ), (("tuned on the loss", "none"), ("tuned on the loss", "aligned layer by layer"),
            ("tuned on the loss", "full-precision routing replayed"))),
        Table("6", "The model on which costs are estimated", (
            ("full precision", at(TUNED, estimate="fp")), ("quantized", at(TUNED, estimate="quantized")),
            ("quantized, routers tuned", at(TUNED)),
        ), (("quantized, routers tuned", "full precision"), ("quantized, routers tuned", "quantized")),
              view="estimates"),
        Table("15", "Calibration subsets: the seeds of table 1", (("GEMQ", at(TUNED)),), view="subsets"),
        Table("16", "Calibration windows", _rows(GEMQ, low, samples=(8, 16, 32, 64, 128)), varied="windows"),
        Table("17", "Constraints per layer, one width an expert",
              _rows(EXPERTS, low, per_layer=("none", "c2", "c3", "c2c3")), (("c2c3", "none"),),
              varied="at least one expert a layer at"),
        Table("17m", "Constraints per layer, gate and up apart from down", (
            ("FP", FP), *_rows(GEMQ, budgets, per_layer=("none", "c2c3")),
        ), (("none", "c2c3"),), varied="at least one expert a layer at"),
        Table("18", "Candidate widths of an expert, and what is minimised", (
            *((",".join(map(str, c)), at(EXPERTS, low, candidates=c)) for c in
              ((1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 4), (0, 1, 2, 3, 4), (1, 2, 4))),
            ("Eq. 6 by rounding", at(EXPERTS, low, perturbation="rtn")),
            ("weight-Fisher", at(EXPERTS, low, method="fisher")),
            ("1,2,3 for gate and up, and for down", at(GEMQ, low)),
            ("1,2,3,4 for gate and up, and for down", at(GEMQ, low, candidates=(1, 2, 3, 4))),
            ("PMQ's coefficients, all layers", at(PMQ, low, method="global-pmq")),
        ), (("1,2,3", "weight-Fisher"), ("1,2,3", "PMQ's coefficients, all layers"))),
        Table("19", "Bits of attention", _rows(GEMQ, low, attention_bits=(2, 3, 4, 8, 16)),
              varied="attention bits"),
        Table("20", "Bits of tuned routers", _rows(TUNED, low, router_bits=(2, 3, 4, 8, 16)), varied="router bits"),
        Table("21", "Ablation: from one width to the whole method", (
            ("uniform", at(UNIFORM)), ("PMQ, a program a layer", at(PMQ)),
            ("PMQ's coefficients, all layers", at(PMQ, method="global-pmq", per_layer="none")),
            ("Eq. 6, layers then experts", at(EXPERTS, method="two-step", estimate="fp")),
            ("Eq. 6, one program", at(EXPERTS, estimate="fp")), ("+ progression", at(EXPERTS)),
            ("+ gate and up, and down, apart", at(GEMQ)), ("+ routers tuned", at(TUNED)),
        ), (("PMQ, a program a layer", "uniform"), ("Eq. 6, one program", "PMQ's coefficients, all layers"),
            ("Eq. 6, one program", "Eq. 6, layers then experts"), ("+ progression", "Eq. 6, one program"),
            ("+ gate and up, and down, apart", "+ progression"),
            ("+ routers tuned", "+ gate and up, and down, apart"))),
        Table("maps", "Bit maps (Fig. 4a, 10)", (("GEMQ", at(TUNED)),), view="maps", seeds=FIRST_SEED),
        Table("importance", "Importance under other calibration text (Fig. 1a, 6)",
              tuple((name, Run(kind="statistics", calibration=name)) for name in calibrations), view="importance"),
        Table("tuning", "Router tuning: epochs and windows (Fig. 7)", (
            *((f"{n} epochs", at(TUNED, low, router_epochs=n)) for n in (1, 2, 4, 8)),
            *((f"{n} windows", at(TUNED, low, router_samples=n)) for n in (8, 16, 64, 128)),
        ), seeds=FIRST_SEED),
        Table("routes", "Tokens whose experts changed against full precision (Fig. 1b, 8, 9)", (
            ("FP, routers tuned", FP_TUNED), ("uniform", at(UNIFORM)), ("GEMQ, no tuning", at(GEMQ)),
            ("GEMQ", at(TUNED)),
        ), view="routes"),
        Table("eq6", "Eq. 6 against the true rise of the loss, one expert at a time", (
            ("GPTQ", Run(kind="eq6")), ("rounding", Run(kind="eq6", perturbation="rtn")),
        ), view="eq6", seeds=FIRST_SEED),
    ]
    return {table.key: table for table in tables}


# of them, what is most worth its time, in this order
PRIORITY = ("1", "1s", "21", "5", "17", "17m", "18", "eq6", "routes", "maps", "importance", "6", "2", "3", "15", "20",
            "19", "16", "tuning")
