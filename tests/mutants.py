"""Faults planted one at a time in a copy of the sources: for each, a quick test must fail (``make mutants``).

A mutant is ``(name, file, old, new, tests)``; ``old`` occurs exactly once in ``file``, which test_mutants.py holds.
Python mutants run at once, those of C++ after a rebuild of what they touch. First the tests run on the unchanged copy:
there they must pass, or their failing would say nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# seconds that the tests of one mutant may take; a mutant that hangs is noticed by that
LONGEST = 900


class Mutant(NamedTuple):
    """One fault: ``old`` in ``file`` becomes ``new``, and one of ``tests`` (as pytest takes them) must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        """True if the extension must be built again."""
        return self.file.startswith("csrc/")

    @property
    def interpreted(self) -> bool:
        """True if its tests run in Triton's interpreter."""
        return self.file.startswith("triton_kernels/")


ALLOCATION, GPTQ, IMPORTANCE = ("tests/test_allocation.py",), ("tests/test_gptq.py",), ("tests/test_importance.py",)
BITS, PROGRESSIVE = ("tests/test_core_bits.py",), ("tests/test_progressive.py",)
GPTQ_IMPORT = ("tests/test_gptq_import.py",)
DECODE = ("tests/test_decode_program.py",)
OPERATIONS = ("tests/test_decode_operations.py",)
CHECKPOINT = ("tests/test_checkpoint.py", "tests/test_checkpoint_config.py")
MUTANTS = (
    Mutant("packing: the last codes of a row one bit off", "csrc/include/gemq/bits.h",
           "if (i < count) value |= static_cast<uint64_t>(codes[i] & ((1 << BITS) - 1)) << (BITS * i);",
           "if (i < count) value |= static_cast<uint64_t>(codes[i] & ((1 << BITS) - 1)) << (BITS * i + (i > 5));",
           BITS),
    Mutant("packing: a row one byte short", "csrc/include/gemq/bits.h",
           "return (k * bits + 7) / 8; }", "return (k * bits + 6) / 8; }", BITS),
    Mutant("repacking: padding from one row too late", "csrc/pack/repack_rows.h",
           "a.dst_meta[to.m] = row < a.n ? a.src_meta[from.m] : 0;",
           "a.dst_meta[to.m] = row < a.n - 1 ? a.src_meta[from.m] : 0;", BITS),
    Mutant("dequantizing (kernel body): the group one too far", "csrc/pack/pack_body.h",
           "const uint32_t pair = shared.pairs[v * kEach >> log2];",
           "const uint32_t pair = shared.pairs[(v * kEach + kEach) >> log2];",
           ("tests/test_pack_emulated.py",)),
    Mutant("compiled GPTQ: propagation leaves out a column's errors", "csrc/gptq/column_loop.h",
           "for (int i = 0; i < kTogether; ++i) value -= values[i]",
           "for (int i = 1; i < kTogether; ++i) value -= values[i]", GPTQ),
    Mutant("compiled descent: a changed code does not reach later columns", "csrc/gptq/column_loop.h",
           "take_off_later(products, rows, first, group, changes);", "", ("tests/test_refinement.py",)),
    Mutant("compiled clip search: the scale of the worse grid", "csrc/gptq/column_loop.h",
           "grid.s = error < best ? tried.s : grid.s;", "grid.s = error < best ? grid.s : tried.s;", GPTQ),
    Mutant("products: metadata of the block before", "csrc/moe_cpu/projection.h",
           "stack.meta + stack.meta_offsets[e] + block * halves,",
           "stack.meta + stack.meta_offsets[e] + (block > 0 ? block - 1 : 0) * halves,", ("tests/test_core_moe.py",)),
    Mutant("products: many tokens against the columns of the group before", "csrc/moe_cpu/exact.cpp",
           "panel_all(panel, a, static_cast<int64_t>(g) * a.group_size, out);",
           "panel_all(panel, a, static_cast<int64_t>(g > 0 ? g - 1 : 0) * a.group_size, out);",
           ("tests/test_core_moe.py",)),
    Mutant("Triton: metadata of the next group", "triton_kernels/decode_tile.py",
           "at = _threads(tl.minimum(g, last_group) * TILE_ROWS, RUN)",
           "at = _threads(tl.minimum(g + 1, last_group) * TILE_ROWS, RUN)",
           ("tests/triton_cases.py::test_padded_columns",)),
    Mutant("decode step: padding is attended to", "csrc/decode/kv_chunks.h",
           "return {step.starts[row], step.slot + 1};", "return {0, step.slot + 1};", DECODE),
    Mutant("decode step: chunks of the cache weigh the same", "csrc/decode/kv_chunks.h",
           "*from.most == most ? 1.0f : std::exp(*from.most - most)", "1.0f", DECODE),
    Mutant("decode step: a window forgets its newest token", "csrc/decode/kv_chunks.h",
           "std::min(step.positions[row] + 1, slots_)", "std::min(step.positions[row], slots_)", OPERATIONS),
    Mutant("decode step: no sink beside the chunks", "csrc/decode/kv_chunks.h",
           "sink == -INFINITY ? 0.0f : std::exp(sink - most)", "0.0f", OPERATIONS),
    Mutant("decode step: the delta rule reads the old state", "csrc/decode/recurrent_vectors.cpp",
           "a.decay * read[v] + agreement * change[v]", "a.decay * read[v]", OPERATIONS),
    Mutant("decode step: Mamba's convolution does not move on", "csrc/decode/recurrent_vectors.cpp",
           "store(past, t + 1 < last ? load<Float>(past + a.stride) : x);", "", OPERATIONS),
    Mutant("decode step: routing weights with the bias of the choice", "csrc/decode/routing.cpp",
           "weights[i] = s.scores[e];", "weights[i] = s.choice[e];", DECODE),
    Mutant("decode step: the last columns without their bias", "csrc/decode/linear.cpp",
           "m.bias.empty() ? from[i] : from[i] + m.bias[first + i]",
           "m.bias.empty() || width < kBlockRows ? from[i] : from[i] + m.bias[first + i]", DECODE),
    Mutant("experts: offsets counted after the expert", "python/gemq/format.py",
           "        codes.append(code_at)\n        metas.append(meta_at)\n",
           "        codes.append(code_at + (1 if index else 0))\n        metas.append(meta_at)\n",
           ("tests/test_ops.py::test_a_stack_comes_back", "tests/test_nn.py")),
    Mutant("experts: metadata of the expert before", "python/gemq/ops/expert_buffers.py",
           "        out_meta[new.meta_offsets[e] : new.meta_offsets[e] + part_meta.numel()] = part_meta",
           "        out_meta[new.meta_offsets[max(e - 1, 0)] :][: part_meta.numel()] = part_meta",
           ("tests/test_nn.py",)),
    Mutant("grid: a group's range without zero", "python/gemq/reference/grid.py",
           "low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)",
           "low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)", GPTQ),
    Mutant("grid: clip search keeps the worst", "python/gemq/reference/grid.py",
           "        better = error < best\n", "        better = (error > best) | best.isinf()\n", GPTQ),
    Mutant("program: one bit more than the budget", "python/gemq/algorithms/program.py",
           "left = float(self.total - self.sizes[settled].sum())",
           "left = float(self.total + 1 - self.sizes[settled].sum())", ALLOCATION),
    Mutant("program: one bit less than the budget", "python/gemq/algorithms/allocation.py",
           "total = (budget * units.experts - units.reserved) * costs.routed.shape[0] + BUDGET_SLACK",
           "total = (budget * units.experts - units.reserved) * costs.routed.shape[0] - 1", ALLOCATION),
    Mutant("program: a shared expert counts as a routed one", "python/gemq/algorithms/program.py",
           "return self.units[:, None] * np.asarray", "return np.ones_like(self.units[:, None]) * np.asarray",
           ALLOCATION),
    Mutant("program: no expert at the second highest width", "python/gemq/algorithms/program.py",
           "in itertools.product(zip(layers, done, strict=True), self.kept):",
           "in itertools.product(zip(layers, done, strict=True), self.kept[:1]):", ALLOCATION),
    Mutant("program: a bit of down counts as one of gate and up", "python/gemq/algorithms/allocation.py",
           "_THIRDS = (2.0, 1.0)", "_THIRDS = (1.5, 1.5)", ("tests/test_granularity.py",)),
    Mutant("program: down by the costs of gate and up", "python/gemq/algorithms/allocation.py",
           "parts = [costs.matrices[:, :, which].reshape(", "parts = [costs.matrices[:, :, 0].reshape(",
           ("tests/test_granularity.py",)),
    Mutant("coefficients: down alone behind quantized gate and up", "python/gemq/engine/layer_importance.py",
           "inner.expand_as(given) if part == DOWN else given", "given", IMPORTANCE),
    Mutant("a packed layer: down with the widths of gate and up", "python/gemq/nn/experts.py",
           '"down_proj": list(bits if down_bits is None else down_bits)', '"down_proj": list(bits)',
           ("tests/test_granularity.py",)),
    Mutant("reduction: too much is dropped", "python/gemq/algorithms/reduction.py",
           "keep = lifted <= objective + margin", "keep = lifted <= bound + margin", ALLOCATION),
    Mutant("GPTQ: errors reach the later groups with the wrong sign", "python/gemq/algorithms/gptq.py",
           "values = torch.baddbmm(values, left, inverse)", "values = torch.baddbmm(values, left, inverse, alpha=-1)",
           GPTQ),
    Mutant("GPTQ: what is carried leaves out the groups before", "python/gemq/algorithms/gptq.py",
           "torch.bmm(errors - left, inverse, out=carried[..., here])",
           "torch.bmm(errors, inverse, out=carried[..., here])", GPTQ),
    Mutant("GPTQ: the factor without what later columns explain", "python/gemq/algorithms/gptq.py",
           "        if stop < size:\n", "        if stop + group_size < size:\n", GPTQ),
    Mutant("GPTQ: the reported loss with its damping", "python/gemq/algorithms/gptq.py",
           "            loss -= (carried[..., here].square().sum(-2) * factor.added[:, here]).sum(-1)\n", "", GPTQ),
    Mutant("coefficients: without the routing weight", "python/gemq/engine/layer_importance.py",
           "g, window = gradient[token].float() * scale,", "g, window = gradient[token].float(),", IMPORTANCE),
    Mutant("coefficients: squared after the sum over dimensions", "python/gemq/algorithms/layer_costs.py",
           "return float((gradient * change).double().square().sum())",
           "return float((gradient * change).double().sum(-1).square().sum())", IMPORTANCE),
    Mutant("coefficients: the loss averaged over one token too many", "python/gemq/engine/layers.py",
           "loss = token_losses(moe.model, window).mean()",
           "loss = token_losses(moe.model, window).sum() / window.shape[1]", IMPORTANCE),
    Mutant("progression: from the lowest budget up", "python/gemq/engine/progression.py",
           "enumerate(sorted(method.budgets, reverse=True))", "enumerate(sorted(method.budgets))", PROGRESSIVE),
    Mutant("routing: weights in the order of the experts", "python/gemq/reference/moe.py",
           'return torch.einsum("tkn,tk->tn", out, scale)', 'return torch.einsum("tkn,tk->tn", out, scale.flip(1))',
           ("tests/test_core_moe.py",)),
    Mutant("routing: an id one beyond the experts counts", "python/gemq/ops/backends.py",
           "valid = (topk_ids >= 0) & (topk_ids < stack[2].numel())",
           "valid = (topk_ids >= 0) & (topk_ids <= stack[2].numel())", ("tests/test_ops.py",)),
    Mutant("checkpoint: the digest is not compared", "python/gemq/packed_config.py",
           'if data.get("digest") != _digest(stored):', 'if data.get("digest") is None:', CHECKPOINT),
    Mutant("checkpoint: correction biases rounded like weights", "python/gemq/packed_model.py",
           "as_is = packed | kept_in_float32(model)", "as_is = packed",
           ("tests/test_families.py::test_correction_biases_stay_in_float32",)),
    Mutant("verify: sums are not compared", "python/gemq/integrity.py",
           'return None if _sha256(file) == entry["sha256"] else "differs from its SHA-256"', "return None",
           CHECKPOINT),
    Mutant("scratch: rows of the first batch for all", "python/gemq/engine/scratch.py",
           'np.uint8, "c", offset, (count,))', 'np.uint8, "c", 0, (count,))', ("tests/test_engine_files.py",)),
    Mutant("reader: a header may claim more than the file", "python/gemq/integrity.py",
           "    if end != size:", "    if end > size:", CHECKPOINT),
    Mutant("reader: links are followed", "python/gemq/integrity.py",
           "if real.parent not in (folder, blobs):", "if not real.name:", ("tests/test_robustness.py",)),
    Mutant("GPTQ import: zero points as they are stored", "python/gemq/interchange/gptq_tensors.py",
           "zeros = (zeros + 1) & (2**bits - 1)", "zeros = zeros & (2**bits - 1)", GPTQ_IMPORT),
    Mutant("GPTQ import: up before gate", "python/gemq/interchange/gptq_checkpoint.py",
           '("gate_up_proj", ("gate", "up"))', '("gate_up_proj", ("up", "gate"))', GPTQ_IMPORT),
    Mutant("GPTQ import: scales of a group repeated as a whole", "python/gemq/interchange/gptq_tensors.py",
           "meta.repeat_interleave(shape.group // group_size, dim=1)", "meta.repeat(1, shape.group // group_size, 1)",
           GPTQ_IMPORT),
    Mutant("export: metadata of the first expert for all", "python/gemq/interchange/export.py",
           "codes[at:], meta[meta_at:], width", "codes[at:], meta, width", ("tests/test_export.py",)),
    Mutant("pickles: any name of numpy is looked up", "python/gemq/interchange/plain_pickles.py",
           "if (module, name) not in STAND_INS:", "if (module, name) not in STAND_INS and module != 'numpy':",
           ("tests/test_allocation_files.py::test_nothing_in_a_pickle_is_run",)),
    Mutant("given widths: the shared expert's as a routed one's", "python/gemq/algorithms/given_allocation.py",
           "(table[:, :experts], table[:, experts])", "(table[:, 1:], table[:, 0])",
           ("tests/test_allocation_files.py",)),
    Mutant("serving: experts kept in the order of the file", "python/gemq/serving/vllm_methods.py",
           "return [local[slot] for slot in range(num_experts)]", "return sorted(local.values())",
           ("tests/test_serving.py",)),
    Mutant("serving: experts elsewhere are this rank's first", "python/gemq/serving/packed_layers.py",
           "return torch.where(inside, mapped.to(topk_ids.dtype), -1)",
           "return torch.where(inside, mapped.to(topk_ids.dtype), -1).clamp(min=0)", ("tests/test_serving.py",)),
    Mutant("serving: what did not arrive is not missed", "python/gemq/serving/packed_layers.py",
           "    if missing:\n", "    if False:\n", ("tests/test_serving.py",)),
)


