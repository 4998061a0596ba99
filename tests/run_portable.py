"""Run the tests that reach C++ on the portable kernels as another processor runs them (``make portable``).

Builds emulated_core.cpp with a cross compiler, starts it under an emulator and puts it in the place of ``gemq._C``:
``python tests/run_portable.py --compiler aarch64-linux-gnu-g++ --emulator qemu-aarch64 [pytest arguments]``.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from substitution import Substitute

TESTS = Path(__file__).resolve().parent
SOURCES = (
    "bind_gptq.cpp", "bind_moe.cpp", "bind_pack.cpp", "parallel.cpp", "gptq/group.cpp", "gptq/descent.cpp",
    "gptq/no_cuda.cpp",
    "moe_cpu/moe_ffn.cpp", "moe_cpu/moe_gemm.cpp", "moe_cpu/choose_variant.cpp", "pack/pack_cpu.cpp",
    "pack/packed_rows.cpp", "pack/repack_cpu.cpp", "pack/no_cuda.cpp",
)  # fmt: skip
# as CMakeLists.txt compiles them
KERNELS = (
    "moe_cpu/exact.cpp", "moe_cpu/integer.cpp", "moe_cpu/activation_vectors.cpp", "gptq/column_loop_vectors.cpp",
    "gptq/descent_vectors.cpp", "decode/step_vectors.cpp",
)  # fmt: skip
KERNEL_FLAGS = ("-O3", "-ffp-contract=fast", "-Wno-psabi", "-DGEMQ_VARIANT=portable", "-DGEMQ_KERNELS=kPortableKernels")
FILES = (
    "test_core_bits.py", "test_core_moe.py", "test_core_properties.py", "test_core_threads.py",
    "test_cpu_activations.py", "test_gptq.py", "test_ops.py", "test_ops_errors.py", "test_op_sweep.py",
)  # fmt: skip


def build(compiler: str, folder: Path) -> Path:
    """The program, linked statically so that the emulator needs no foreign libraries."""
    csrc = TESTS.parent / "csrc"
    flags = [*shlex.split(compiler), "-std=c++17", "-Wall", "-Wextra", "-fopenmp", f"-I{csrc}", f"-I{csrc / 'include'}"]
    jobs = [(csrc / name, KERNEL_FLAGS) for name in KERNELS]
    jobs += [(path, ("-O2",)) for path in (*(csrc / name for name in SOURCES), TESTS / "emulated_core.cpp")]
    objects = []
    for number, (source, extra) in enumerate(jobs):
        objects.append(str(folder / f"{number}.o"))
        subprocess.run([*flags, *extra, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "emulated_core"
    subprocess.run([*flags, "-static", *objects, "-o", str(program)], check=True)
    return program


def emulated(command: list[str]):
    """The stand-in for the extension; imports gemq."""
    from emulated_core import EmulatedCore

    return EmulatedCore(command)


def main() -> int:
    """pytest's exit status; 2 if what it needs is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("--emulator", default="qemu-aarch64", help="the program that runs it; empty for none")
    options, given = parser.parse_known_args()
    for tool in (*shlex.split(options.compiler)[:1], *shlex.split(options.emulator)[:1]):
        if shutil.which(tool) is None:
            print(f"{tool} is not here; Debian has it in g++-aarch64-linux-gnu and qemu-user", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as folder:
        program = build(options.compiler, Path(folder))
        substitute = Substitute(lambda: emulated([*shlex.split(options.emulator), str(program)]))
        arguments = given or ["-q", *(str(TESTS / name) for name in FILES)]
        status = int(pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[substitute]))
        described = subprocess.run(["file", "-b", str(program)], capture_output=True, text=True).stdout.split(",")[:2]
    print(f"{substitute.core.calls} calls in {options.emulator or 'place'}:{','.join(described)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
