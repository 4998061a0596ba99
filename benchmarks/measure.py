"""Time a case, estimate the machine's limits, and write the file of rows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from shapes import Case
from torch import Tensor

from gemq.ops import measuring

# relative error of the norm: float16 and bfloat16 results of random layers against float32
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def limits(device: str) -> dict:
    """Measure the limits of the machine: ``copy_gb_s``, bytes read and written by a 1 GiB device copy (on the CPU:
    bytes read by a sum over 1 GiB with all threads), and ``matmul_tflop_s`` of torch's large dense product in
    ``matmul_dtype``: float16, on the CPU the faster of float32 and bfloat16."""
    cuda = device == "cuda"
    timer, repeats = (measuring.event_time, 20) if cuda else (measuring.clock_time, 5)

    # a ceiling is the best that was seen
    def least(run: Callable[[], object]) -> float:
        run()
        return min(timer(run) for _ in range(repeats))

    source = torch.ones((1 << 30) // 4, device=device)
    if cuda:
        target = torch.empty_like(source)
        copy = (2 << 30) / least(lambda: target.copy_(source)) / 1e3
    else:
        copy = (1 << 30) / least(source.sum) / 1e3
    size, products = 8192 if cuda else 1024, {}
    for dtype in (torch.float16,) if cuda else (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        products[str(dtype).removeprefix("torch.")] = 2 * size**3 / least(lambda a=a: a @ a) / 1e6
    best = max(products, key=products.get)
    return {"copy_gb_s": round(copy, 1), "matmul_tflop_s": round(products[best], 3), "matmul_dtype": best}


def cache_bytes(device: str) -> int:
    """Bytes of the last level of cache, at most 64 MiB on a CPU: a virtual machine shows its host's."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return min(int(text.removesuffix("K")) << 10, 64 << 20)
    except (OSError, ValueError):
        return 32 << 20


def copies(touched: float, held: float, device: str) -> int:
    """Layers to rotate: together they exceed the cache four times (twice on a CPU) and fit in half the free memory."""
    if device == "cuda":
        free, most, least, times = torch.cuda.mem_get_info()[0], 24, 3, 4
    else:
        free, most, least, times = 4 << 30, 12, 2, 2
    wanted = -(-times * cache_bytes(device) // int(max(touched, 1)))
    return max(1, min(max(wanted, least), most, int(free / 2 / max(held, 1))))


@dataclass
class Step:
    """One call: a layer with its own tokens and routing."""

    layer: Callable[[Tensor, Tensor, Tensor], Tensor]
    x: Tensor
    ids: Tensor
    weights: Tensor

    def __call__(self) -> Tensor:
        return self.layer(self.x, self.ids, self.weights)

    def bytes(self) -> int:
        return self.layer.bytes_of(self.ids.unique().tolist())


def relative_error(step: Step) -> float:
    """``||out - ref|| / ||ref||`` of a call against a float32 loop over the layer's dequantized experts."""
    x, expected = step.x.float(), torch.zeros(step.x.shape, dtype=torch.float32, device=step.x.device)

    def dense(rows: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        gate, up = (rows @ pair[0].T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ pair[1].T

    for e in step.ids.unique().tolist():
        token, slot = torch.where(step.ids == e)
        part = dense(x[token], step.layer.weights(e))
        expected.index_add_(0, token, part * step.weights[token, slot, None].float())
    block = getattr(step.layer, "block", None) or step.layer.held.block
    if block.shared:
        expected += dense(x, step.layer.shared_weights())
    return float((step().float() - expected).norm() / expected.norm())


class Stopwatch:
    """Times a rotation of steps, one sample a call: on CUDA a pass over all of them, from one CUDA graph where it can
    be captured; on the CPU one step after the other."""

    def __init__(self, steps: Sequence[Step], device: str) -> None:
        self.steps, self.cuda = steps, device == "cuda"
        self.samples: list[float] = []
        self.graph, self.no_graph = None, ""
        self._turn = 0
        if self.cuda:
            self._capture()

    def _pass(self) -> None:
        for step in self.steps:
            step()

    def _capture(self) -> None:
        try:
            self.graph = measuring.graph_of(self._pass)
        except Exception as error:
            # a way that synchronises cannot be captured; it is timed with events instead, and the row says so
            self.no_graph = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            torch.cuda.synchronize()

    def sample(self) -> None:
        """Take one more sample, in microseconds a step."""
        if self.cuda:
            run = self._pass if self.graph is None else self.graph.replay
            self.samples.append(measuring.event_time(run) / len(self.steps))
        else:
            step = self.steps[self._turn % len(self.steps)]
            self._turn += 1
            self.samples.append(measuring.clock_time(step))

    def percentiles(self) -> dict[str, float]:
        """20th, 50th and 80th of the samples."""
        ordered = sorted(self.samples)
        return {f"p{q}_us": round(ordered[round(q / 100 * (len(ordered) - 1))], 2) for q in (20, 50, 80)}


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically: a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def compare(rows: list[dict]) -> None:
    """Give every row the strongest unquantized way of its block and tokens so far, and its ratio to it."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = row["block"], row["tokens"]
        if row["mix"] is None and "p50_us" in row and row["p50_us"] < best.get(key, {}).get("p50_us", float("inf")):
            best[key] = row
    for row in rows:
        strongest = best.get((row["block"], row["tokens"]))
        if strongest is not None and "p50_us" in row:
            row["strongest_unquantized"] = strongest["way"]
            row["ratio"] = round(strongest["p50_us"] / row["p50_us"], 3)


@dataclass
class Rows:
    """All rows of a run; written to ``path`` (if any) after each."""

    conditions: dict
    limits: dict
    path: Path | None = None
    rows: list[dict] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def add(self, case: Case, **measured: object) -> dict:
        """One row. With ``p50_us``, ``bytes`` and ``flops`` it gets rates and what the bandwidth would allow."""
        way = f"{case.provider}, compiled" if case.compiled else case.provider
        row = {
            "block": case.block.name, "tokens": case.tokens, "mix": case.mix, "dtype": case.dtype, "way": way,
            "bits": None, **measured,
        }
        if "p50_us" in row:
            copy = self.limits["copy_gb_s"]
            gb_s = row["bytes"] / row["p50_us"] / 1e3
            row |= {
                "gb_s": round(gb_s, 2), "tflop_s": round(row["flops"] / row["p50_us"] / 1e6, 4),
                "percent_of_copy": round(100 * gb_s / copy, 1), "ideal_us": round(row["bytes"] / copy / 1e3, 2),
            }
        self.rows.append(row)
        compare(self.rows)
        if self.path is not None:
            write_json(self.path, self.content())
        return row

    def content(self) -> dict:
        """Contents of the file of rows."""
        return {"kind": "moe", "conditions": self.conditions, "limits": self.limits,
                "seconds": round(time.monotonic() - self.begin, 1), "rows": self.rows}  # fmt: skip
