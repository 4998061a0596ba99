"""Predict what a run needs before it starts: sizes, memory, disk and time, from a model's config alone."""

from gemq.planning.machine import Machine, Rates, other_machine, this_machine
from gemq.planning.plan import Plan, PlanConfig, Shortage, check, make_plan
from gemq.planning.running import Inference
from gemq.planning.widths import budget_range, check_budgets, planned_widths

__all__ = [
    "Inference",
    "Machine",
    "Plan",
    "PlanConfig",
    "Rates",
    "Shortage",
    "budget_range",
    "check",
    "check_budgets",
    "make_plan",
    "other_machine",
    "planned_widths",
    "this_machine",
]
