"""Report the machine code of the prefill kernels for sm_90: the part of sass_report.py for many tokens.

    python benchmarks/sass_prefill.py [--json report.json]

Cycles are a model, not a measurement: a tensor core of sm_90 does 2,048 float16 multiply-adds a cycle and SM, and four
schedulers issue one instruction of a warp a cycle.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from sass_report import _instructions, _tool, compile_kernel

# limits of one program on sm_90
SHARED_BYTES = 232448

POINTERS = {
    "x_ptr": "*fp16", "inverse_ptr": "*fp32", "codes_ptr": "*i32", "meta_ptr": "*i32", "bits_ptr": "*i32",
    "offsets_ptr": "*i64", "meta_offsets_ptr": "*i64", "expert_ptr": "*i32", "pairs_ptr": "*i32",
    "out_ptr": "*fp32", "exponent_ptr": "*i32", "weights_ptr": "*fp16", "counts_ptr": "*i32", "ids_ptr": "*i64",
    "partial_ptr": "*fp32",
}
MEMORY = ("LDG", "STG", "LDS", "STS", "LDL", "STL")


@dataclass
class Row:
    """One variant: opcodes of the longest loop with a tensor-core instruction and of everything.

    ``issue`` and ``tensor`` are modelled cycles of an SM for one trip of that loop by one program.
    """

    name: str
    registers: int
    spills: int
    shared: int
    per_weight: float | None
    issue: float | None
    tensor: float | None
    loop: dict[str, int]
    code: dict[str, int]


def _opcode(full: str) -> str:
    """The first part of an opcode; of memory instructions the width too, ``LDG.128``."""
    name = full.split(".")[0]
    width = re.search(r"\.(128|64|U16|U8)\b", full)
    return f"{name}.{width[1]}" if name.startswith(MEMORY) and width else name


def _loop(code: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The longest body of a backward branch that multiplies on tensor cores."""
    labels = {rest: i for i, (opcode, rest) in enumerate(code) if opcode == "LABEL"}
    found: list[tuple[str, str]] = []
    for i, (opcode, rest) in enumerate(code):
        target = re.search(r"(\.L_x_\d+)", rest) if opcode.startswith("BRA") else None
        start = labels.get(target[1], i) if target else i
        body = [x for x in code[start:i] if x[0] != "LABEL"]
        if len(body) > len(found) and any("MMA" in x[0] for x in body):
            found = body
    return found


def measure(name: str, compiled, warps: int, rows: int) -> Row:
    """``rows`` rows of weights meet K in steps of 16, one an HGMMA of 64 rows: that gives the weights of a trip."""
    cubin = compiled.asm["cubin"]
    code = _instructions(_tool("nvdisasm", "-c", cubin))
    usage = _tool("cuobjdump", "-res-usage", cubin)
    body = _loop(code)
    ops = collections.Counter(_opcode(x[0]) for x in code if x[0] != "LABEL")
    loop = collections.Counter(_opcode(x[0]) for x in body)
    shapes = [re.search(r"^HGMMA\.(\d+)x(\d+)x16", opcode + rest) for opcode, rest in body]
    shapes = [(int(s[1]), int(s[2])) for s in shapes if s]
    per_weight = issue = tensor = None
    if shapes:
        # every warp issues the loop; an HGMMA is one for the four warps of its group
        issue = len(body) * warps / 4
        tensor = sum(m * n * 16 for m, n in shapes) / 2048 * (warps / 4)
        weights = sum(m * 16 for m, _ in shapes) * (warps / 4)
        per_weight = round(len(body) * warps * 32 / weights, 2) if rows else None
    return Row(
        name, max(map(int, re.findall(r"REG:(\d+)", usage))), sum(n for o, n in ops.items() if o[:3] in ("LDL", "STL")),
        compiled.metadata.shared, per_weight, issue, tensor, dict(loop.most_common()), dict(ops.most_common()),
    )


def _entry(method: str, columns: int | None = None) -> dict:
    from gemq.triton_kernels import launch_parameters

    entries = [e for e in launch_parameters.table(launch_parameters.DEFAULT)["prefill"] if e["method"] == method]
    return next(e for e in entries if columns in (None, e["columns"]))


def _pointers(parts: int, squared: bool = False) -> dict[str, str]:
    return POINTERS | {"out_ptr": "*fp16" if parts == 2 or squared else "*fp32"}


def _product(parts: int, squared: bool) -> str:
    return " squared" if squared else " gate+up" if parts == 2 else ""


