"""Judge a server's answers by gemq's own."""

from __future__ import annotations

FIGURES = ("prompt", "new", "mean", "allowed")
HEADING = " ".join([
    f"{'way':<8} {'family':<19} {'dtype':<9} {'streams':>7} {'tokens':>9}", *(f"{name:>9}" for name in FIGURES),
    " result",
])  # fmt: skip


def distances(first: list[float], second: list[float]) -> list[float]:
    """The absolute differences of two lists of one length."""
    return [abs(a - b) for a, b in zip(first, second, strict=True)]


def allowed(dtype: str, exact: list[dict], ours: list[dict]) -> float:
    """The distance of log-probabilities that is no difference. In float32 1e-3, for each of them. In 16 bits for their
    mean, as a router that chooses otherwise at a near tie moves single ones far: twice the mean distance of gemq's own
    answers ``ours`` from its float32 ``exact``, over prompts."""
    if dtype == "float32":
        return 1e-3
    pairs = [(a["prompt_logprobs"], b["prompt_logprobs"]) for a, b in zip(exact, ours, strict=True)]
    return 2 * mean([abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)])


def mean(values: list[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def parting(tokens: list[int], ours: list[int]) -> int:
    """Number of tokens that are equal from the first on."""
    return next((at for at, (a, b) in enumerate(zip(tokens, ours, strict=True)) if a != b), len(ours))


def compared(rounds: list[list[dict]], ours: list[dict], limit: float, exact: bool) -> dict:
    """One row: ``tokens`` equal of ``of``, the largest distances of log-probabilities of ``prompt`` and ``new`` tokens
    and the ``mean`` of both, and ``same`` if that which is judged is within ``limit``: all if ``exact``, else the mean.

    ``rounds`` are the server's answers to all prompts, each time it was asked; a round may lack those of the prompt,
    but not all may. ``choices`` of ``ours`` are all log-probabilities of each step: where tokens part, the distance is
    that of the server's choice from gemq's, and what follows is another text.
    """
    equal = total = 0
    prompt: list[float] = []
    new: list[float] = []
    for answers in rounds:
        for theirs, own in zip(answers, ours, strict=True):
            at = parting(theirs["tokens"], own["tokens"])
            equal, total = equal + at, total + len(own["tokens"])
            new += distances(theirs["logprobs"][:at], own["logprobs"][:at])
            if at < len(own["tokens"]):
                step = own["choices"][at]
                new.append(step[own["tokens"][at]] - step[theirs["tokens"][at]])
            if theirs["prompt_logprobs"]:
                prompt += distances(theirs["prompt_logprobs"], own["prompt_logprobs"])
    found = max(prompt + new) if exact else mean(prompt + new)
    return {
        "tokens": equal, "of": total, "prompt": max(prompt, default=0.0), "new": max(new, default=0.0),
        "mean": mean(prompt + new), "allowed": limit, "same": bool(prompt) and found <= limit,
    }  # fmt: skip


def line(row: dict) -> str:
    """A row as it is printed."""
    head = f"{row['way']:<8} {row['family']:<19} {row['dtype']:<9} "
    if "error" in row:
        return f"{head}{'':>58}  FAILED: {row['error'][:160]}"
    figures = " ".join(f"{row[name]:>9.1e}" for name in FIGURES)
    said = "same" if row["same"] else "DIFFERENT"
    return f"{head}{row['streams']:>7} {row['tokens']:>4}/{row['of']:<4} {figures}  {said}"
