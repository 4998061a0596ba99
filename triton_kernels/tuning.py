"""Launch parameters: static tables in ``tuned/``, one file a device, ``default.json`` for the others.

``decode.columns`` are ``[up to so many tokens, token columns]``, ``warps`` are ``[up to so many programs, warps of
each]``; ``programs`` is how many programs a decode launch should have at least: K is split until it does. ``prefill``
is a list of launches, each for up to so many tokens per expert on average; the default's are estimates for an H100, not
measured: see docs/performance.md.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLES = Path(__file__).parent / "tuned"
DEFAULT = "default"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """How one product is launched: token columns of a program, warps, splits of K, how many spans ahead weights are
    fetched into the L2, the most registers a thread may have (None: no limit), whether the launch may overlap the end
    of the one before it."""

    columns: int
    warps: int
    splits: int
    ahead: int
    registers: int | None = None
    pdl: bool = False


def table_name(device_name: str) -> str:
    """The file name, without ``.json``, that a device's table would have: ``NVIDIA H100 80GB HBM3`` is
    ``nvidia_h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


@lru_cache
def table(device_name: str) -> dict:
    """The table of a device, or the default one; a miss is logged once."""
    path = TABLES / f"{table_name(device_name)}.json"
    if not path.exists():
        logger.info("no launch table for %s: using %s.json; add %s to ship one", device_name, DEFAULT, path)
        path = TABLES / f"{DEFAULT}.json"
    return json.loads(path.read_text())


def _up_to(entries: list, amount: float) -> int:
    for limit, value in entries:
        if limit is None or amount <= limit:
            return value
    return entries[-1][1]


def is_decode(device_name: str, tokens: int) -> bool:
    """Whether so few tokens take the decode path."""
    return tokens <= table(device_name)["decode_tokens"]


def decode_launch(
    device_name: str, kind: str, tokens: int, experts: int, top_k: int, n: int, k: int, tiles: int = 1
) -> Launch:
    """Of ``kind`` ``gemm`` or ``ffn`` (``tiles`` of gate and of up in one program, never split); ``n`` rows a
    program's grid covers."""
    entry = table(device_name)["decode"]
    config = entry[kind]
    columns = _up_to(entry["columns"], tokens)
    programs = -(-n // (64 * tiles)) * min(tokens * top_k, experts)
    warps = _up_to(config["warps"], programs)
    splits = 1
    if kind == "gemm":
        wanted = -(-config["programs"] // max(programs, 1))
        # each warp of a split should find at least one of the widest spans
        splits = max(1, min(wanted, k // (512 * warps), 16))
    else:
        warps = max(warps, 2 * tiles)
    return Launch(columns, warps, splits, config["ahead"], config.get("registers"), entry.get("pdl", False))


@dataclass(frozen=True)
class Prefill:
    """How many tokens are multiplied: ``packed`` unpacks in registers; ``dense`` unpacks to memory first.

    A program has ``rows`` rows and ``columns`` tokens; ``stages`` trips of ``steps`` (packed) or one (dense) times 64
    columns of K are on their way.
    """

    method: str
    columns: int
    rows: int
    warps: int
    stages: int
    steps: int


def prefill_launch(device_name: str, tokens: int, experts: int, top_k: int) -> Prefill:
    """By the tokens that an expert gets on average."""
    average = tokens * top_k / max(experts, 1)
    entries = table(device_name)["prefill"]
    entry = next((e for e in entries if e["tokens"] is None or average <= e["tokens"]), entries[-1])
    return Prefill(**{name: value for name, value in entry.items() if name != "tokens"})


def threads_first(triton_version: str) -> bool:
    """``THREADS_FIRST`` of :mod:`.unpack`, found by compiling: the wrong one shows as shared-memory round trips."""
    major, minor = (int(part) for part in triton_version.split(".")[:2])
    return (major, minor) <= (3, 6)


def fragment_run(triton_version: str) -> int:
    """``RUN`` of :mod:`.body`: int32 of a row that the compiler's tensor-core operands keep together.

    Found by compiling (benchmarks/sass_report.py): the wrong one shows as shuffles in the loop.
    """
    major, minor = (int(part) for part in triton_version.split(".")[:2])
    return 2 if (major, minor) <= (3, 6) else 1
