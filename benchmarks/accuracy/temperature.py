"""Test if a lower perplexity comes from better predictions or only from less confident ones.

    python benchmarks/accuracy/temperature.py [MODEL] --text held-out=heldout.txt --text unseen=other.txt

Quantized as ``make study`` does, by uniform widths and by GEMQ, with GPTQ alone and with the default; by budget and
text the perplexity as it is, and with logits divided by the temperature that makes it least. Text that a model is too
sure about gains by any noise; with its own temperature in each row that gain is out of the comparison.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import cells
import study
import torch
from cells import Run, Session
from torch import Tensor, nn

from gemq.algorithms.method import MethodConfig
from gemq.engine.progression import quantize_progressively

TEMPERATURES = [round(0.8 + 0.05 * i, 2) for i in range(29)]
COLUMNS = 4096  # tokens whose logits are divided at a time


@torch.no_grad()
def by_temperature(model: nn.Module, windows: Tensor, batch_size: int) -> dict[float, float]:
    """Perplexity of ``windows`` int64 ``[N, T]`` at each of :data:`TEMPERATURES`."""
    sums, count = dict.fromkeys(TEMPERATURES, 0.0), 0
    for ids in windows.split(batch_size):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        targets = ids[:, 1:].flatten()
        count += len(targets)
        for part, wanted in zip(logits.split(COLUMNS), targets.split(COLUMNS), strict=True):
            for t in TEMPERATURES:
                sums[t] += float(nn.functional.cross_entropy(part / t, wanted, reduction="sum"))
    return {t: math.exp(total / count) for t, total in sums.items()}


def show(name: str, session: Session) -> None:
    """Print a line for the model in its current state."""
    columns = []
    for text, windows in session.texts.items():
        found = by_temperature(session.moe.model, windows, session.settings.batch_size)
        best = min(found, key=found.get)
        columns.append(f"{text} {found[1.0]:.2f}, at temperature {best:.2f} {found[best]:.2f}")
    print(f"{name:<28} {'; '.join(columns)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=study.DEFAULTS["models"][0])
    study.add_settings(parser)
    parser.add_argument("--bits", default="2,1.5")
    given = parser.parse_args()
    budgets = tuple(float(b) for b in given.bits.split(","))
    with tempfile.TemporaryDirectory() as cache:
        session = Session(given.model, 0, study.settings_of(given), Path(cache))
        show("full precision", session)
        for quantizer in ("gptq", "default"):
            for method in ("uniform", "gemq"):
                run = Run(method=method, budgets=budgets, quantizer=quantizer)
                config = MethodConfig(
                    budgets=budgets, method=method, per_layer="none", tune=False, estimate=run.estimate,
                    batch_size=given.batch_size, gptq=cells.QUANTIZERS[quantizer],
                )
                for stage in quantize_progressively(
                    session.source, session.calibrating(run), config,
                    first=None if method == "uniform" else session.statistics(run),
                ):
                    stage.weights.write_to(session.moe.model)
                    show(f"{quantizer}, {method}, {stage.budget} bits", session)


if __name__ == "__main__":
    main()
