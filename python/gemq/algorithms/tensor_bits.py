"""Widths by name pattern: ``--tensor-bits 'o_proj=8'`` and what it means for a model."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import regex

from gemq.format import MAX_BITS, UNQUANTIZED
from gemq.models import MoeModel

# seconds that a pattern may take for all of a model's paths, and characters that it may have: some patterns take
# exponential time
_PATIENCE, _LONGEST = 5.0, 1000
# counted repetitions are unrolled, one inside another
_MOST_REPEATED = 10_000
_COUNTED = re.compile(r"\{\s*(\d+)?\s*(?:,\s*(\d+)?\s*)?\}")


def _repetitions(pattern: str) -> Iterator[int]:
    """The larger number of every ``{m,n}``, at most one more than is allowed."""
    for found in _COUNTED.finditer(pattern):
        yield max(min(int(number[:9]), _MOST_REPEATED + 1) for number in (*filter(None, found.groups()), "1"))


@dataclass(frozen=True)
class TensorBits:
    """One override: every matrix whose path the regular expression ``pattern`` finds gets ``bits``.

    Paths are those of transformers' modules, a routed expert's is ``model.layers.3.mlp.experts.5``. Raises
    ``ValueError`` for a malformed pattern or a width that is neither in 0..8 nor 16.
    """

    pattern: str
    bits: int

    def __post_init__(self) -> None:
        if len(self.pattern) > _LONGEST:
            raise ValueError(f"tensor_bits: a pattern has at most {_LONGEST} characters, got {len(self.pattern)}")
        if math.prod(_repetitions(self.pattern)) > _MOST_REPEATED:
            raise ValueError(f"tensor_bits: {self.pattern!r:.60} repeats more than {_MOST_REPEATED} times")
        try:
            regex.compile(self.pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"tensor_bits: {self.pattern!r} is no regular expression: {error}") from None
        if not self.pattern:
            raise ValueError("tensor_bits: the pattern must not be empty")
        if not (0 <= self.bits <= MAX_BITS or self.bits == UNQUANTIZED):
            raise ValueError(f"tensor_bits: {self.pattern!r} must get 0..8 bits, or 16, got {self.bits}")


class _Search:
    """Pattern, and the seconds that remain to search with it."""

    def __init__(self, item: TensorBits):
        self.item, self._left = item, _PATIENCE
        # the module of the standard library cannot be stopped
        self._expression = regex.compile(item.pattern)

    def finds(self, path: str) -> bool:
        """Return True if the pattern matches. Raises ``ValueError`` if the time is over."""
        began = time.monotonic()
        try:
            found = self._expression.search(path, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise ValueError(
                f"tensor_bits: {self.item.pattern!r} takes more than {_PATIENCE:g} s to search the model's paths; "
                "write it without repetitions inside repetitions"
            ) from None
        self._left -= time.monotonic() - began
        return found is not None


def quantizable(moe: MoeModel) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The path of everything that has a width: linears (None), and experts with their layer and number."""
    for path in (*moe.attention, *moe.dense):
        yield path, None
    for layer in moe.moe:
        for path in layer.shared_linears():
            yield path, None
        for expert in range(moe.num_experts):
            yield f"{layer.path}.experts.{expert}", (layer.index, expert)


def resolve(moe: MoeModel, wanted: tuple[TensorBits, ...]) -> tuple[dict[tuple[int, int], int], dict[str, int]]:
    """Return the widths that ``wanted`` sets in a model: of experts by ``(decoder layer, expert)``, and of linears by
    path.

    Raises ``ValueError`` for a pattern that finds nothing, two that give one matrix different widths, a linear of 0
    bits or an expert of 16.
    """
    experts: dict[tuple[int, int], int] = {}
    linears: dict[str, int] = {}
    by: dict[str, TensorBits] = {}
    used: set[TensorBits] = set()
    searches = [_Search(item) for item in wanted]
    for path, expert in quantizable(moe) if wanted else ():
        for search in searches:
            if not search.finds(path):
                continue
            item = search.item
            used.add(item)
            if by.setdefault(path, item).bits != item.bits:
                raise ValueError(f"tensor_bits: {by[path].pattern!r} gives {path} {by[path].bits} bits and "
                                 f"{item.pattern!r} {item.bits}")
            if expert is None:
                linears[path] = _linear_width(path, item)
            else:
                experts[expert] = _expert_width(path, item)
    unused = [item.pattern for item in wanted if item not in used]
    if unused:
        examples = ", ".join(path for path, _ in _one_of_each(moe))
        raise ValueError(f"tensor_bits: {unused[0]!r} matches nothing that is quantized; there are, for instance, "
                         f"{examples}")
    return experts, linears


def _linear_width(path: str, item: TensorBits) -> int:
    if item.bits == 0:
        raise ValueError(f"tensor_bits: {item.pattern!r} gives {path} 0 bits; only routed experts can have none")
    return item.bits


def _expert_width(path: str, item: TensorBits) -> int:
    if item.bits == UNQUANTIZED:
        raise ValueError(f"tensor_bits: {item.pattern!r} gives {path} 16 bits; a routed expert has 0..8")
    return item.bits


def _one_of_each(moe: MoeModel) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The first path of each kind of name."""
    seen = set()
    for path, expert in quantizable(moe):
        kind = re.sub(r"\d+", "", path)
        if kind not in seen:
            seen.add(kind)
            yield path, expert
