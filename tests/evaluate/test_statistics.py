"""Intervals cover what they claim to cover, and the verdict follows from them."""

from __future__ import annotations

import numpy as np
import pytest

from halftone.evaluate.statistics import (
    SAME,
    Estimate,
    bonferroni,
    bootstrap,
    group_jackknife,
    prompt_groups,
    verdict,
)


def test_bootstrap_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        found = bootstrap(rng.exponential(2.0, 120), resamples=200, seed=1)
        hits.append(found.lo <= 2.0 <= found.hi)
    assert 0.89 <= np.mean(hits) <= 0.985


def test_bootstrap_of_differences_is_narrower_than_of_rows() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 5, 200)
    ours, theirs = shared + rng.normal(0.5, 0.1, 200), shared
    paired = bootstrap(ours - theirs, resamples=500, seed=0)
    alone = bootstrap(ours, resamples=500, seed=0)
    assert paired.excludes_zero
    assert paired.hi - paired.lo < 0.1 * (alone.hi - alone.lo)


def test_bootstrap_draws_depend_on_seed_and_count_alone() -> None:
    values = np.random.default_rng(2).normal(size=50)
    first, again = (bootstrap(values, resamples=300, seed=3) for _ in range(2))
    shifted = bootstrap(values + 1, resamples=300, seed=3)
    assert first == again
    assert (shifted.lo, shifted.hi) == pytest.approx((first.lo + 1, first.hi + 1))
    assert bootstrap(values, resamples=300, seed=4) != first
    with pytest.raises(ValueError, match="no values"):
        bootstrap(np.empty(0), resamples=100, seed=0)


def test_jackknife_covers_a_nonlinear_statistic() -> None:
    """The coefficient of variation of exponential values is 1."""
    rng = np.random.default_rng(3)
    labels = prompt_groups(400, 0)
    hits = []
    for _ in range(200):
        values = rng.exponential(3.0, 400)
        found = group_jackknife(lambda kept, v=values: float(v[kept].std() / v[kept].mean()), labels)
        hits.append(found.lo <= 1.0 <= found.hi)
    assert 0.88 <= np.mean(hits) <= 0.99


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(4).normal(size=2000)
    found = group_jackknife(lambda kept: float(values[kept].mean()), prompt_groups(2000, 0))
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / np.sqrt(2000), rel=0.45)
    assert (found.lo + found.hi) / 2 == pytest.approx(found.value)


def test_jackknife_ignores_a_bias_that_depends_on_the_count() -> None:
    values = np.random.default_rng(5).normal(size=400)
    labels = prompt_groups(400, 0)
    plain = group_jackknife(lambda kept: float(values[kept].mean()), labels)
    biased = group_jackknife(lambda kept: float(values[kept].mean()) + 50 / kept.sum(), labels)
    assert biased.error == pytest.approx(plain.error)


def test_groups_are_even_and_the_same_for_every_row() -> None:
    labels = prompt_groups(1000, 7)
    assert np.bincount(labels).tolist() == [50] * 20
    assert np.array_equal(labels, prompt_groups(1000, 7))
    assert not np.array_equal(labels, np.sort(labels))
    assert np.bincount(prompt_groups(64, 7)).max() == 4
    assert len(set(prompt_groups(5, 7))) == 5
    with pytest.raises(ValueError, match="two groups"):
        group_jackknife(lambda kept: 0.0, prompt_groups(1, 7))


def test_verdict() -> None:
    none, some = Estimate(0.1, 0.1, -0.1, 0.3), Estimate(-5.0, 1.0, -7.0, -3.0)
    assert verdict({"fid_excess": none, "alignment": none}) == SAME
    assert verdict({"fid_excess": none, "alignment": some}) == "differs from full precision in alignment"


def test_verdict_on_equal_models_is_rarely_wrong() -> None:
    """Three tests at once keep the error of the family, about 5 %."""
    rng = np.random.default_rng(6)
    level = bonferroni(3)
    wrong = 0
    for _ in range(200):
        tests = {
            str(k): bootstrap(rng.normal(size=100), resamples=400, seed=k, level=level) for k in range(3)
        }
        wrong += verdict(tests) != SAME
    assert wrong / 200 <= 0.11
