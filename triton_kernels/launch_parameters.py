"""Choose launch parameters: those measured for device and shape (:mod:`.launch_tables`) over ``tuned/default.json``.

``decode.columns`` are ``[up to so many tokens, token columns]``, ``warps`` are ``[up to so many programs, warps of
each]``; ``programs`` is how many programs a decode launch should have at least: K is split until it does. ``prefill``
is a list of launches, each for up to so many tokens per expert on average; a measured table names the ``line`` of it.
The default's limits are estimates for an H100, not measured: see docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import launch_tables
from .launch_tables import DEFAULT, table_name
from .layout import LARGEST_SPAN, ROWS

__all__ = [
    "DEFAULT", "Launch", "Prefill", "decode_launch", "fragment_run", "is_decode", "prefill_launch", "table",
    "table_name", "threads_first",
]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """Launch options of one product: token columns of a program, warps, splits of K, how many spans ahead weights are
    fetched into the L2, the most registers a thread may have (None: no limit), whether the launch may overlap the end
    of the one before it."""

    columns: int
    warps: int
    splits: int
    ahead: int
    registers: int | None = None
    pdl: bool = False


def table(device_name: str) -> dict:
    """Parameters that depend on no shape, of a device or the default ones."""
    return launch_tables.sections(device_name)


def _up_to(entries: list, amount: float) -> int:
    for limit, value in entries:
        if limit is None or amount <= limit:
            return value
    return entries[-1][1]


def is_decode(device_name: str, tokens: int) -> bool:
    """Return True if ``tokens`` are few enough for the decode path."""
    return tokens <= table(device_name)["decode_tokens"]


def decode_launch(
    device_name: str, kind: str, tokens: int, experts: int, top_k: int, n: int, k: int, tiles: int = 1
) -> Launch:
    """Choose the launch of ``kind`` ``gemm`` or ``ffn``. An ``ffn`` program has ``tiles`` tiles of gate and of up, and
    K is never split for it. ``n`` is the number of rows that the grid covers."""
    entry = table(device_name)["decode"]
    programs = -(-n // (ROWS * tiles)) * min(tokens * top_k, experts)
    default = entry[kind] | {
        "columns": _up_to(entry["columns"], tokens), "warps": _up_to(entry[kind]["warps"], programs),
    }  # fmt: skip
    config = launch_tables.parameters(device_name, f"decode.{kind}", (n, k, experts, top_k), tokens, default)
    columns, warps = config["columns"], config["warps"]
    splits = 1
    if kind == "gemm":
        wanted = -(-config["programs"] // max(programs, 1))
        # each warp of a split should find at least one of the widest spans
        splits = max(1, min(wanted, k // (LARGEST_SPAN * warps), 16))
    else:
        warps = max(warps, 2 * tiles)
    return Launch(columns, warps, splits, config["ahead"], config.get("registers"), config.get("pdl", False))


@dataclass(frozen=True)
class Prefill:
    """Launch options for many tokens: ``packed`` unpacks in registers; ``dense`` unpacks to memory first.

    A program has ``rows`` rows and ``columns`` tokens; ``stages`` trips of ``steps`` (packed) or one (dense) times 64
    columns of K are on their way.
    """

    method: str
    columns: int
    rows: int
    warps: int
    stages: int
    steps: int


def prefill_launch(device_name: str, tokens: int, experts: int, top_k: int, n: int, k: int) -> Prefill:
    """Choose the launch by the tokens that an expert gets on average; ``n`` rows and ``k`` columns (of a block: of gate
    and up)."""
    average = tokens * top_k / max(experts, 1)
    entries = table(device_name)["prefill"]
    last = len(entries) - 1
    line = next((i for i, e in enumerate(entries) if e["tokens"] is None or average <= e["tokens"]), last)
    found = launch_tables.parameters(device_name, "prefill", (n, k, experts, top_k), average, {"line": line})
    chosen = entries[min(found["line"], last)]
    return Prefill(**{name: value for name, value in chosen.items() if name != "tokens"})


def threads_first(triton_version: str) -> bool:
    """``THREADS_FIRST`` of :mod:`.prefill_unpack`, found by compiling: a wrong one goes through shared memory."""
    major, minor = (int(part) for part in triton_version.split(".")[:2])
    return (major, minor) <= (3, 6)


def fragment_run(triton_version: str) -> int:
    """``RUN`` of :mod:`.decode_tile`: int32 of a row that the compiler's tensor-core operands keep together.

    Found by compiling (benchmarks/sass_report.py): the wrong one shows as shuffles in the loop.
    """
    major, minor = (int(part) for part in triton_version.split(".")[:2])
    return 2 if (major, minor) <= (3, 6) else 1
