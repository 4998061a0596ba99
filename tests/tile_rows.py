"""The Triton kernels with tiles of another height, against float64, in the interpreter.

    TRITON_INTERPRET=1 python tests/tile_rows.py ROWS FOLDER

A copy of the kernels in FOLDER has the one line of layout.py edited; the reference packs tiles of as many rows.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

import torch
from stacks import random_stack

from gemq import format as fmt
from gemq import reference

KERNELS = Path(__file__).parent.parent / "triton_kernels"
BITS = [1, 2, 3, 4, 8, 0]


def edited(rows: int, folder: Path):
    """The kernels with tiles of so many rows, as a package of its own."""
    shutil.copytree(KERNELS, folder / "edited_kernels")
    layout = folder / "edited_kernels" / "layout.py"
    text, count = re.subn(r"^ROWS = \d+$", f"ROWS = {rows}", layout.read_text(), flags=re.MULTILINE)
    assert count == 1
    layout.write_text(text)
    sys.path.insert(0, str(folder))
    return importlib.import_module("edited_kernels")


def compare(name: str, out: torch.Tensor, expected: torch.Tensor) -> None:
    """Print the relative error; raise ``AssertionError`` above what float16 activations cost, twice in a block."""
    error = float((out.double() - expected).norm() / expected.norm())
    print(f"{name}: {error:.1e}")
    assert error <= 8e-4, name


def products(kernels) -> None:
    """The product of few and of many tokens, at every width."""
    prefill = importlib.import_module("edited_kernels.prefill_launch")
    launch_parameters = importlib.import_module("edited_kernels.launch_parameters")
    n, k, group = 136, 192, 64
    stack = random_stack(BITS, n, k, group, "gpu_tile", n)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [-1, 2]])
    x = torch.randn(4, k).half()
    options = {"n": n, "group_size": group}
    expected = reference.moe_lowbit_gemm(x, *stack, ids, layout="gpu_tile", compute_dtype=torch.float64, **options)
    compare("decode", kernels.moe_decode(x, *stack, ids, fast=True, **options), expected)
    for line in launch_parameters.table("default")["prefill"][::4]:
        launch = launch_parameters.Prefill(**{name: value for name, value in line.items() if name != "tokens"})
        out = torch.full_like(expected, float("nan"), dtype=torch.float16)
        prefill.gemm(x, stack, ids, None, n, group, out, False, launch)
        compare(launch.method, out, expected)


def blocks(kernels) -> None:
    """Whole blocks of experts: fused where a group fills tiles, else in two products."""
    for inner, group in ((256, 128), (96, 32)):
        gate_up = random_stack(BITS, 2 * inner, 128, 64, "gpu_tile", inner)
        down = random_stack(BITS[::-1], 128, inner, group, "gpu_tile", group)
        for tokens, op in ((3, kernels.ffn_decode), (17, kernels.moe_ffn)):
            ids, weights = torch.randint(0, len(BITS), (tokens, 2)), torch.rand(tokens, 2)
            x = torch.randn(tokens, 128).half()
            options = {"intermediate": inner, "group_size": 64, "down_group_size": group}
            expected = reference.moe_lowbit_ffn(
                x, gate_up, down, ids, weights, layout="gpu_tile", compute_dtype=torch.float64, **options
            )
            compare(f"block {inner} of {tokens}", op(x, gate_up, down, ids, weights, fast=True, **options), expected)


def main() -> None:
    rows = int(sys.argv[1])
    fmt.GPU_ROWS = rows
    kernels = edited(rows, Path(sys.argv[2]))
    assert rows == importlib.import_module("edited_kernels.layout").ROWS
    torch.manual_seed(rows)
    products(kernels)
    blocks(kernels)


if __name__ == "__main__":
    main()
