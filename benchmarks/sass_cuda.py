"""Compile the CUDA C++ kernels for sm_90 without a GPU and report their registers, spills and memory instructions.

    python benchmarks/sass_cuda.py [--json report.json]

Per kernel: registers, bytes of spills and of stack, shared memory, global loads and stores by width in bits, and the
length of the longest loop. Static figures: they say nothing about speed, but they do not vary, so a test holds them.
Needs nvcc; cuobjdump is the one on PATH or triton's.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pack/pack", "pack/dequantize", "pack/repack", "gptq/group", "gptq/descent")
FLAGS = ("-std=c++17", "-O3", "-arch=sm_90", "--extended-lambda", "--expt-relaxed-constexpr", "-cubin")


@dataclass
class Kernel:
    """Machine code of one kernel; ``loads`` and ``stores`` count instructions on global memory by width in bits."""

    name: str
    registers: int
    spills: int
    local: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    loop: int


def nvcc() -> str | None:
    """The CUDA compiler, where there is one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuobjdump() -> str | None:
    """The disassembler, where there is one."""
    found = shutil.which("cuobjdump")
    if found is None and (compiler := nvcc()):
        found = shutil.which("cuobjdump", path=str(Path(compiler).resolve().parent))
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    return found


def _digest(compiler: str) -> str:
    """Digest of everything that the cubins depend on."""
    digest = hashlib.sha256(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    for path in sorted([*ROOT.glob("csrc/pack/*"), *ROOT.glob("csrc/gptq/*"), *ROOT.glob("csrc/include/gemq/*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join(FLAGS).encode())
    return digest.hexdigest()[:24]


def compile_all() -> list[Path]:
    """The cubins of all sources, compiled side by side, or those of an earlier call with the same text."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was found neither on PATH nor in CUDA_HOME/bin")
    folder = Path(tempfile.gettempdir()) / f"gemq-sass-{os.getuid()}-{_digest(compiler)}"
    folder.mkdir(mode=0o700, exist_ok=True)
    cubins, running = [folder / f"{Path(name).name}.cubin" for name in SOURCES], []
    for source, cubin in zip(SOURCES, cubins, strict=True):
        if cubin.exists():
            continue
        begun = cubin.with_suffix(f".{os.getpid()}.tmp")
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
        command = [compiler, *FLAGS, *includes, "-o", str(begun), str(ROOT / "csrc" / f"{source}.cu")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append((cubin, begun, subprocess.Popen(command, **pipes)))
    for cubin, begun, process in running:
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"nvcc refused {cubin.stem}.cu:\n{said}")
        begun.replace(cubin)
    return cubins


def readable(mangled: str) -> str:
    """``PackTile<3>`` from the mangled name of ``body_kernel<PackTile<3>>``."""
    body = re.search(r"body_kernelINS_(\d+)", mangled)
    if body is None:
        plain = re.search(r"_GLOBAL__N__\w+?\d((?:quantize|descend)_rows)E", mangled)
        return plain[1] if plain else mangled
    start = body.end()
    name, rest = mangled[start : start + int(body[1])], mangled[start + int(body[1]) :]
    numbers = [("false", "true")[int(n)] if kind == "b" else n for kind, n in re.findall(r"L([ib])(\d+)E", rest)]
    types = re.findall(r"NS_\d+(Float\d+|BFloat\d+)E", rest)
    arguments = ", ".join([*numbers, *types])
    return f"{name}<{arguments}>" if arguments else name


def _dump(flag: str, cubin: Path) -> str:
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump was found neither on PATH nor beside nvcc nor in triton")
    return subprocess.run([tool, flag, str(cubin)], capture_output=True, text=True, check=True).stdout


def _width(opcode: str) -> int:
    found = re.search(r"\.(128|64|U16|S16|U8|S8)(?:\.|$)", opcode)
    return int(found[1].lstrip("US")) if found else 32


def _longest_loop(code: list[tuple[int, str, str]]) -> int:
    """Instructions of the longest stretch that a backward branch repeats."""
    places = {at: index for index, (at, _, _) in enumerate(code)}
    lengths = [0]
    for index, (at, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        # the last branch of every kernel is to itself
        if target and int(target[1], 16) < at and int(target[1], 16) in places:
            lengths.append(index - places[int(target[1], 16)] + 1)
    return max(lengths)


def kernels(cubin: Path) -> list[Kernel]:
    """Every kernel of a cubin."""
    usage = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", _dump("-res-usage", cubin)):
        usage[name] = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", line)}
    found = []
    for part in _dump("-sass", cubin).split("Function : ")[1:]:
        mangled = part.split(None, 1)[0]
        lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", part)
        code = [(int(at, 16), opcode, operands) for at, opcode, operands in lines]
        opcodes = [opcode for _, opcode, _ in code if opcode != "NOP"]
        used = usage[mangled]
        found.append(Kernel(
            name=readable(mangled), registers=used["REG"], local=used["LOCAL"] + used["STACK"],
            spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes), shared=used["SHARED"],
            loads=dict(sorted(collections.Counter(_width(x) for x in opcodes if x.startswith("LDG")).items())),
            stores=dict(sorted(collections.Counter(_width(x) for x in opcodes if x.startswith("STG")).items())),
            instructions=len(opcodes), loop=_longest_loop(code),
        ))  # fmt: skip
    return sorted(found, key=lambda kernel: kernel.name)


def report() -> list[Kernel]:
    """Report all kernels of all sources."""
    return [kernel for cubin in compile_all() for kernel in kernels(cubin)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    rows = report()
    for r in rows:
        print(
            f"{r.name:30s} regs {r.registers:3d} spills {r.spills} local {r.local} shared {r.shared:6d}"
            f"  instructions {r.instructions:5d} loop {r.loop:4d}  loads {r.loads}  stores {r.stores}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
