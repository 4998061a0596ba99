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
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.engine.progression import quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.errors import GemqError


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
    source = ResidentSource(tiny_model(family))
    config = MethodConfig(
        (2.5, 2.0), batch_size=int(batch), router_bits=8, router=RouterTuningConfig(learning_rate=1e-2, batch_size=3)
    )

    def progress(stage: str, done: int, total: int) -> None:
        if stage == die_at and distributed.world().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    found = []
    for stage in quantize_progressively(source, random_windows(int(windows)), config, progress=progress):
        statistics, layers = stage.statistics, range(stage.quantized.layers)
        modules = [module for index in layers for module in stage.quantized.record(index).modules.values()]
        found.append({
            "costs": digest(statistics.costs.routed, statistics.costs.shared, statistics.frequency,
                            statistics.weight, statistics.error),
            "bits": digest(stage.allocation.bits, stage.allocation.shared_bits),
            "codes": digest(*(buffer for module in modules for buffer in module.buffers())),
            "reports": digest(sorted(stage.reports.items())),
            "losses": digest(stage.router_losses),
            "model": digest(*stage.weights.whole().model.state_dict().values()),
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
