"""Compile every kernel variant for sm_90 without a GPU and count what ptxas made of it.

    python benchmarks/sass_report.py [--json report.json] [--quick]

Instructions per weight are those of the innermost long loop over the weights that one trip of it reads. The figures
are static: they say nothing about stalls, but they do not vary, so a test can hold them.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGET = GPUTarget("cuda", 90, 32)


@dataclass
class Row:
    """Machine code of one variant; ``global_loads`` counts LDG by width within the loop."""

    name: str
    registers: int
    spills: int
    shared: int
    loop: int
    per_weight: float | None
    global_loads: dict[str, int]
    top: dict[str, int]


def compile_kernel(kernel, pointers: dict[str, str], constants: dict, warps: int, stages: int = 1):
    """``kernel`` for sm_90: ``pointers`` types the pointer arguments; what is not a constant, and has no default, is an
    i32."""
    names = kernel.arg_names
    parameters = kernel.signature.parameters.items()
    left_out = {a: p.default for a, p in parameters if p.default is not p.empty and a not in pointers}
    constants = left_out | constants
    signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in names}
    divisible = {*pointers, "n", "k", "k_padded", "act_padded", "stride", "n_padded"} - {*constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names) if a in divisible}
    values = {(names.index(a),): v for a, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})


def _tool(name: str, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return subprocess.run([TOOLS / name, flag, file.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)


def _instructions(sass: str) -> list[tuple[str, str]]:
    out = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            out.append(("LABEL", label.group(1)))
            continue
        found = re.search(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", line)
        if found:
            out.append((found.group(1), found.group(2)))
    return out


def loops(sass: str) -> list[list[str]]:
    """Bodies of the backward branches that hold a tensor-core instruction, opcodes only, longest first."""
    code = _instructions(sass)
    labels = {x[1]: i for i, x in enumerate(code) if x[0] == "LABEL"}
    bodies = []
    for i, (opcode, rest) in enumerate(code):
        target = re.search(r"(\.L_x_\d+)", rest) if opcode.startswith("BRA") else None
        if target and labels.get(target.group(1), i) < i:
            body = [x[0] for x in code[labels[target.group(1)] : i + 1] if x[0] != "LABEL"]
            if any(x.startswith("HMMA") for x in body):
                bodies.append(body)
    return sorted(bodies, key=len, reverse=True)


def measure(name: str, compiled, weights: float | None) -> Row:
    """``weights``: weights a lane handles in one trip of the loop, None to skip the quotient."""
    cubin = compiled.asm["cubin"]
    sass = _tool("nvdisasm", "-c", cubin)
    usage = _tool("cuobjdump", "-res-usage", cubin)
    code = [x[0] for x in _instructions(sass) if x[0] != "LABEL"]
    bodies = loops(sass)
    body = bodies[0] if bodies else []
    spills = sum(x.startswith(("STL", "LDL")) for x in code)
    widths = collections.Counter(
        (re.search(r"\.(128|64|U16|U8)", x) or [None, "32"])[1] for x in body if x.startswith("LDG")
    )
    top = collections.Counter(x.split(".")[0] for x in body).most_common()
    return Row(
        name, max(map(int, re.findall(r"REG:(\d+)", usage))), spills, compiled.metadata.shared, len(body),
        round(len(body) / weights, 2) if weights and body else None, dict(sorted(widths.items())), dict(top),
    )


POINTERS = {
    "x_ptr": "*fp16", "groups_ptr": "*fp32", "codes_ptr": "*i32", "meta_ptr": "*i32", "bits_ptr": "*i32",
    "offsets_ptr": "*i64", "meta_offsets_ptr": "*i64", "expert_ptr": "*i32", "pairs_ptr": "*i32", "act_ptr": "*fp16",
    "act_groups_ptr": "*fp32", "down_bits_ptr": "*i32", "ids_ptr": "*i64", "weights_ptr": "*fp32",
    "arrived_ptr": "*i32", "partial_ptr": "*fp32", "out_ptr": "*fp16",
}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a decode kernel; ``only`` 0 is all widths, ``mode`` 2 the fp16 bit tricks, 0 plain."""

    kernel: str
    only: int
    columns: int
    warps: int = 4
    mode: int = 2
    splits: int = 4
    slots: int = 2
    tiles: int = 2
    ahead: int = 2
    group: int = 128
    kw: int = 16
    pdl: bool = False
    dense: int = 0
    # arguments that are 1, which triton compiles as constants
    ones: tuple[str, ...] = ()
    # numbers of an activation other than SiLU; parts 1: squared ReLU, without a gate
    gating: tuple[float, ...] = ()
    parts: int = 2
    bias: bool = False

    @property
    def name(self) -> str:
        parts = [self.kernel, f"{self.only} bit" if self.only else "mixed", f"{self.columns} columns", f"w{self.warps}"]
        parts += ["plain"] * (self.mode == 0) + [f"ahead {self.ahead}"] * (self.ahead != 2) + ["pdl"] * self.pdl
        parts += [f"dense {self.dense}"] * bool(self.dense) + ["another gating"] * bool(self.gating)
        parts += ["no gate"] * (self.parts == 1) + ["biased"] * self.bias
        parts += [f"kw{self.kw} g{self.group}"] * ((self.kw, self.group) != (16, 128))
        return " ".join(parts)


