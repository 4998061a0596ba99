"""Distill a dense model into the Mixture-of-Experts model that was carved from it; resumable, the same weights again.

The model learns the dense model's next-token distribution (KL divergence). Experts, routers and norms are trained;
routers are balanced by a bias that steers the choice of experts alone (arXiv 2408.15664).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train import _save_state, batch_at

ROUTER_RATE = 1  # a router's learning rate, in experts'
BALANCE = 1e-4  # step of the bias
WARMUP = 20


@dataclass(frozen=True)
class Distillation:
    """``steps`` steps, each of ``batch`` windows of ``window`` tokens; ``rate`` is the experts' peak learning rate,
    ``dtype`` that of matrix products (master weights, norms and the loss are float32)."""

    steps: int = 2000
    batch: int = 4
    window: int = 256
    rate: float = 3e-4
    seed: int = 0
    dtype: str = "float32"


def fastest_dtype() -> str:
    """bfloat16 on processors that multiply it, float32 on others."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def trained(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Choose experts and norms, and routers; all else is frozen."""
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    chosen = {id(weight) for weight in routers}
    others = [p for name, p in model.named_parameters() if (".mlp." in name or "norm" in name) and id(p) not in chosen]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in (*routers, *others):
        parameter.requires_grad_(True)
    return others, routers


def divergence(dense: nn.Module, model: nn.Module, rows: Tensor) -> Tensor:
    """KL divergence of the model's next-token distribution from the dense model's; mean over tokens, in nats."""
    with torch.no_grad():
        wanted = dense(input_ids=rows, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    found = model(input_ids=rows, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


class Balance:
    """Counts the experts chosen in each layer, and moves the biases of their routers against the counts."""

    def __init__(self, model: nn.Module):
        self.blocks = [layer.mlp for layer in model.model.layers]
        self.counts = [torch.zeros(block.gate.weight.shape[0]) for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.experts.register_forward_pre_hook(self._counter(index))

    def _counter(self, index: int) -> Callable[[nn.Module, tuple], None]:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.counts[index] += torch.bincount(args[1].flatten(), minlength=len(self.counts[index]))

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Lower the bias of experts that got more tokens than an even share, raise the others'."""
        for block, counts in zip(self.blocks, self.counts, strict=True):
            block.gate.e_score_correction_bias -= BALANCE * (counts - counts.mean()).sign()
            counts.zero_()

    def least(self) -> float:
        """Smallest share of an even load that an expert of any layer got since the last step."""
        return min(float(counts.min() / counts.mean().clamp_min(1e-9)) for counts in self.counts)


def learning_rate(step: int, of: int) -> float:
    """Share of the peak: linear warm-up, then a cosine to 5%."""
    return min(1.0, (step + 1) / WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / of)))


def _optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    others, routers = trained(model)
    groups = [{"params": others, "peak": rate}, {"params": routers, "peak": ROUTER_RATE * rate}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def distill(
    dense: nn.Module, model: nn.Module, ids: Tensor, options: Distillation, state: Path,
    measure: Callable[[], float], until: float = 0.0, seconds: float | None = None, save_every: int = 100,
) -> tuple[int, bool]:
    """Train ``model`` in place on token ids ``[N]``; the steps done, and True if there is no more to do.

    Goes on from ``state`` where that exists, and saves there every ``save_every`` steps. Ends early, with the state
    saved, after ``seconds``; ends for good once ``measure()``, a perplexity, is at most ``until`` at a save.
    ``ValueError`` if the state is of other options, or the loss is not finite.
    """
    model.set_experts_implementation("grouped_mm")  # 1.3 times eager's speed here
    balance, first = Balance(model), 0
    optimizer = _optimizer(model, options.rate)
    if state.is_file():
        held = torch.load(state, weights_only=True)
        if held["options"] != asdict(options):
            raise ValueError(f"{state} was begun with {held['options']}, now given {asdict(options)}; remove it")
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["step"]
        print(f"going on from step {first}", flush=True)

    def save(step: int) -> None:
        _save_state(state, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                            "options": asdict(options)})

    start, shown = time.perf_counter(), 0.0
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, options.steps)
        rows = batch_at(ids, step, options.batch, options.window, options.seed)[:, :-1]
        with torch.autocast("cpu", getattr(torch, options.dtype), enabled=options.dtype != "float32"):
            loss = divergence(dense, model, rows)
        if not torch.isfinite(loss.detach()):
            raise ValueError(f"the loss of step {step} is {float(loss.detach())}: lower --rate")
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown, done = shown + float(loss.detach()), step + 1
        if done % 20 == 0:
            rate = (done - first) * rows.numel() / (time.perf_counter() - start)
            print(f"step {done}/{options.steps}  KL {shown / 20:.4f}  least load "
                  f"{balance.least():.2f}  {rate:.0f} tokens/s", flush=True)
            shown = 0.0
        balance.step()
        late = seconds is not None and time.perf_counter() - start > seconds
        if done % save_every == 0 or late or done == options.steps:
            save(done)
            found = measure()
            print(f"step {done}: held-out perplexity {found:.2f}", flush=True)
            if late or found <= until:
                return done, found <= until or done == options.steps
    return options.steps, True
