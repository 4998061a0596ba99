"""Test the steps after GPTQ's column loop: descent over codes, the fit of grids, and fitted down projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemq import reference
from gemq.algorithms.compensation import InnerStatistics, fit_down
from gemq.algorithms.gptq import GptqConfig, gptq
from gemq.algorithms.layerwise import expert_hidden
from gemq.algorithms.refinement import damped, descend, fit_grids, refine, rescaled
from gemq.ops.gptq import descend_codes
from gemq.reference.grid import dequantize_codes, round_to_nearest


def problem(n: int, k: int, seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight matrix and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * 0.2 + torch.eye(k)
    x = torch.randn(tokens, k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator) * 0.05, x.T @ x


def row_errors(weight: Tensor, codes: Tensor, meta: Tensor, hessian: Tensor) -> Tensor:
    delta = weight.double() - dequantize_codes(codes, meta).double()
    return ((delta @ hessian.double()) * delta).sum(-1)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_compiled_descent_is_the_reference(group: int) -> None:
    problems = [problem(37, group, seed) for seed in range(8)]
    weight, hessian = (torch.stack(t) for t in zip(*problems, strict=True))
    bits = torch.arange(1, 9)
    start = [round_to_nearest(w, int(b), group) for w, b in zip(weight, bits, strict=True)]
    codes, meta = torch.stack([c for c, _ in start]), torch.stack([m for _, m in start])
    products = (weight - dequantize_codes(codes, meta)) @ hessian
    kept = codes.clone()
    found = descend_codes(products, hessian, codes, meta[:, :, 0], bits)
    expected = reference.descend_codes(products.double(), hessian.double(), codes, meta[:, :, 0], bits)
    assert torch.equal(codes, kept)
    assert (found == expected).double().mean() > 0.999
    assert (found.amax((1, 2)) <= 2**bits - 1).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_every_code_is_the_best_one_given_the_others(bits: int) -> None:
    """By trying all of them, left to right, in float64."""
    weight, hessian = problem(5, 32, bits)
    codes, meta = round_to_nearest(weight, bits, 32)
    found = descend(weight, hessian, codes, meta, bits)
    tried = codes.clone()
    for column in range(32):
        errors = []
        for code in range(2**bits):
            tried[:, column] = code
            errors.append(row_errors(weight, tried, meta, hessian))
        tried[:, column] = torch.stack(errors).argmin(0).to(torch.uint8)
    assert torch.equal(found, tried)


def test_grids_are_the_least_squares_solution_for_the_codes() -> None:
    weight, hessian = problem(6, 96, 4)
    codes, meta = round_to_nearest(weight, 2, 32)
    found = fit_grids(weight, hessian, codes, meta)
    root = torch.linalg.cholesky(hessian.double()).T  # |root d|^2 = d' H d
    for row in range(6):
        columns = torch.zeros(96, 6, dtype=torch.float64)
        for group in range(3):
            at = slice(32 * group, 32 * (group + 1))
            columns[at, group], columns[at, 3 + group] = codes[row, at].double(), 1.0
        solution = torch.linalg.lstsq(root @ columns, (root @ weight[row].double())[:, None]).solution[:, 0]
        expected = torch.stack([solution[:3], solution[3:]], -1)
        assert torch.allclose(found[row].double(), expected, rtol=2e-3, atol=1e-4)
    assert (row_errors(weight, codes, found, hessian) < row_errors(weight, codes, meta, hessian)).all()


def test_a_row_that_no_grid_improves_keeps_its_own() -> None:
    """Codes all alike: scale and offset cannot be told apart. Exact weights: nothing is left to gain."""
    weight, hessian = problem(3, 64, 5)
    codes, meta = round_to_nearest(weight, 3, 64)
    codes[0], codes[1] = 0, 7
    found = fit_grids(weight, hessian, codes, meta)
    assert torch.isfinite(found).all() and (found[..., 0] > 0).all()
    assert (row_errors(weight, codes, found, hessian) <= row_errors(weight, codes, meta, hessian)).all()
    exact = dequantize_codes(codes, meta)
    assert torch.equal(fit_grids(exact, hessian, codes, meta), meta)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rounds_never_raise_a_rows_error_and_lower_that_of_gptq(bits: int) -> None:
    weight, hessian = problem(40, 256, bits)
    config = GptqConfig(refine=0, rescale=False)
    plain, plain_meta, (before,) = gptq(weight[None], hessian[None], [bits], [400], config, 64)
    whole, codes, meta = damped(hessian, 0.01), plain[0], plain_meta[0]
    errors = row_errors(weight, codes, meta, whole)
    for _ in range(3):
        codes, meta = refine(weight, whole, codes, meta, bits, 1)
        after = row_errors(weight, codes, meta, whole)
        assert (after <= errors * (1 + 1e-5)).all()
        errors = after
    config = GptqConfig(refine=3, rescale=False)
    found, found_meta, (report,) = gptq(weight[None], hessian[None], [bits], [400], config, 64)
    assert torch.equal(found[0], codes) and torch.equal(found_meta[0], meta)
    assert report.error < 0.97 * before.error


def power(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((weight.double() @ hessian.double()) * weight.double()).sum(-1)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_rescaled_rows_have_their_outputs_power(bits: int) -> None:
    weight, hessian = problem(40, 256, bits)
    weight[3] = 0.0
    codes, meta, (report,) = gptq(weight[None], hessian[None], [bits], [400], GptqConfig(), 64)
    plain, plain_meta, (before,) = gptq(weight[None], hessian[None], [bits], [400], GptqConfig(rescale=False), 64)
    assert torch.equal(codes, plain) and (meta[0, 3].isfinite().all())
    rows = [i for i in range(40) if i != 3]
    target = power(weight, hessian)[rows]
    both = ((codes, meta), (plain, plain_meta))
    found, without = (power(dequantize_codes(c[0], m[0]), hessian)[rows] for c, m in both)
    # float16 rounds the numbers that were scaled
    torch.testing.assert_close(found, target, rtol=3e-3, atol=0.0)
    factors = meta[0].double() / plain_meta[0].double()
    assert ((factors / factors[:, :1, :1] - 1).abs() < 2e-3)[rows].all()
    if bits < 8:
        # what least squares leaves is smaller; giving it back costs less error than it explains
        assert (without < target).double().mean() > 0.95
        assert before.error < report.error < 1.35 * before.error


def test_rows_that_cannot_be_rescaled_keep_their_grids() -> None:
    codes = torch.tensor([[1, 0] * 16, [0, 0] * 16], dtype=torch.uint8)
    meta = torch.tensor([[[6e4, 0.0]], [[1.0, 0.0]]]).half()
    weight = torch.full((2, 32), 6e4)
    # the first would need scales beyond float16, the second has no outputs to scale
    assert torch.equal(rescaled(weight, torch.eye(32), codes, meta), meta)


def test_what_else_is_in_the_batch_does_not_matter() -> None:
    items = [problem(20, 64, seed) for seed in range(3)]
    weights, hessians = (torch.stack(t) for t in zip(*items, strict=True))
    codes, meta, reports = gptq(weights, hessians, [1, 2, 3], [400, 400, 0], GptqConfig(), 64)
    assert [r.fallback for r in reports] == ["", "", "rtn"]
    assert torch.equal(codes[2], round_to_nearest(weights[2], 3, 64, "mse")[0])
    for e in range(2):
        alone, alone_meta, _ = gptq(weights[e : e + 1], hessians[e : e + 1], [e + 1], [400], GptqConfig(), 64)
        assert torch.equal(codes[e], alone[0]) and torch.equal(meta[e], alone_meta[0])


def test_bad_arguments_are_refused() -> None:
    products, hessian = torch.zeros(1, 4, 32), torch.eye(32)[None]
    codes, meta, bits = torch.zeros(1, 4, 32, dtype=torch.uint8), torch.ones(1, 4, 2).half(), torch.tensor([2])
    with pytest.raises(ValueError, match=r"hessian must be \[1, 32, 32\]"):
        descend_codes(products, hessian[:, :16], codes, meta, bits)
    with pytest.raises(ValueError, match="positive diagonal"):
        descend_codes(products, hessian * 0, codes, meta, bits)
    with pytest.raises(ValueError, match=r"bits\[0\]"):
        descend_codes(products, hessian, codes, meta, bits * 9)
    with pytest.raises(ValueError, match="32, 64 or 128"):
        descend_codes(products[..., :16], hessian[:, :16, :16], codes[..., :16], meta, bits)
    for value in (-1, 101, True):
        with pytest.raises(ValueError, match="refine must be a number of rounds"):
            GptqConfig(refine=value)


def test_the_fitted_down_projection_is_the_damped_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 16, generator=generator)
    gate_up, down = torch.randn(64, 16, generator=generator) * 0.3, torch.randn(12, 32, generator=generator)
    quantized = dequantize_codes(*round_to_nearest(torch.nn.functional.pad(gate_up, (0, 16)), 2, 32))[:, :16]
    scale = torch.rand(300, 1, generator=generator)
    found = InnerStatistics(32, torch.device("cpu"))
    for at in (0, 100, 300):
        found.add(gate_up, quantized, x[at : at + 200], scale[at : at + 200])
    x, scale = torch.cat([x[0:200], x[100:300]]), torch.cat([scale[0:200], scale[100:300]])
    # rows sqrt(d) pull V to W
    given, wanted = (scale * expert_hidden(w, x) for w in (quantized, gate_up))
    pull = (0.01 * (given.T @ given).diagonal().mean()).sqrt() * torch.eye(32)
    left, right = torch.cat([given, pull]).double(), torch.cat([wanted, pull]).double() @ down.double().T
    expected = torch.linalg.lstsq(left, right).solution.T
    fitted = found.fitted(down, 0.01)
    assert torch.allclose(fitted.double(), expected, rtol=1e-3, atol=1e-4)
    outputs = [(wanted @ down.T - given @ v.T).norm() for v in (down, fitted)]
    assert outputs[1] < 0.95 * outputs[0]
    # nothing seen, nothing changed
    assert torch.equal(InnerStatistics(32, torch.device("cpu")).fitted(down, 0.01), down)


def test_an_expert_of_no_bits_keeps_its_down_projection() -> None:
    generator = torch.Generator().manual_seed(1)
    down, gate_up = torch.randn(2, 8, 32, generator=generator), torch.randn(2, 64, 16, generator=generator)
    kept, quantized = down.clone(), gate_up + 0.1 * torch.randn(2, 64, 16, generator=generator)
    rows = [[(torch.randn(50, 16, generator=generator), 1.0)] * 2]
    fitted, _ = fit_down(down, [0, 2], gate_up, quantized, rows, 0.01)
    assert torch.equal(fitted[0], kept[0]) and not torch.equal(fitted[1], kept[1]) and torch.equal(down, kept)
