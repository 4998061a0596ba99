"""Compare variants of the quantizer, every one at the same widths, by perplexity.

    python benchmarks/accuracy/variants.py [MODEL] --text held-out=heldout.txt --text unseen=other.txt --seeds 0,1,2

Widths are those that the default method allocates from the costs of the full-precision model. ``act order`` quantizes
columns by falling diagonals of the Hessian, on grids that are found before (static groups, as GPTQModel has them);
``ranges by output error`` weights the columns of the range search by that diagonal; ``integer zero points`` has
offsets that are whole multiples of scales, as in GPTQ's own format. Those three change the experts alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import study
import torch
from cells import Run, Session
from torch import Tensor

from gemq.algorithms.gptq import GptqConfig, GptqReport, gptq, inverse_factor
from gemq.algorithms.layerwise import Hessian
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.refinement import damped, descend, refine, rescaled
from gemq.engine.progression import quantize_progressively
from gemq.format import default_group_size
from gemq.nn.experts import QuantizedStack
from gemq.reference.grid import find_grid, round_to_grid

# matrix(weight [n, k], hessian, bits, tokens, config, group_size) -> codes [n, k], meta [n, groups, 2]
Matrix = Callable[[Tensor, Tensor, int, int, GptqConfig, int], tuple[Tensor, Tensor]]
FACTORS = [1 - 0.02 * i for i in range(41)]


def _grids_by_output(weight: Tensor, diagonal: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The range, of those that ``--clip mse`` tries, with the least error weighted by ``diagonal``; ``weight`` and
    ``diagonal`` in groups."""
    low, high = weight.amin(-1, keepdim=True).clamp(max=0), weight.amax(-1, keepdim=True).clamp(min=0)
    errors, grids = [], []
    for factor in FACTORS:
        s = (factor * (high - low) / most).half().float().clamp(min=2.0**-24)
        m = (factor * low).half().float()
        lost = round_to_grid(weight, s, m, most) * s + m - weight
        errors.append((lost.square() * diagonal).sum(-1, keepdim=True))
        grids.append((s, m))
    best = torch.stack(errors).argmin(0, keepdim=True)
    return tuple(torch.stack(parts).gather(0, best)[0] for parts in zip(*grids, strict=True))


def _static(by_output: bool, ordered: bool) -> Matrix:
    """Grids of all groups first, then the columns in the order of their diagonals, or as they are."""

    def matrix(weight, hessian, bits, tokens, config, group_size):
        whole = damped(hessian, config.damping)
        diagonal, most = whole.diagonal(), torch.tensor(2.0**bits - 1)
        grouped = weight.float().unflatten(-1, (-1, group_size))
        if by_output and bits > 1:
            s, m = _grids_by_output(grouped, diagonal.view(1, -1, group_size), most)
        else:
            s, m = find_grid(grouped, most, config.clip)
        order = torch.argsort(diagonal, descending=True, stable=True) if ordered else torch.arange(len(diagonal))
        (factor,), _ = inverse_factor(hessian[order][:, order][None], config.damping)
        left, codes = weight.float()[:, order], torch.empty_like(weight, dtype=torch.uint8)
        for i, column in enumerate(order.tolist()):
            scale, offset = s[:, column // group_size, 0], m[:, column // group_size, 0]
            code = round_to_grid(left[:, i], scale, offset, most)
            error = (left[:, i] - (code * scale + offset)) / factor[i, i]
            left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
            codes[:, column] = code.to(torch.uint8)
        codes, meta = refine(weight.float(), whole, codes, torch.cat([s, m], -1).half(), bits, config.refine)
        return codes, rescaled(weight.float(), hessian, codes, meta)

    return matrix


def _integer_zero_points(weight, hessian, bits, tokens, config, group_size):
    """The default's grids with their zero points rounded to codes, and the codes chosen once more."""
    plain = replace(config, rescale=False)
    codes, meta, _ = gptq(weight[None], hessian[None], [bits], [tokens], plain, group_size)
    s, m = meta[0].float().unbind(-1)
    if bits > 1:
        m = -s * torch.round(-m / s).clamp(0, 2**bits - 1)
    grids = torch.stack([s, m], -1).half()
    codes = descend(weight.float(), damped(hessian, config.damping), codes[0], grids, bits)
    return codes, rescaled(weight.float(), hessian, codes, grids)


def quantizer_of(matrix: Matrix):
    """``matrix`` as :func:`gemq.engine.progression.quantize_progressively` takes it."""

    def quantize(weights: Tensor, hessians: list[Hessian], bits: list[int], config: GptqConfig):
        size = default_group_size(weights.shape[-1], config.group_size)
        made = [matrix(w, h.value, b, h.tokens, config, size) for w, h, b in zip(weights, hessians, bits, strict=True)]
        codes, meta = (list(parts) for parts in zip(*made, strict=True))
        reports = {e: GptqReport(h.tokens, config.damping, "", 0.0) for e, h in enumerate(hessians)}
        return QuantizedStack(codes, meta, list(bits)), reports

    return quantize


DEFAULT = GptqConfig()
VARIANTS: dict[str, tuple[GptqConfig, Matrix | None]] = {
    "default": (DEFAULT, None),
    "not rescaled": (replace(DEFAULT, rescale=False), None),
    "ranges 0.9 to 1.1": (replace(DEFAULT, clip="paper"), None),
    "ranges 0.9 to 1.1, not rescaled": (replace(DEFAULT, clip="paper", rescale=False), None),
    "no range search": (replace(DEFAULT, clip="none"), None),
    "3 rounds": (replace(DEFAULT, refine=3), None),
    "act order": (DEFAULT, _static(False, True)),
    "ranges by output error": (DEFAULT, _static(True, False)),
    "integer zero points": (DEFAULT, _integer_zero_points),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=study.DEFAULTS["models"][0])
    study.add_settings(parser)
    parser.add_argument("--bits", default="2,1.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="repeatable (default: all)")
    given = parser.parse_args()
    run = Run(budgets=tuple(float(b) for b in given.bits.split(",")), estimate="fp")
    with tempfile.TemporaryDirectory() as cache:
        for seed in map(int, given.seeds.split(",")):
            session = Session(given.model, seed, study.settings_of(given), Path(cache))
            compare(session, run, given.variant or list(VARIANTS))


def compare(session: Session, run: Run, names: list[str]) -> None:
    """Print a line for each budget and variant."""
    statistics, windows = session.statistics(run), session.calibrating(run)
    for budget in run.budgets:
        for name in names:
            config, matrix = VARIANTS[name]
            method = MethodConfig(
                (budget,), per_layer="none", tune=False, gptq=config, batch_size=session.settings.batch_size
            )
            (found,) = quantize_progressively(
                session.source, windows, method, first=statistics,
                quantizer=None if matrix is None else quantizer_of(matrix),
            )
            found.weights.write_to(session.moe.model)
            scores = "  ".join(f"{text} {value:.2f}" for text, value in session.scores().items())
            print(f"seed {session.seed}  {budget:g} bits  {name:<32} {scores}", flush=True)


if __name__ == "__main__":
    main()
