"""Write docs/what-fits.md: which model runs on which card, at which bits and context.

``python docs/what_fits.py`` (some minutes; no weight is read). The bytes are those of ``gemq plan``.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import transformers

from gemq.algorithms.method import MethodConfig
from gemq.bench.architectures import KNOWN, PUBLISHED, load_config
from gemq.planning import PlanConfig, make_plan
from gemq.planning.machine import Machine
from gemq.planning.plan import Plan

PAGE = Path(__file__).parent / "what-fits.md"
CARDS = (12, 16, 24, 32, 48, 80)  # GB
BITS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
CONTEXT = 8192
HEAD = """# What fits

The highest bits of the experts at which a model runs on one card with {context:,} tokens of context, and the longest
context at those bits: `2.5 · 40k`. A dash: not even at 1.5 bits. Attention, dense layers and shared experts have 4
bits, embeddings, head and cache 16. The bytes are `gemq plan`'s ([what they hold](plan.md)), of a card whose memory
holds nothing else; 1 GB is 10^9 bytes. Vision towers and layers of multi-token prediction are not counted.

Numbers of this page are computed, none is measured. Sizes of models marked * are those of the `config.json` on the
hub; the others were written from transformers' classes and model cards, and give the parameters that their makers state
within 3% (`tests/test_published_sizes.py`). `gemq plan NAME --bits 2 --device rtx4090` shows more of each. Made by
`docs/what_fits.py`.

| model | parameters | 16 bits | {cards} |
|---|---|---|{lines}
"""


def shown(tokens: int) -> str:
    """A context for people: 8k, 131k."""
    return f"{tokens // 1000}k" if tokens >= 1000 else str(tokens)


def cell(plan: Plan, memory: float, positions: int) -> str:
    """Bits and context for so many bytes; a dash if nothing fits."""
    for bits in sorted(plan.inference, reverse=True):
        run = plan.inference[bits]
        left = memory - run.total
        if left >= 0:
            more = int(left // max(1, run.cache // CONTEXT))
            return f"{bits:g} · {shown(min(positions, CONTEXT + more))}"
    return "—"


def row(name: str) -> str:
    """The line of one model."""
    config = load_config(name)
    method = MethodConfig(budgets=BITS, candidates=(1, 2, 3, 4))
    unlimited = Machine("a card", False, None, None, None, None)
    plan = make_plan(config, PlanConfig(method, context=CONTEXT), unlimited)
    positions = config.get_text_config().max_position_embeddings
    billions = plan.parts.parameters / 1e9
    cells = " | ".join(cell(plan, card * 1e9, positions) for card in CARDS)
    return f"| `{name}`{'*' * (name in PUBLISHED)} | {billions:.1f} B | {2 * billions:.0f} GB | {cells} |"


def main() -> None:
    """Write the page, smallest models first."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    rows = []
    for name in KNOWN:
        rows.append(row(name))
        print(rows[-1], file=sys.stderr)
    rows.sort(key=lambda line: float(line.split("|")[2].split()[0]))
    head = HEAD.format(context=CONTEXT, cards=" | ".join(f"{card} GB" for card in CARDS), lines="---|" * len(CARDS))
    PAGE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