class Scratch:
    """A copy of the tracked sources, whose Python package and, once built, extension the tests import."""

    def __init__(self, folder: Path):
        self.root, self.extension = folder / "gemq", None
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)
        link = self.root / "python" / "gemq" / "triton_kernels"
        if not link.exists():
            link.symlink_to(self.root / "triton_kernels")

    def build(self) -> None:
        """Build the extension of the copy, without CUDA; later calls only what changed."""
        out = self.root / "build" / "mutants"
        if not (out / "build.ninja").exists():
            tools = Path(sys.executable).parent
            where = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
            self._do(str(tools / "cmake"), "-S", str(self.root), "-B", str(out), "-G", "Ninja", "-DGEMQ_CUDA=OFF",
                     "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
                     f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-Dpybind11_DIR={where.stdout.strip()}")
        self._do(str(Path(sys.executable).parent / "cmake"), "--build", str(out))
        (self.extension,) = out.glob("_C*.so")

    def _do(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")

    def failing(self, tests: tuple[str, ...], interpreted: bool, seconds: float | None = LONGEST) -> str | None:
        """The first test that fails, "a hang" for none in ``seconds``, or None. In Triton's interpreter if asked."""
        inside = [sys.executable, str(self.root / "tests" / "mutants.py"), "--inside", str(self.extension or "-")]
        env = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
        run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=self.root, env=env)
        try:
            done = run([*inside, *tests], timeout=seconds)
        except subprocess.TimeoutExpired:
            return "a hang"
        if done.returncode == 0:
            return None
        found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return found[0] if found else f"the process (exit {done.returncode}): {done.stderr.strip()[-200:]}"


class Substitute:
    """Loads the copy's package and extension before any test module is imported."""

    def __init__(self, extension: str) -> None:
        self.extension = extension

    # before the conftest, which imports the package
    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self) -> None:
        import importlib.util

        # the finder of the editable install leads to the original sources
        sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
        sys.path.insert(0, str(ROOT / "python"))
        if self.extension == "-":
            self.extension = next(str(p) for path in sys.path for p in Path(path).glob("gemq/_C*.so"))
        import torch  # noqa: F401  (first, as in gemq._core)

        spec = importlib.util.spec_from_file_location("gemq._C", self.extension)
        sys.modules["gemq._C"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["gemq._C"])
        import gemq

        if not Path(gemq.__file__).is_relative_to(ROOT):
            raise SystemExit(f"the tests would run {gemq.__file__}")


