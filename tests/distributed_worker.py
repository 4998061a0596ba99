"""One process of a job: quantizes tiny models and writes a digest of everything that came out.

    python tests/distributed_worker.py OUT.json FAMILY:WINDOWS:BATCH... [--die-at STAGE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_models import random_windows, tiny_model

from gemq import distributed
from gemq.algorithms.progressive import MethodConfig, quantize_progressively
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.errors import GemqError
from gemq.models import describe


def digest(*values) -> str:
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous().view(torch.uint8).numpy()
        found.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
    return found.hexdigest()


def outcome(case: str, die_at: str | None = None) -> list[dict[str, str]]:
    """Of two budgets, a digest of each part of the result."""
    family, windows, batch = case.split(":")
    model = tiny_model(family)
    moe = describe(model)
    config = MethodConfig(
        (2.5, 2.0), batch_size=int(batch), router_bits=8, router=RouterTuningConfig(learning_rate=1e-2, batch_size=3)
    )

    def progress(stage: str, done: int, total: int) -> None:
        if stage == die_at and distributed.world().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    found = []
    for stage in quantize_progressively(moe, random_windows(int(windows)), config, progress=progress):
        statistics, weights = stage.statistics, stage.weights
        stacks = [t for pair in weights.stacks.values() for s in pair for t in (*s.codes, *s.meta) if t is not None]
        linears = [t for codes, meta, _ in weights.linears.values() for t in (codes, meta)]
        found.append({
            "costs": digest(statistics.costs.routed, statistics.costs.shared, statistics.frequency,
                            statistics.weight, statistics.error),
            "bits": digest(stage.allocation.bits, stage.allocation.shared_bits),
            "codes": digest(*stacks, *linears),
            "reports": digest(sorted(weights.reports.items())),
            "losses": digest(stage.router_losses),
            "model": digest(*model.state_dict().values()),
        })
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--die-at")
    options = parser.parse_args()
    try:
        with distributed.job(torch.device("cpu")):
            found = {case: outcome(case, options.die_at) for case in options.cases}
            options.output.write_text(json.dumps(found))
    except GemqError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    distributed.leave(main())
