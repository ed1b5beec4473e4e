"""Range estimators."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halftone.axes import Axes
from halftone.policies import Range
from halftone.quantizers.affine import fake_quantize, fit_affine
from halftone.quantizers.granularity import Granularity, PerChannel, PerGroup, PerTensor
from halftone.quantizers.ranges import (
    Estimator,
    Lp,
    MinMax,
    MovingAverage,
    Percentile,
    lp_range,
    make_estimator,
)

modest = settings(max_examples=12, deadline=None, derandomize=True)
ALL: list[Callable[[Granularity], Estimator]] = [
    lambda granularity: MinMax(granularity),
    lambda granularity: MovingAverage(0.05, granularity),
    lambda granularity: Percentile(99, granularity),
    lambda granularity: Lp(4, granularity, steps=20),
]
GRANULARITIES: list[Granularity] = [PerTensor(), PerChannel(1), PerGroup(1, (0, 2, 0, 1))]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(seed: int, *shape: int) -> torch.Tensor:
    return normal(seed, *shape) * torch.exp(1.5 * normal(seed + 1, *shape))


def loss(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int) -> float:
    return (fake_quantize(x, fit_affine(lo, hi, bits)) - x).abs().pow(2.4).mean().item()


@pytest.mark.parametrize(("momentum", "expected"), [(0.05, [1, 1.10, 1.145]), (0.01, [1, 1.02, 1.0298])])
def test_moving_average_of_maxima(momentum, expected):
    estimator = MovingAverage(momentum)
    for maximum, value in zip([1.0, 3.0, 2.0], expected, strict=True):
        estimator.update(torch.tensor([-maximum, 0.0, maximum]))
        lo, hi = estimator.range()
        assert (lo.item(), hi.item()) == pytest.approx((-value, value), abs=1e-6)


def test_the_first_of_fifty_batches_keeps_most_of_the_weight():
    estimator = MovingAverage(0.01)
    for i in range(50):
        estimator.update(torch.tensor([float(i == 0)]))
    assert estimator.range()[1].item() == pytest.approx(0.99**49, abs=1e-5)


def test_minmax_keeps_the_extremes():
    estimator = MinMax(PerChannel(1))
    estimator.update(torch.tensor([[1.0, -2], [3, 0]]))
    estimator.update(torch.tensor([[-5.0, 4]]))
    lo, hi = estimator.range()
    assert (lo.tolist(), hi.tolist()) == ([[-5, -2]], [[3, 4]])


@modest
@given(st.integers(0, 2**31), st.floats(80, 100), st.floats(-2, 2).map(lambda e: 10**e), st.floats(-5, 5))
def test_percentile_covers_its_share_within_a_bin(seed, percent, magnitude, shift):
    x = (heavy_tailed(seed, 3000) + shift) * magnitude
    estimator = Percentile(percent)
    for part in x.split([1, 999, 2000]):
        estimator.update(part)
    lo, hi = (bound.item() for bound in estimator.range())
    width = (x.max() - x.min()).item() / 4000 + 1e-6 * x.abs().max().item()
    values = x.double().numpy()
    upper = np.quantile(values, percent / 100, method="higher")
    lower = np.quantile(values, 1 - percent / 100, method="lower")
    assert upper - 1e-9 <= hi <= upper + width
    assert lower - width <= lo <= lower + 1e-9


def test_percentile_of_an_exact_rank_leaves_the_outlier_out():
    x = torch.linspace(0, 1, 10_001)
    x[-1] = 50
    estimator = Percentile(99.99)
    estimator.update(x)
    assert estimator.range()[1].item() == pytest.approx(1.0, abs=50 / 4000)


def test_percent_100_is_minmax():
    x = heavy_tailed(1, 6, 4)
    for granularity in GRANULARITIES:
        ours, theirs = Percentile(100, granularity), MinMax(granularity)
        ours.update(x)
        theirs.update(x)
        for a, b in zip(ours.range(), theirs.range(), strict=True):
            assert torch.equal(a, b)


@modest
@given(st.integers(0, 2**31), st.integers(-30, 30), st.permutations(range(6)))
def test_counting_estimators_do_not_depend_on_the_order(seed, exponent, order):
    parts = [normal(seed + i, 50, 4) * 10.0 ** (i - 3) * 2.0**exponent for i in range(5)] + [
        torch.zeros(1, 4)
    ]
    for make in ALL[2:]:
        ranges = []
        for sequence in (range(6), order):
            estimator = make(PerChannel(1))
            for i in sequence:
                estimator.update(parts[i])
            ranges.append(estimator.range())
        assert torch.equal(ranges[0][0], ranges[1][0])
        assert torch.equal(ranges[0][1], ranges[1][1])


def test_counting_in_parts_counts_the_same():
    x = heavy_tailed(2, 4000)
    for make in ALL[2:]:
        whole, parts = make(PerTensor()), make(PerTensor())
        whole.update(x)
        for part in x.sort().values.split(7):
            parts.update(part)
        assert [b.item() for b in whole.range()] == [b.item() for b in parts.range()]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("make", ALL)
def test_stopping_and_going_on_gives_the_same_bits(make, granularity):
    straight, before, after = make(granularity), make(granularity), make(granularity)
    before.load_state(before.state())
    parts = [heavy_tailed(3, 10, 4), 5 * heavy_tailed(4, 20, 4)]
    for part in parts:
        straight.update(part)
    before.update(parts[0])
    after.load_state({key: value.clone() for key, value in before.state().items()})
    after.update(parts[1])
    for a, b in zip(straight.range(), after.range(), strict=True):
        assert torch.equal(a, b)


def test_lp_clips_outliers_at_few_bits_and_not_without_need():
    x = torch.cat([normal(5, 4000), torch.tensor([30.0])])
    lo, hi = lp_range(x, 4, PerTensor())
    assert loss(x, lo, hi, 4) < 0.7 * loss(x, x.min(), x.max(), 4)
    grid = torch.arange(-7.0, 9.0)
    lo, hi = lp_range(grid, 4, PerTensor())
    assert (lo.item(), hi.item()) == (-7, 8)


@modest
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_lp_is_the_best_of_its_candidates_for_every_channel(seed, bits):
    x = heavy_tailed(seed, 3, 120)
    lo, hi = lp_range(x, bits, PerChannel(0))
    for row in range(3):
        losses = [
            loss(x[row], x[row].min() * (1 - 0.01 * i), x[row].max() * (1 - 0.01 * i), bits)
            for i in range(80)
        ]
        assert loss(x[row], lo[row], hi[row], bits) == pytest.approx(min(losses), rel=1e-4)


def test_lp_of_groups_is_that_of_their_members():
    x = heavy_tailed(6, 50, 4)
    lo, hi = lp_range(x, 4, PerGroup(1, (0, 2, 0, 2)))
    for indices in ([0, 2], [1, 3]):
        alone = lp_range(x[:, indices], 4, PerTensor())
        assert lo[0, indices].tolist() == [alone[0].item()] * 2
        assert hi[0, indices].tolist() == [alone[1].item()] * 2


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_lp_on_a_histogram_is_as_good_as_on_the_values(bits):
    x = heavy_tailed(7, 20_000)
    estimator = Lp(bits)
    for part in x.split(3000):
        estimator.update(part)
    assert loss(x, *estimator.range(), bits) == pytest.approx(
        loss(x, *lp_range(x, bits, PerTensor()), bits), rel=0.02
    )


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("value", [0.0, 2.5, -1e-6, 3e30])
def test_constant_tensors_and_single_elements(make, value):
    for shape in ((3, 4), (1, 4), (1, 1)):
        estimator = make(PerTensor())
        estimator.update(torch.full(shape, value))
        lo, hi = estimator.range()
        assert lo.shape == hi.shape == (1, 1)
        # the search may shrink towards zero where that costs nothing
        assert min(value, 0) <= lo.item() <= hi.item() <= max(value, 0)
        params = fit_affine(lo, hi, 4)
        restored = fake_quantize(torch.full(shape, value), params)
        assert restored.flatten().tolist() == pytest.approx([value] * restored.numel(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(make, granularity, fault):
    x = normal(8, 5, 4)
    estimator = make(granularity)
    estimator.update(x)
    before = estimator.range()
    broken = x.clone() * 100
    broken[4, 1] = fault
    with pytest.raises(ValueError, match="NaN or infinite"):
        estimator.update(broken)
    assert torch.equal(before[0], estimator.range()[0])
    assert torch.equal(before[1], estimator.range()[1])


@pytest.mark.parametrize("make", ALL)
def test_misuse_is_refused(make):
    estimator = make(PerChannel(1))
    with pytest.raises(ValueError, match="no values were seen"):
        estimator.range()
    estimator.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="parameters of shape"):
        estimator.update(torch.ones(2, 5))


def test_settings_outside_their_range_are_refused():
    for build in (
        lambda: MovingAverage(0),
        lambda: MovingAverage(1.5),
        lambda: Percentile(50),
        lambda: Percentile(101),
        lambda: Lp(1),
        lambda: lp_range(torch.ones(3), 4, PerTensor(), steps=0),
        lambda: lp_range(torch.tensor([math.nan]), 4, PerTensor()),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            build()


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        (Range.MINMAX, MinMax),
        (Range.MOVING_AVERAGE, MovingAverage),
        (Range.PERCENTILE, Percentile),
        (Range.LP, Lp),
    ],
)
def test_the_axes_choose_the_estimator(choice, kind):
    axes = Axes(activation_range=choice, percentile=99.5)
    estimator = make_estimator(axes, 6, PerChannel(-1))
    assert isinstance(estimator, MinMax | Percentile | Lp)
    assert type(estimator) is kind
    assert estimator.granularity == PerChannel(-1)
    if isinstance(estimator, Percentile):
        assert estimator.percent == 99.5
    if isinstance(estimator, Lp):
        assert estimator.bits == 6
