"""Stands in for ``gemq._C``: each call runs in emulated_core.cpp, built for another processor and run by its emulator.

Buffers go through a pipe and back, so their sizes are worked out here from the arguments. Arguments that no launcher
takes get buffers of no bytes: the launcher refuses them before it reads.
"""

from __future__ import annotations

import struct
import subprocess
import threading
from collections.abc import Sequence
from ctypes import memmove, string_at
from typing import NamedTuple

from gemq import format as fmt

LAYOUTS = ("canonical", "cpu_tile", "gpu_tile")
ELEMENT = (4, 2, 2)
# bytes of a buffer; sizes beyond are those of calls that are refused
LARGEST = 1 << 30


class Buffer(NamedTuple):
    """``size`` bytes at ``address``."""

    address: int
    size: int


class StackAddress(NamedTuple):
    """As ``gemq._C.StackAddress``."""

    codes: int
    meta: int
    bits: int
    offsets: int
    meta_offsets: int
    code_bytes: int
    meta_elements: int

    def buffers(self, experts: int) -> list:
        """The seven arguments of the launcher."""
        return [
            Buffer(self.codes, self.code_bytes), Buffer(self.meta, 2 * self.meta_elements),
            Buffer(self.bits, 4 * experts), Buffer(self.offsets, 8 * experts), Buffer(self.meta_offsets, 8 * experts),
            self.code_bytes, self.meta_elements,
        ]  # fmt: skip


def element(kind: int) -> int:
    """Bytes of an element of type ``kind``; 0 for what is none."""
    return ELEMENT[kind] if 0 <= kind < len(ELEMENT) else 0


def codes_bytes(n: int, k: int, bits: int, layout: str) -> int:
    """Bytes of a matrix; 0 for sizes that no matrix has."""
    return fmt.codes_bytes(n, k, bits, layout) if min(n, k) > 0 and 0 < bits <= 8 else 0


def meta_bytes(n: int, k: int, bits: int, group_size: int, layout: str) -> int:
    """Bytes of a matrix's metadata; 0 for sizes that no matrix has."""
    if min(n, k) <= 0 or not 0 < bits <= 8 or group_size not in fmt.GROUP_SIZES or k % group_size:
        return 0
    return 2 * fmt.meta_elements(n, k, bits, group_size, layout)


