"""Shapes of the MoE benchmark: expert blocks of known models, mixes of widths, and the cases in order of value."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

SHARED_BITS = 4
GROUP = 128


@dataclass(frozen=True)
class Block:
    """An expert block as its model has it; ``shared`` is the width of the shared experts together, 0 for none."""

    name: str
    hidden: int
    ffn: int
    experts: int
    top_k: int
    shared: int = 0

    def flops(self, tokens: int) -> int:
        """Floating-point operations of the products, for all tokens."""
        return 2 * 3 * tokens * self.hidden * (self.top_k * self.ffn + self.shared)


GPU_BLOCKS = (
    Block("mixtral-8x7b", 4096, 14336, 8, 2),
    Block("deepseek-v2-lite", 2048, 1408, 64, 6, 2816),
    Block("qwen1.5-moe", 2048, 1408, 60, 4, 5632),
    Block("qwen3-30b-a3b", 2048, 768, 128, 8),
)
# what two cores and a few gigabytes can turn over: Mixtral at a quarter of its widths, Qwen3 with a quarter of its
# experts
CPU_BLOCKS = (Block("mixtral, quarter width", 1024, 3584, 8, 2), Block("qwen3-30b-a3b, 32 experts", 2048, 768, 32, 8))
GPU_TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
CPU_TOKENS = (1, 16, 128)
# widths that repeat over the experts of a layer, by the bits per expert they come to
MIXES = {
    "2.0 mixed": (1, 3, 2, 2), "2.5": (2, 3), "1.5": (1, 2), "2.0": (2,), "3.0": (3,), "4.0": (4,),
}  # fmt: skip
UNQUANTIZED = ("grouped_mm", "batched_mm", "gather_einsum", "expert_loop")
# the loop over experts depends on data: nothing to compile
COMPILED = UNQUANTIZED[:3]


@dataclass(frozen=True)
class Case:
    """One row: ``provider`` on a block for so many tokens. Unquantized providers have no ``mix`` but a ``dtype``."""

    block: Block
    tokens: int
    provider: str
    mix: str | None = None
    dtype: str = ""
    compiled: bool = False

    def __str__(self) -> str:
        what = [self.mix or self.dtype, self.provider] + ["compiled"] * self.compiled
        return "-".join([self.block.name, f"t{self.tokens}", *what]).replace(", ", "_").replace(" ", "_")

    @property
    def layer_key(self) -> tuple:
        """Cases with equal keys run on the same weights."""
        return self.block, self.mix, self.dtype, self.provider if self.mix else ""


def widths(mix: str, experts: int, seed: int = 0) -> list[int]:
    """The widths of a layer's experts: those of the mix in equal parts, shuffled."""
    bits = list(itertools.islice(itertools.cycle(MIXES[mix]), experts))
    random.Random(seed).shuffle(bits)
    return bits


_TOKEN_RANK = {1: 0, 16: 1, 4: 3, 64: 3, 512: 4, 8: 5, 128: 5, 2: 6, 4096: 6}
_MIX_RANK = {"2.0 mixed": 0, "2.5": 1, "1.5": 1, "3.0": 2, "2.0": 2, "4.0": 3}


def _value(case: Case) -> float:
    """Smaller is sooner."""
    rank = _TOKEN_RANK[case.tokens]
    if case.mix is None:
        return rank + 0.5
    return rank + _MIX_RANK[case.mix] + (0 if case.provider == "gemq" else 2.5)


def gpu_cases(peers: tuple[str, ...] = (), budgeted: bool = False) -> list[Case]:
    """The whole grid, most valuable first; under a budget compilers run for 1 and 16 tokens only."""
    found = []
    for block, tokens in itertools.product(GPU_BLOCKS, GPU_TOKENS):
        for provider, mix in itertools.product(("gemq", "dequantize", "gemlite", *peers), MIXES):
            found.append(Case(block, tokens, provider, mix))
        for provider in UNQUANTIZED:
            compiled = provider in COMPILED and (tokens in (1, 16) or not budgeted)
            # grouped products in float16 are newer than those in bfloat16
            for dtype in ("float16", "bfloat16")[: 1 + (provider == "grouped_mm")]:
                found.append(Case(block, tokens, provider, None, dtype, compiled))
    return sorted(found, key=_value)


def cpu_cases(peers: tuple[str, ...] = ()) -> list[Case]:
    """A smaller grid, by weights so that a layer is made once; every unquantized way in both types, compiled ones in
    the type that moves fewer bytes."""
    found = []
    for block in CPU_BLOCKS:
        for mix in MIXES:
            found += [Case(block, t, "gemq", mix) for t in CPU_TOKENS]
        for provider in ("dequantize", *peers):
            found += [Case(block, t, provider, "2.0 mixed") for t in CPU_TOKENS]
        for dtype, tokens, provider in itertools.product(("float32", "bfloat16"), CPU_TOKENS, UNQUANTIZED):
            found.append(Case(block, tokens, provider, None, dtype))
            if provider in COMPILED and dtype == "bfloat16" and tokens <= 16:
                found.append(Case(block, tokens, provider, None, dtype, compiled=True))
    return found
