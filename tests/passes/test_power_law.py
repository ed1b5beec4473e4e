"""The likelihood ratio of DAQ, against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from halftone.passes.power_law import (
    fit_exponential,
    fit_half_normal,
    fit_lognormal,
    fit_power_law,
    likelihood_ratio,
)
from halftone.policies import Alternative

FEW = torch.tensor([1.0, 2, 4, 8])
HEAVY = torch.tensor([1.0, 1, 1, 2, 2, 4, 16, 64])


@pytest.mark.parametrize(
    ("values", "exponent", "power_law", "exponential", "ratio"),
    [(FEW, 1.9618, -8.3147, -8.0464, -0.2683), (HEAVY, 1.8244, -19.2489, -26.7152, 7.4663)],
)
def test_worked_examples(
    values: torch.Tensor, exponent: float, power_law: float, exponential: float, ratio: float
) -> None:
    assert fit_power_law(values, 1.0) == pytest.approx((exponent, power_law), abs=1e-4)
    assert fit_exponential(values, 1.0).log_likelihood == pytest.approx(exponential, abs=1e-4)
    assert likelihood_ratio(values) == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e4])
def test_a_common_factor_changes_nothing(factor: float) -> None:
    assert likelihood_ratio(HEAVY * factor) == pytest.approx(likelihood_ratio(HEAVY), abs=1e-4)


def test_zeros_and_what_lies_below_the_smallest_are_left_out() -> None:
    padded = torch.cat([torch.zeros(5), HEAVY]).reshape(1, -1)
    assert likelihood_ratio(padded) == likelihood_ratio(HEAVY)
    assert likelihood_ratio(torch.cat([torch.tensor([0.25, 0.5]), HEAVY]), 1.0) == likelihood_ratio(HEAVY)


@pytest.mark.parametrize("values", [torch.full((7,), 0.25), torch.zeros(3), torch.tensor([0.5])])
def test_nothing_to_choose_from_favours_neither(values: torch.Tensor) -> None:
    assert likelihood_ratio(values) == 0.0


def test_wider_softmax_outputs_turn_to_the_power_law() -> None:
    """The switch lies between a spread of the scores of 2 and of 3."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(256, 77, generator=generator)
    wins = [likelihood_ratio((scores * spread).softmax(-1)) > 0 for spread in (0.1, 0.5, 1, 2, 3, 5)]
    assert wins == [False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("alternative", "quantile", "first"),
    [
        (Alternative.EXPONENTIAL, None, 3.0),
        (Alternative.EXPONENTIAL, 0.5, 2.0),
        (Alternative.HALF_NORMAL, None, 2.0),
        (Alternative.LOGNORMAL, None, None),
    ],
)
def test_what_a_power_law_is_weighed_against_decides(
    alternative: Alternative, quantile: float | None, first: float | None
) -> None:
    """Spread of the scores from which on the power law wins."""
    scores = torch.randn(256, 77, generator=torch.Generator().manual_seed(0))
    winning = []
    for spread in (0.1, 0.5, 1.0, 2.0, 3.0, 5.0):
        values = (scores * spread).softmax(-1)
        smallest = None if quantile is None else float(values.flatten().quantile(quantile))
        if likelihood_ratio(values, smallest, alternative) > 0:
            winning.append(spread)
    assert winning == [spread for spread in (2.0, 3.0, 5.0) if first is not None and spread >= first]


@pytest.mark.parametrize("alternative", Alternative)
def test_every_ratio_is_free_of_the_unit(alternative: Alternative) -> None:
    wanted = likelihood_ratio(HEAVY, None, alternative)
    assert likelihood_ratio(HEAVY * 0.01, None, alternative) == pytest.approx(wanted, abs=1e-6)


def test_likelihoods_are_those_of_the_densities() -> None:
    values = HEAVY.double()
    half, log = fit_half_normal(HEAVY, 1.0), fit_lognormal(HEAVY, 1.0)
    of_half = torch.distributions.HalfNormal(half.parameter).log_prob(values - 1).sum()
    of_log = torch.distributions.LogNormal(values.log().mean(), log.parameter).log_prob(values).sum()
    assert half.log_likelihood == pytest.approx(float(of_half), abs=1e-5)
    assert log.log_likelihood == pytest.approx(float(of_log), abs=1e-5)


def test_draws_from_either_law_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(5000, generator=generator, dtype=torch.float64)
    assert likelihood_ratio((1 - uniform) ** (-1 / 1.5)) > 0  # a density of exponent 2.5
    assert likelihood_ratio(1 - (1 - uniform).log()) < 0