class EmulatedCore:
    """The functions of ``gemq._C`` that run on a CPU; ``command`` starts the program."""

    __file__ = __file__
    stack_address = StackAddress

    def __init__(self, command: Sequence[str]) -> None:
        self.command, self.calls, self.lock = list(command), 0, threading.Lock()
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    # gemq._C asks the processor that it was built for
    def cuda_built(self) -> bool:
        return False

    def build_info(self) -> dict:
        return {"cuda": None, "archs": [], "compiler": "GNU 0", "openmp": True, "cpu_variants": ("portable",)}

    def advise_huge_pages(self, at: int, bytes: int) -> None:
        pass

    def cpu_isa(self) -> str:
        try:
            self._call("cpu_isa")
        except ValueError as answer:
            return str(answer)
        raise AssertionError

    def set_cpu_isa(self, name: str) -> None:
        self._call("set_cpu_isa:" + name)

    def pack(self, *, device, src, dst, rows, k, bits, threads=1, stream=0) -> None:
        self._call("pack", device, Buffer(src, rows * k), Buffer(dst, codes_bytes(rows, k, bits, "canonical")), rows, k,
                   bits, threads, stream)  # fmt: skip

    def unpack(self, *, device, src, dst, rows, k, bits, threads=1, stream=0) -> None:
        self._call("unpack", device, Buffer(src, codes_bytes(rows, k, bits, "canonical")), Buffer(dst, rows * k), rows,
                   k, bits, threads, stream)  # fmt: skip

    def dequantize(self, *, device, src, meta, dst, rows, k, bits, group_size, out_dtype, threads=1, stream=0) -> None:
        sizes = (codes_bytes(rows, k, bits, "canonical"), meta_bytes(rows, k, bits, group_size, "canonical"))
        self._call("dequantize", device, Buffer(src, sizes[0]), Buffer(meta, sizes[1]),
                   Buffer(dst, rows * k * element(out_dtype)), rows, k, bits, group_size, out_dtype, threads,
                   stream)  # fmt: skip

    def repack(
        self, *, device, src_codes, src_meta, dst_codes, dst_meta, n, k, bits, group_size, layout, inverse=False,
        threads=1, stream=0,
    ) -> None:
        ends = ["canonical", LAYOUTS[layout] if 0 <= layout < len(LAYOUTS) else "canonical"]
        source, target = reversed(ends) if inverse else ends
        self._call("repack", device, Buffer(src_codes, codes_bytes(n, k, bits, source)),
                   Buffer(src_meta, meta_bytes(n, k, bits, group_size, source)),
                   Buffer(dst_codes, codes_bytes(n, k, bits, target)),
                   Buffer(dst_meta, meta_bytes(n, k, bits, group_size, target)), n, k, bits, group_size, layout,
                   int(inverse), threads, stream)  # fmt: skip

    def gptq_group(
        self, *, device, block, factor, bits, codes, meta, errors, matrices, n, group, clip, propagate_from, threads=1,
        stream=0,
    ) -> None:
        cells = matrices * n * group
        self._call("gptq_group", device, Buffer(block, 4 * cells), Buffer(factor, 4 * matrices * group * group),
                   Buffer(bits, 4 * matrices), Buffer(codes, cells), Buffer(meta, 4 * matrices * n),
                   Buffer(errors, 4 * cells), matrices, n, group, clip, propagate_from, threads, stream)  # fmt: skip

    def descend_codes(
        self, *, device, products, hessian, bits, meta, codes, matrices, n, group, threads=1, stream=0
    ) -> None:
        cells = matrices * n * group
        self._call("descend_codes", device, Buffer(products, 4 * cells), Buffer(hessian, 4 * matrices * group * group),
                   Buffer(bits, 4 * matrices), Buffer(meta, 4 * matrices * n), Buffer(codes, cells), matrices, n, group,
                   threads, stream)  # fmt: skip

    def moe_gemm_cpu(
        self, *, x, x_per_slot, stack, num_experts, topk_ids, topk_weights, out, tokens, top_k, k, n, group_size, type,
        precision, threads=1,
    ) -> None:
        pairs, size = tokens * top_k, element(type)
        out_size = size * n * (tokens if topk_weights else pairs)
        self._call("moe_gemm_cpu", Buffer(x, size * k * (pairs if x_per_slot else tokens)), int(x_per_slot),
                   *stack.buffers(num_experts), num_experts, Buffer(topk_ids, 8 * pairs),
                   Buffer(topk_weights, 4 * pairs), Buffer(out, out_size), tokens, top_k, k, n, group_size, type,
                   precision, threads)  # fmt: skip

    def moe_ffn_cpu(
        self, *, x, gate_up, down, num_experts, topk_ids, topk_weights, out, tokens, top_k, hidden, intermediate,
        group_size, down_group_size, type, precision, threads=1,
    ) -> None:
        pairs, rows = tokens * top_k, tokens * hidden * element(type)
        self._call("moe_ffn_cpu", Buffer(x, rows), *gate_up.buffers(num_experts), *down.buffers(num_experts),
                   num_experts, Buffer(topk_ids, 8 * pairs), Buffer(topk_weights, 4 * pairs), Buffer(out, rows), tokens,
                   top_k, hidden, intermediate, group_size, down_group_size, type, precision, threads)  # fmt: skip

    def lowbit_gemm_cpu(
        self, *, x, qweight, meta, out, tokens, k, n, bits, group_size, type, precision, threads=1
    ) -> None:
        self._call("lowbit_gemm_cpu", Buffer(x, tokens * k * element(type)),
                   Buffer(qweight, codes_bytes(n, k, bits, "cpu_tile")),
                   Buffer(meta, meta_bytes(n, k, bits, group_size, "cpu_tile")),
                   Buffer(out, tokens * n * element(type)), tokens, k, n, bits, group_size, type, precision,
                   threads)  # fmt: skip

    def _call(self, name: str, *arguments) -> None:
        message, sent = [struct.pack("<I", len(name)), name.encode(), struct.pack("<I", len(arguments))], []
        for argument in arguments:
            if isinstance(argument, Buffer) and argument.address:
                size = argument.size if 0 < argument.size < LARGEST else 0
                sent.append(Buffer(argument.address, size))
                message += [struct.pack("<cQQ", b"b", argument.address % 64, size), string_at(argument.address, size)]
                continue
            try:
                message.append(struct.pack("<cq", b"i", 0 if isinstance(argument, Buffer) else argument))
            except struct.error as error:
                raise TypeError(f"{name}(): incompatible function arguments: {argument!r}") from error
        with self.lock:
            self.calls += 1
            self.process.stdin.write(b"".join(message))
            self.process.stdin.flush()
            status = self._read(1)[0]
            if status:
                (length,) = struct.unpack("<I", self._read(4))
                text = self._read(length).decode()
                raise ValueError(text) if status == 1 else RuntimeError(text)
            for buffer in sent:
                memmove(buffer.address, self._read(buffer.size), buffer.size)

    def _read(self, size: int) -> bytes:
        data = self.process.stdout.read(size) if size else b""
        if len(data) != size:
            raise RuntimeError(f"{' '.join(self.command)} ended with status {self.process.wait()}")
        return data