def packed(
    columns: int, parts: int, only: int, group: int = 128, kw: int = 16, fast: bool = True, ones: tuple[str, ...] = (),
    squared: bool = False,
) -> Row:
    """The packed kernel of the default table with so many columns, at one width or mixed (``only`` 0).

    ``ones``: arguments that are 1, which triton compiles as constants. ``squared``: with squared ReLU, of one part.
    """
    from gemq.triton_kernels import launch_parameters
    from gemq.triton_kernels.layout import WIDTHS
    from gemq.triton_kernels.prefill_packed import packed_kernel
    from gemq.triton_kernels.widths import Packed

    e = _entry("packed", columns)
    how = Packed(
        kws=(kw,) * len(WIDTHS), group=group, rows=e["rows"], columns=columns, parts=parts, warps=e["warps"],
        stages=e["stages"], room=e["steps"], fast=fast,
        threads_first=launch_parameters.threads_first(triton.__version__), only=only,
    )
    constants = {"HOW": how, "SQUARED": squared} | dict.fromkeys(ones, 1)
    compiled = compile_kernel(packed_kernel, _pointers(parts, squared), constants, e["warps"])
    width = f"{only} bit" if only else "mixed"
    name = f"packed{_product(parts, squared)} {width} {columns} columns"
    name += (f" kw{kw} g{group}" if (kw, group) != (16, 128) else "") + ("" if fast else " plain")
    return measure(name, compiled, e["warps"], e["rows"] if only else 0)


def dense(parts: int, ones: tuple[str, ...] = (), squared: bool = False) -> Row:
    """The product of unpacked weights."""
    from gemq.triton_kernels.prefill_unpacked import grouped_kernel

    e = _entry("dense")
    constants = {"COLUMNS": e["columns"], "ROWS": e["rows"], "PARTS": parts, "STAGES": e["stages"]}
    constants |= dict.fromkeys(ones, 1) | {"SQUARED": squared}
    compiled = compile_kernel(grouped_kernel, _pointers(parts, squared), constants, e["warps"], e["stages"])
    return measure(f"dense{_product(parts, squared)} {e['columns']} x {e['rows']}", compiled, e["warps"], 0)


def unpacking(only: int, group: int = 128, kw: int = 16) -> Row:
    """The kernel that unpacks to memory."""
    from gemq.triton_kernels import launch_parameters
    from gemq.triton_kernels.layout import WIDTHS
    from gemq.triton_kernels.prefill_unpacked import dequantize_kernel
    from gemq.triton_kernels.widths import Unpacking

    how = Unpacking((kw,) * len(WIDTHS), group, 4, True, launch_parameters.threads_first(triton.__version__), only)
    compiled = compile_kernel(dequantize_kernel, _pointers(2), {"HOW": how}, how.warps)
    return measure(f"unpack {f'{only} bit' if only else 'mixed'}", compiled, how.warps, 0)


def small(ones: tuple[str, ...] = ()) -> list[Row]:
    """Sorting, normalising and summing."""
    from gemq.triton_kernels import blocks_by_sorting, prefill_inputs

    variants = (
        (blocks_by_sorting.count_kernel, {"CHUNK": 4096}, 8),
        (blocks_by_sorting.place_kernel, {"EXPERTS": 16, "COLUMNS": 64, "CHUNK": 4096}, 8),
        (prefill_inputs.normalize_kernel, {"BLOCK": 4096, "ORDERED": True}, 4),
        (prefill_inputs.rescale_kernel, {"PART": 64, "PARTS": 256, "BLOCK": 4096, "ORDERED": True}, 4),
        (prefill_inputs.combine_kernel, {"SLOTS": 2, "BLOCK": 1024}, 4),
    )
    rows = []
    for kernel, constants, warps in variants:
        types = POINTERS | {"weights_ptr": "*fp32"}
        if kernel in (prefill_inputs.normalize_kernel, prefill_inputs.rescale_kernel):
            types |= {"x_ptr": "*bf16" if kernel is prefill_inputs.normalize_kernel else "*fp16", "out_ptr": "*fp16"}
        fixed = constants | {a: 1 for a in ones if a in kernel.arg_names}
        rows.append(measure(kernel.__name__, compile_kernel(kernel, types, fixed, warps), warps, 0))
    return rows


def report():
    """The variants that ship, one by one."""
    from gemq.triton_kernels import launch_parameters

    entries = launch_parameters.table(launch_parameters.DEFAULT)["prefill"]
    columns = [e["columns"] for e in entries if e["method"] == "packed"]
    for count in columns:
        for only in (1, 2, 3, 4, 8):
            yield packed(count, 1, only)
        for parts in (1, 2):
            yield packed(count, parts, 0)
        yield packed(count, 1, 0, squared=True)
    for kw, group in ((8, 128), (16, 64), (16, 32), (8, 32)):
        for parts in (1, 2):
            yield packed(columns[0], parts, 0, group, kw)
            yield packed(columns[-1], parts, 0, group, kw)
    yield packed(columns[0], 1, 0, fast=False)
    for parts in (1, 2):
        yield dense(parts)
    yield dense(1, squared=True)
    for only in (1, 2, 3, 4, 8, 0):
        yield unpacking(only)
    yield from small()


def show(row: Row) -> None:
    """One line a variant."""
    memory = {o: n for o, n in (row.loop or row.code).items() if o.startswith(MEMORY)}
    mma = sum(n for o, n in row.loop.items() if "MMA" in o)
    line = f"{row.name:36s} regs {row.registers:3d} spills {row.spills:2d} shared {row.shared:6d}"
    if row.loop:
        line += f" loop {sum(row.loop.values()):4d} MMA {mma:2d} issue {row.issue} tensor {row.tensor} cycles"
    if row.per_weight:
        line += f" = {row.per_weight} a weight"
    print(line, memory, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args()
    rows = []
    for row in report():
        show(row)
        rows.append(asdict(row))
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
