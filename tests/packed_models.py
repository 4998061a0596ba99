"""Tiny models quantized, with their packed twins, for tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from tiny_models import random_windows, tiny_model

from gemq.algorithms.progressive import MethodConfig, StageResult, quantize_progressively
from gemq.checkpoint import pack_model
from gemq.cli.run import run
from gemq.models import describe, prepare
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
    stage: StageResult


def quantized(family: str, budget: float = 2.0, layers: int = 2, experts: int = 4, **method) -> Quantized:
    """A tiny model of ``family`` after the whole method at ``budget`` bits per expert."""
    dense = tiny_model(family, layers=layers, experts=experts)
    config = MethodConfig(budgets=(budget,), **method)
    (stage,) = quantize_progressively(describe(dense), random_windows(), config)
    packed, packed_config = pack(dense, stage)
    return Quantized(dense.requires_grad_(False), packed, packed_config, stage)


def pack(dense: torch.nn.Module, stage: StageResult) -> tuple[torch.nn.Module, PackedConfig]:
    """A packed copy of a model that holds the weights of ``stage``."""
    packed = copy.deepcopy(dense).requires_grad_(False)
    config = pack_model(describe(packed), stage.weights, budget=stage.budget, method="gemq")
    prepare(packed)
    return packed, config


@torch.no_grad()
def logits(model: torch.nn.Module, seed: int = 5) -> torch.Tensor:
    """Logits of fixed windows, float32."""
    return model(input_ids=random_windows(2, 12, seed), use_cache=False).logits.float()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """``|got - expected| / |expected|`` in the 2-norm."""
    return float((got - expected).norm() / expected.norm())