def run_inside(extension: str, tests: list[str]) -> int:
    """pytest on the package and the extension of the copy this file lies in."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    return int(pytest.main([*options, *tests], plugins=[Substitute(extension)]))


def main() -> int:
    """Plant every mutant, print the table, and fail if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("all", "python", "compiled"), default="all")
    parser.add_argument("--only", help="mutants whose name holds this")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests on the unchanged copy first")
    options = parser.parse_args()
    chosen = [
        m for m in MUTANTS
        if options.kind in ("all", "compiled" if m.compiled else "python") and (options.only or "") in m.name
    ]
    began, survived = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        if any(m.compiled for m in chosen):
            scratch.build()
        if not options.no_baseline:
            for interpreted in {m.interpreted for m in chosen}:
                tests = {test for m in chosen if m.interpreted == interpreted for test in m.tests}
                if broken := scratch.failing(tuple(sorted(tests)), interpreted, None):
                    raise SystemExit(f"{broken} fails without any mutant")
        print(f"{'mutant':<60} {'s':>5}  noticed by", flush=True)
        for mutant in sorted(chosen, key=lambda m: m.compiled):
            started, file = time.monotonic(), scratch.root / mutant.file
            good = file.read_text(encoding="utf-8")
            file.write_text(good.replace(mutant.old, mutant.new), encoding="utf-8")
            if mutant.compiled:
                scratch.build()
            noticed = scratch.failing(mutant.tests, mutant.interpreted)
            survived += noticed is None
            file.write_text(good, encoding="utf-8")
            print(f"{mutant.name:<60} {time.monotonic() - started:5.0f}  {noticed or 'NOTHING'}", flush=True)
    print(f"{len(chosen)} mutants, {survived} survived, {time.monotonic() - began:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(run_inside(sys.argv[2], sys.argv[3:]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