def variant(v: Variant) -> Row:
    """Compile one variant and measure it."""
    from gemq.triton_kernels.activation import Gating
    from gemq.triton_kernels.decode_kernels import gate_up_kernel, product_kernel
    from gemq.triton_kernels.decode_tile import rows_at_once
    from gemq.triton_kernels.launch_parameters import fragment_run
    from gemq.triton_kernels.layout import ROWS, WIDTHS, span_columns
    from gemq.triton_kernels.widths import Decode

    how = Decode(
        kws=(v.kw,) * len(WIDTHS), group=v.group, columns=v.columns, warps=v.warps, tiles=1, parts=1, splits=v.splits,
        mode=v.mode, asm=True, ahead=v.ahead, run=fragment_run(triton.__version__), planes=False, pdl=v.pdl,
        only=v.only,
    )
    constants = dict.fromkeys(v.ones, 1)
    pointers = POINTERS | ({"bias_ptr": "*fp32"} if v.bias else {})
    if v.kernel == "gate_up":
        how = how._replace(tiles=v.tiles, parts=v.parts, splits=1, planes=v.mode == 2)
        constants |= {"HOW": how, "ACT_KWS": how.kws, "ACT_GROUP": ROWS * v.tiles}
        constants |= {"GATING": Gating(*v.gating)} if v.gating else {}
        compiled = compile_kernel(gate_up_kernel, pointers, constants, v.warps)
    else:
        constants |= {"HOW": how, "SLOTS": v.slots, "DENSE": v.dense}
        compiled = compile_kernel(product_kernel, pointers, constants, v.warps)
    # a warp handles so many rows of one span a trip
    weights = rows_at_once(v.only, v.columns) * span_columns(v.only, v.kw) / 32 if v.only else None
    return measure(v.name, compiled, weights)


def shipped(quick: bool) -> list[Variant]:
    """The variants that the launch tables choose."""
    from gemq.triton_kernels.layout import WIDTHS

    single = [Variant(k, b, c) for k in ("gate_up", "product") for c in (8, 16) for b in WIDTHS]
    mixed = [Variant(k, 0, c) for k in ("gate_up", "product") for c in (8, 16)]
    others = [
        Variant("product", 0, 8, mode=0), Variant("gate_up", 0, 8, mode=0), Variant("gate_up", 0, 8, warps=8),
        Variant("product", 0, 8, warps=8), Variant("product", 0, 8, ahead=0), Variant("gate_up", 0, 8, pdl=True),
        Variant("product", 4, 8, dense=4, slots=0), Variant("product", 3, 8, dense=3, slots=0),
    ]
    return mixed if quick else single + mixed + others


def show(row: Row) -> None:
    """One line a variant."""
    ratio = "" if row.per_weight is None else f" = {row.per_weight:.2f} a weight"
    print(
        f"{row.name:34s} regs {row.registers:3d} spills {row.spills} shared {row.shared:6d} loop {row.loop:5d}{ratio}"
        f"  LDG {row.global_loads}  {dict(list(row.top.items())[:12])}", flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--quick", action="store_true", help="the kernels of all widths alone")
    args = parser.parse_args()
    rows = []
    for v in shipped(args.quick):
        rows.append(variant(v))
        show(rows[-1])
    if not args.quick:
        import sass_prefill

        for row in sass_prefill.report():
            sass_prefill.show(row)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": [asdict(r) for r in rows]}, indent=1))


if __name__ == "__main__":
    main()
