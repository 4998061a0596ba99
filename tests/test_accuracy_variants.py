"""The quantizer's variants that the study compares."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_text import words

from gemq.algorithms.gptq import GptqConfig, gptq
from gemq.reference.grid import find_grid, round_to_nearest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "accuracy"))

import cells
import variants

PLAIN = GptqConfig(refine=0, rescale=False)


def problem(seed: int, n: int = 12, k: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, k, generator=generator) * torch.linspace(0.1, 3, k)[torch.randperm(k, generator=generator)]
    return torch.randn(n, k, generator=generator) * 0.05, x.T @ x


def test_act_order_is_gptq_of_permuted_columns() -> None:
    """With one group the grid does not depend on the order, so that only the order itself differs."""
    weight, hessian = problem(0)
    order = torch.argsort(hessian.diagonal(), descending=True)
    expected, meta, _ = gptq(
        weight[None, :, order], hessian[order][:, order][None], [2], [300], replace(PLAIN, rescale=True), 64
    )
    codes, found = variants._static(False, True)(weight, hessian, 2, 300, PLAIN, 64)
    assert (codes[:, order] == expected[0]).double().mean() > 0.99
    torch.testing.assert_close(found.float(), meta[0].float(), rtol=1e-2, atol=1e-5)


def test_ranges_by_output_are_those_of_the_squared_error_where_columns_count_alike() -> None:
    weight, _ = problem(1)
    grouped, most = weight.unflatten(-1, (2, 32)), torch.tensor(3.0)
    found = variants._grids_by_output(grouped, torch.ones(1, 2, 32), most)
    for one, two in zip(found, find_grid(grouped, most, "mse"), strict=True):
        assert torch.equal(one, two)
    # a column that alone counts is met by its grid
    only = torch.full((1, 2, 32), 1e-12)
    only[..., 7] = 1.0
    s, m = variants._grids_by_output(grouped, only, most)
    code = ((grouped - m) / s).round().clamp(0, 3)
    own, default = ((c * s_ + m_ - grouped)[..., 7].abs().mean() for c, s_, m_ in (
        (code, s, m), (((grouped - found[1]) / found[0]).round().clamp(0, 3), *found)))
    assert own < 0.5 * default


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_integer_zero_points_are_integers(bits: int) -> None:
    weight, hessian = problem(bits)
    codes, meta = variants._integer_zero_points(weight, hessian, bits, 300, GptqConfig(), 32)
    zero = -meta[..., 1].float() / meta[..., 0].float()
    assert int(codes.max()) < 2**bits
    if bits > 1:
        assert (zero - zero.round()).abs().max() < 0.02 and zero.min() > -0.1 and zero.max() < 2**bits - 0.9


def test_every_variant_is_run_at_the_widths_of_the_default(model_folder, tmp_path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text(words(6000, 3))
    settings = cells.Settings((("own", str(text)),), (("own", str(text)),), samples=4, length=32, limit=4)
    session = cells.Session(str(model_folder), 0, settings, tmp_path)
    variants.compare(session, cells.Run(budgets=(2.0,), estimate="fp"), list(variants.VARIANTS))
    lines = capsys.readouterr().out.splitlines()
    assert [name in line for name, line in zip(variants.VARIANTS, lines, strict=True)] == [True] * 9
    scores = [float(line.split()[-1]) for line in lines]
    assert all(1 < score < 1000 for score in scores) and len(set(scores)) > 4


def test_rounding_alone_is_static_order_without_correlation() -> None:
    weight, _ = problem(5)
    config = replace(PLAIN, clip="mse")
    codes, _ = variants._static(False, False)(weight, torch.eye(64), 3, 300, config, 32)
    assert torch.equal(codes, round_to_nearest(weight, 3, 32, "mse")[0])
