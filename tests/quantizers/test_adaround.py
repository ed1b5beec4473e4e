"""Learned rounding against worked examples, and on problems small enough to know the answer."""

import pytest
import torch

from halftone.quantizers.adaround import SoftRounding, alpha_for, beta_at, rectified_sigmoid, softened
from halftone.quantizers.affine import AffineParams, dequantize, fake_quantize, fit_affine, quantize

UNIT = AffineParams(torch.tensor(1.0), torch.tensor(8.0), 4)


def test_alpha_starts_at_the_rest():
    rest = torch.tensor([0, 0.25, 0.5, 0.75])
    alpha = alpha_for(rest)
    assert alpha.tolist() == pytest.approx([-2.397895, -0.887303, 0, 0.887303], abs=1e-6)
    assert rectified_sigmoid(alpha).tolist() == pytest.approx(rest.tolist(), abs=1e-6)


def test_softened_choices_have_a_gradient_and_keep_their_side():
    alpha = torch.tensor([-4.0, -0.1, 0.0, 0.1, 4.0])
    soft = softened(alpha, 0.25).requires_grad_()
    assert soft.tolist() == pytest.approx([-0.887303, -0.1, 0, 0.1, 0.887303], abs=1e-6)
    rectified_sigmoid(soft).sum().backward()
    assert soft.grad.min() > 0
    assert torch.equal(softened(alpha, 0.0), alpha)


@pytest.mark.parametrize(
    ("iterations", "warmup", "expected"),
    [
        (20_000, 0.2, {0: 20, 4000: 20, 8000: 15.5, 12_000: 11, 16_000: 6.5, 20_000: 2}),
        (2000, 0.0, {0: 20, 500: 15.5, 1000: 11, 2000: 2}),
        (10, 1.0, {0: 20, 9: 20, 10: 20}),
    ],
)
def test_beta_falls_after_the_warmup(iterations, warmup, expected):
    assert {k: beta_at(k, iterations, warmup) for k in expected} == pytest.approx(expected)


def test_beta_can_start_lower_and_refuses_a_warmup_beyond_the_end():
    assert beta_at(50, 100, 0.0, start=10, end=4) == pytest.approx(7)
    with pytest.raises(ValueError, match="warmup"):
        beta_at(0, 10, 1.5)


@pytest.mark.parametrize(
    ("h", "beta", "expected"),
    [(0.5, 2, 1), (0.5, 20, 1), (0, 2, 0), (1, 20, 0), (0.25, 2, 0.75), (0.25, 20, 0.999999)],
)
def test_regulariser_of_one_weight(h, beta, expected):
    rounding = SoftRounding(torch.zeros(1), UNIT)
    with torch.no_grad():
        rounding.alpha.copy_(alpha_for(torch.tensor([float(h)])))
    assert rounding.regulariser(beta).item() == pytest.approx(expected, abs=1e-6)


def test_regulariser_is_a_sum_and_polarisation_a_mean():
    rounding = SoftRounding(torch.tensor([0.5, 0.25, 1.0, 2.25]), UNIT)
    assert rounding.regulariser(2).item() == pytest.approx(1 + 0.75 + 0 + 0.75, abs=1e-5)
    assert rounding.polarisation() == pytest.approx((0.5 + 0.25 + 0 + 0.25) / 4, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_starts_at_the_weight_and_at_nearest_rounding(bits):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits))
    params = fit_affine(weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True), bits)
    rounding = SoftRounding(weight, params)
    codes = quantize(weight, params)
    assert torch.equal(rounding.hard_codes(), codes)
    inside = (codes > params.low) & (codes < params.high)
    torch.testing.assert_close(rounding.soft_weight()[inside], weight[inside], atol=1e-5, rtol=1e-5)


def test_choices_stay_within_one_step_and_within_the_codes():
    weight = 3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    params = fit_affine(-2.0, 2.0, 3)
    rounding = SoftRounding(weight, params)
    down, up = (
        dequantize(quantize(x, params), params)
        for x in (weight - params.scale / 2, weight + params.scale / 2)
    )
    with torch.no_grad():
        for alpha in (-100.0, 100.0):
            rounding.alpha.fill_(alpha)
            codes = rounding.hard_codes()
            assert params.low <= codes.min()
            assert codes.max() <= params.high
            torch.testing.assert_close(rounding.soft_weight(), dequantize(codes, params))
            torch.testing.assert_close(dequantize(codes, params), down if alpha < 0 else up)
            assert rounding.polarisation() == 0


def test_clamped_weights_have_no_gradient():
    rounding = SoftRounding(torch.tensor([-20.5, 0.5, 20.5]), UNIT)
    rounding.soft_weight().sum().backward()
    assert rounding.alpha.grad is not None
    assert (rounding.alpha.grad != 0).tolist() == [False, True, False]


def test_state_is_restored_exactly():
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    params = fit_affine(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), 4)
    rounding, other = SoftRounding(weight, params, noise=0.1, seed=7), SoftRounding(torch.zeros(4, 3), params)
    other.load_state_dict(rounding.state_dict())
    assert torch.equal(other.soft_weight(), rounding.soft_weight())
    assert torch.equal(other.hard_codes(), rounding.hard_codes())


def train(rounding: SoftRounding, target: float, iterations: int = 1000) -> list[int]:
    """One row of inputs, all ones: the output is the sum of the weights."""
    optimizer = torch.optim.Adam(rounding.parameters(), lr=2e-3)
    warmup = 0.2
    for k in range(iterations):
        optimizer.zero_grad()
        objective = (rounding.soft_weight().sum() - target).square()
        if k >= warmup * iterations:
            objective = objective + 0.01 * rounding.regulariser(beta_at(k, iterations, warmup))
        objective.backward()
        optimizer.step()
    return (rounding.hard_codes() - 8).tolist()


@pytest.mark.parametrize(
    ("weight", "expected", "nearest_error"),
    [([0.5, 0.4], [1, 0], 0.81), ([0.4, 0.45, 0.3], [0, 1, 0], 1.3225)],
)
def test_learned_rounding_beats_nearest(weight, expected, nearest_error):
    weight = torch.tensor(weight)
    rounding = SoftRounding(weight, UNIT)
    undecided = rounding.polarisation()
    target = weight.sum().item()
    assert (fake_quantize(weight, UNIT).sum().item() - target) ** 2 == pytest.approx(nearest_error, abs=1e-5)
    assert train(rounding, target) == expected
    assert rounding.polarisation() < undecided / 2


def test_seeded_noise_breaks_a_tie():
    weight = torch.tensor([0.5, 0.5])
    # with this seed both start on the same side
    assert (SoftRounding(weight, UNIT, noise=1e-2, seed=3).hard_codes() - 8).tolist() == [1, 1]
    chosen = train(SoftRounding(weight, UNIT, noise=1e-2, seed=3), 1.0, 200)
    assert sorted(chosen) == [0, 1]
    assert train(SoftRounding(weight, UNIT, noise=1e-2, seed=3), 1.0, 200) == chosen
    alphas = [SoftRounding(weight, UNIT, noise=1e-2, seed=seed).alpha for seed in (3, 3, 4)]
    assert torch.equal(alphas[0], alphas[1])
    assert not torch.equal(alphas[0], alphas[2])
