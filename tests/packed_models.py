"""Tiny models quantized, with their packed twins, for tests."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace

import torch
from tiny_models import random_windows, tiny_model

from gemq.algorithms.method import MethodConfig
from gemq.cli.run import run
from gemq.engine.progression import BudgetResult, quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.models import prepare
from gemq.packed_config import PackedConfig


def written_by_the_command(model_folder, quick, folder):
    """Return ``folder`` with a checkpoint of 2 bits that ``gemq quantize`` made of the tiny model."""
    arguments = ["quantize", str(model_folder), "-o", str(folder), "--bits", "2", *quick, "--method", "uniform", "-q"]
    assert run([*arguments, "--no-tune-routers"]) == 0
    return folder


@dataclass(frozen=True)
class Quantized:
    """``dense`` holds the dequantized weights, ``packed`` the same packed and ready to run."""

    dense: torch.nn.Module
    packed: torch.nn.Module
    config: PackedConfig
    stage: BudgetResult


def quantized(family: str, budget: float = 2.0, layers: int = 2, experts: int = 4, **method) -> Quantized:
    """A tiny model of ``family`` after the whole method at ``budget`` bits per expert; the models are the caller's."""
    made = _quantized(family, budget, layers, experts, tuple(sorted(method.items())))
    return replace(made, dense=copy.deepcopy(made.dense), packed=copy.deepcopy(made.packed))


@functools.cache
def _quantized(family: str, budget: float, layers: int, experts: int, method: tuple) -> Quantized:
    return quantized_model(tiny_model(family, layers=layers, experts=experts), budget, **dict(method))


def quantized_model(model: torch.nn.Module, budget: float = 2.0, **method) -> Quantized:
    """``model``, which stays as it is, after the whole method at ``budget`` bits per expert."""
    config = MethodConfig(budgets=(budget,), **method)
    (stage,) = quantize_progressively(ResidentSource(model), random_windows(), config)
    packed, packed_config = stage.packed()
    prepare(packed)
    return Quantized(stage.weights.whole().model, packed, packed_config, stage)


@torch.no_grad()
def logits(model: torch.nn.Module, seed: int = 5) -> torch.Tensor:
    """Logits of fixed windows, float32."""
    return model(input_ids=random_windows(2, 12, seed), use_cache=False).logits.float()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """``|got - expected| / |expected|`` in the 2-norm."""
    return float((got - expected).norm() / expected.norm())
