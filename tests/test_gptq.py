"""The grid and GPTQ against textbook versions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemq import reference
from gemq.algorithms.gptq import GptqConfig, factorise, gptq, inverse_factor
from gemq.ops.gptq import gptq_group
from gemq.reference.grid import dequantize_codes, find_grid, round_to_nearest


def problem(n: int, k: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight matrix and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * 0.2 + torch.eye(k)
    x = torch.randn(tokens, k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator) * 0.05, x.T @ x


def textbook_gptq(weight: Tensor, hessian: Tensor, bits: int, group: int, damping: float, clip: str) -> Tensor:
    """Column by column in float64, the inverse Hessian re-solved by elimination: no Cholesky, no blocks.

    After column i is fixed, row and column i leave the inverse: H^-1 -= h h' / h_ii (OBQ, Frantar 2022, Eq. 3).
    """
    w = weight.double().clone()
    k = w.shape[1]
    mean = hessian.double().diagonal().mean()
    whole = hessian.double() + damping * mean * torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.pinv(whole, hermitian=True)  # by eigenvalues: MKL's LU fails after set_num_threads
    out = torch.zeros_like(w)
    max_code = torch.tensor(float(2**bits - 1))
    for i in range(k):
        if i % group == 0:
            s, m = (v.double() for v in find_grid(w[:, i : i + group].float(), max_code, clip))
        column = w[:, i : i + 1]
        if bits == 1:
            code = (column >= 0).double()
        else:
            code = torch.clamp(torch.round((column - m) / s), 0, 2**bits - 1)
        out[:, i : i + 1] = code * s + m
        error = (column - out[:, i : i + 1]) / inverse[i, i]
        w -= error * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    delta = (weight - quantized).double()
    return float(((delta @ hessian.double()) * delta).sum() / ((weight.double() @ hessian.double()) * weight).sum())


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gptq_is_the_textbook_algorithm(bits: int, clip: str) -> None:
    weight, hessian = problem(24, 192, 400, seed=bits)
    config = GptqConfig(group_size=64, clip=clip, refine=0, rescale=False)
    codes, meta, (report,) = gptq(
        weight[None], hessian[None], [bits], [400], config, group_size=64
    )
    expected = textbook_gptq(weight, hessian, bits, 64, 0.01, clip)
    found = dequantize_codes(codes[0], meta[0]).double()
    # float32 against float64: a value on a rounding boundary may fall to the other side and shift what follows
    same = torch.isclose(found, expected, atol=1e-6).double().mean()
    assert same > 0.98
    assert output_error(weight, found, hessian) == pytest.approx(output_error(weight, expected, hessian), rel=0.02)
    assert report.error == pytest.approx(output_error(weight, found, hessian), rel=1e-3)


def test_propagation_lowers_the_output_error_of_rounding() -> None:
    weight, hessian = problem(32, 128, 300, seed=3)
    for bits in (1, 2, 3, 4):
        codes, meta, _ = gptq(weight[None], hessian[None], [bits], [300], GptqConfig(), 128)
        rounded = dequantize_codes(*round_to_nearest(weight, bits, 128, "paper"))
        found = dequantize_codes(codes[0], meta[0])
        assert output_error(weight, found, hessian) < 0.9 * output_error(weight, rounded, hessian)


def test_a_batch_of_mixed_widths_is_each_matrix_alone() -> None:
    items = [problem(20, 128, 200, seed=s) for s in range(5)]
    bits = [1, 2, 3, 4, 8]
    weights, hessians = (torch.stack(t) for t in zip(*items, strict=True))
    codes, meta, _ = gptq(weights, hessians, bits, [200] * 5, GptqConfig(group_size=32), 32)
    for e in range(5):
        alone, alone_meta, _ = gptq(
            weights[e : e + 1], hessians[e : e + 1], bits[e : e + 1], [200], GptqConfig(group_size=32), 32
        )
        assert (codes[e] == alone[0]).double().mean() > 0.99
        assert int(codes[e].max()) <= 2 ** bits[e] - 1
        assert torch.allclose(meta[e].float(), alone_meta[0].float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("clip", ["none", "paper", "mse"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_compiled_group_step_is_the_reference(group: int, clip: str) -> None:
    generator = torch.Generator().manual_seed(group)
    block = torch.randn(8, 37, group, generator=generator) * 0.03
    x = torch.randn(8, 400, group, generator=generator)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.mT @ x), upper=True)
    bits = torch.arange(1, 9, dtype=torch.int32)
    for propagate_from in (1, 4):
        found = gptq_group(block, factor, bits, clip, propagate_from)
        expected = reference.gptq_group(block, factor, bits, clip, propagate_from)
        # the 2.4-norm is computed with a fast exponential: near ties may pick the neighbouring factor
        assert (found[0] == expected[0]).double().mean() > (0.98 if clip == "paper" else 0.9999)
        assert float(found[2].square().sum()) == pytest.approx(float(expected[2].square().sum()), rel=1e-2)


@pytest.mark.parametrize("clip", ["paper", "mse"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_ranges_that_the_search_passes_over_are_not_the_best(bits: int, clip: str) -> None:
    """Against the reference, which tries them all."""
    generator = torch.Generator().manual_seed(bits)
    normal = torch.randn(96, 64, generator=generator)
    odd = torch.zeros(4, 64)
    odd[1, 5], odd[2], odd[3, ::2] = 0.1, 0.3, -2e-7
    w = torch.cat([normal * 0.02, normal**3, normal.abs() * 1e-5, normal * torch.logspace(-6, 3, 96)[:, None], odd])
    width = torch.tensor([bits], dtype=torch.int32)
    errors = []
    for step in (gptq_group, reference.gptq_group):
        codes, meta, _ = step(w[None], torch.eye(64)[None], width, clip)
        lost = dequantize_codes(codes, meta[:, :, None]) - w
        errors.append(lost.double().abs().pow(2.4 if clip == "paper" else 2).sum(-1))
    # powers are computed to a few millionths; weights all at one end may miss the luckiest rounding of the top level
    one_end = torch.zeros(len(w), dtype=torch.float64)
    one_end[len(w) - len(odd) :] = 64 * (odd.double().abs().amax(-1) * 2**-11).pow(2.4 if clip == "paper" else 2)
    assert (errors[0] <= errors[1] * (1 + 2e-5) + one_end + 1e-30).all()


def test_the_factor_in_blocks_is_that_of_the_inverse() -> None:
    _, hessian = problem(1, 192, 400, seed=5)
    hessian = torch.stack([hessian, hessian.flip(-1, -2) * 3])
    factor = factorise(hessian, 0.01, 64)
    damped = hessian.double() + torch.diag_embed(factor.added.double())
    expected = torch.linalg.cholesky(torch.linalg.pinv(damped, hermitian=True), upper=True)
    whole, _ = inverse_factor(hessian, 0.01)
    assert float((whole - expected).norm() / expected.norm()) < 1e-4
    root = torch.linalg.solve_triangular(expected, torch.eye(192, dtype=torch.float64), upper=True)
    for block in range(3):
        here = slice(64 * block, 64 * block + 64)
        for found, true in (
            (factor.inverse[:, block], expected[:, here, here]),
            (factor.root[:, : here.stop, here], root[:, : here.stop, here]),
        ):
            assert float((found - true).norm() / true.norm()) < 1e-4


@pytest.mark.parametrize("propagate_from", [1, 4])
@pytest.mark.parametrize("tokens", [8, 400])
def test_the_reported_error_is_that_of_the_result(tokens: int, propagate_from: int) -> None:
    """Of the undamped Hessian, with few tokens and with columns that none excites, too."""
    items = [problem(16, 128, tokens, seed=s) for s in range(5)]
    weights, hessians = (torch.stack(t) for t in zip(*items, strict=True))
    hessians[:, 7], hessians[:, :, 7] = 0, 0
    config = GptqConfig(group_size=32, propagate_from=propagate_from)
    codes, meta, reports = gptq(weights, hessians, [1, 2, 3, 4, 8], [tokens] * 4 + [0], config, 32)
    assert [r.fallback for r in reports] == [""] * 4 + ["rtn"]
    for e, report in enumerate(reports):
        found = dequantize_codes(codes[e], meta[e])
        assert report.error == pytest.approx(output_error(weights[e], found, hessians[e]), rel=1e-4)


def test_an_expert_without_tokens_is_rounded_and_reported_never_zeroed() -> None:
    weight, hessian = problem(8, 64, 100, seed=0)
    codes, meta, reports = gptq(
        torch.stack([weight, weight]), torch.stack([hessian, torch.zeros_like(hessian)]), [3, 3], [100, 0],
        GptqConfig(group_size=64), 64,
    )
    assert [r.fallback for r in reports] == ["", "rtn"]
    rounded, rounded_meta = round_to_nearest(weight, 3, 64, GptqConfig().clip)
    assert torch.equal(codes[1], rounded) and torch.equal(meta[1], rounded_meta)


def test_dead_columns_and_singular_hessians_are_handled() -> None:
    weight, hessian = problem(8, 64, 10, seed=1)  # 10 tokens: rank 10 of 64
    hessian[5], hessian[:, 5] = 0, 0
    codes, meta, (report,) = gptq(weight[None], hessian[None], [4], [10], GptqConfig(group_size=64), 64)
    found = dequantize_codes(codes[0], meta[0])
    assert report.fallback == "" and torch.isfinite(found).all()
    assert (found[:, 5] - weight[:, 5]).abs().max() < 0.05


def test_an_indefinite_hessian_is_retried_alone_with_more_damping() -> None:
    _, good = problem(8, 32, 100, seed=2)
    bad = good.clone()
    bad[0, 1] = bad[1, 0] = 1.1 * (good[0, 0] * good[1, 1]).sqrt()
    factor, damping = inverse_factor(torch.stack([good, bad]), 0.01)
    assert damping[0] == pytest.approx(0.01) and damping[1] > 0.05
    assert torch.isfinite(factor).all()
    _, hopeless = inverse_factor(-good[None], 0.01)
    assert hopeless.isnan().all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_grid_covers_the_group_and_zero(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(50, 128, generator=generator) * torch.logspace(-6, 3, 50)[:, None]
    w[0] = 0.0
    w[1] = w[1].abs() + 1
    codes, meta = round_to_nearest(w, bits, 128)
    assert torch.isfinite(meta.float()).all() and int(codes.max()) < 2**bits
    back = dequantize_codes(codes, meta)
    s = meta[:, 0, 0].float()
    if bits > 1:
        # half a step, and what rounding s and m to float16 may add at the far end of the range
        # (subnormal steps: by 2^-25 each)
        slack = 0.5 * s + 2**bits * (s * 2**-10 + 2**-25) + w.abs().amax(1) * 2**-10 + 2**-24
        assert ((back - w).abs().amax(1) <= slack).all()
    else:
        assert torch.equal(meta[:, 0, 1].float(), (-s / 2).half().float())
    # below float16's smallest step nothing smaller than that can be said of a zero group
    assert back[0].abs().max() <= 2**-24


def test_bad_weights_and_options_are_refused() -> None:
    for value in (float("nan"), float("inf"), 1e6):
        with pytest.raises(ValueError, match="weights must be finite and within"):
            round_to_nearest(torch.tensor([[value] * 32]), 2, 32)
    with pytest.raises(ValueError, match="clip must be one of none, paper, mse, got 'x'"):
        GptqConfig(clip="x")
    with pytest.raises(ValueError, match="damping must be above 0"):
        GptqConfig(damping=0)
    with pytest.raises(ValueError, match="group_size must be one of"):
        GptqConfig(group_size=100)
    with pytest.raises(ValueError, match="recipe must be default or paper"):
        GptqConfig.for_recipe("best")


def test_the_papers_recipe_does_not_propagate_below_four_bits() -> None:
    paper = GptqConfig.for_recipe("paper")
    assert paper == GptqConfig(clip="paper", propagate_from=4, refine=0, compensate=False, rescale=False)
    given = GptqConfig.for_recipe("paper", 64, 0.02, "mse", 1, True, True)
    assert given == GptqConfig(64, "mse", 0.02, 4, refine=1)
    weight, hessian = problem(16, 128, 300, seed=9)
    config = GptqConfig(clip="none", propagate_from=4, refine=0, rescale=False)
    codes, _, _ = gptq(weight[None], hessian[None], [2], [300], config, 128)
    assert torch.equal(codes[0], round_to_nearest(weight, 2, 128)[0])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", [1, -1])
def test_the_grid_of_weights_of_one_sign_holds_zero(bits: int, sign: int) -> None:
    """In the reference and in the compiled step."""
    w = sign * (1 + torch.rand(1, 20, 64, generator=torch.Generator().manual_seed(bits)))
    _, compiled, _ = gptq_group(w, torch.eye(64)[None], torch.tensor([bits], dtype=torch.int32))
    for s, m in (find_grid(w, torch.tensor(float(2**bits - 1))), compiled.float().unbind(-1)):
        end = m if sign > 0 else (2**bits - 1) * s + m
        assert (end.abs() <= 2**-9 * w.abs().amax()).all()
