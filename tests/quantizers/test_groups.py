"""Groups of indices: spread, clusters, ranges, and cuts that kernels can run."""

from __future__ import annotations

import itertools

import pytest
import torch

from halftone.quantizers.affine import fake_quantize, fit_affine
from halftone.quantizers.granularity import PerGroup, reduce_minmax
from halftone.quantizers.groups import (
    NO_INDEX,
    Axis,
    Grouping,
    align,
    cluster,
    fit_groups,
    group_range,
    most_groups,
    spread,
)
from halftone.quantizers.layout import Layout

X = torch.tensor([[1.0, 1, 10, -1], [0, 2, 8, -2], [-1, 1, 12, -1]])  # tokens x channels


def ends() -> dict[Axis, tuple[torch.Tensor, torch.Tensor]]:
    return Layout().extremes(X[None])


def by_group(labels: torch.Tensor, groups: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales and zero points of X with its channels in groups."""
    params = fit_groups(*ends()[Axis.CHANNEL], labels, groups, bits, include_zero=False)
    scale, zero_point = params.scale[labels], params.zero_point[labels]
    return fake_quantize(X, type(params)(scale, zero_point, bits)), params.scale, params.zero_point


def test_spread_of_channels_and_tokens() -> None:
    found = ends()
    assert found[Axis.CHANNEL][0].tolist() == [-1, 1, 8, -2]
    assert found[Axis.CHANNEL][1].tolist() == [1, 2, 12, -1]
    assert spread(*found[Axis.CHANNEL]) == 23
    assert spread(*found[Axis.POSITION]) == 5


def test_two_groups_take_the_outlier_channel_apart() -> None:
    labels = cluster(*ends()[Axis.CHANNEL], 2)
    assert labels.tolist() == [0, 0, 1, 0]  # in order of their centres
    values, scale, zero_point = by_group(labels, 2, 4)
    assert torch.allclose(scale, torch.tensor([0.266667, 0.266667]))
    assert zero_point.tolist() == [8, -30]
    assert (values - X).square().mean().item() == pytest.approx(0.0066667, abs=1e-6)
    whole = fit_affine(X.min(), X.max(), 4)
    assert (whole.scale.item(), whole.zero_point.item()) == (pytest.approx(0.933333), 2)
    assert (fake_quantize(X, whole) - X).square().mean().item() == pytest.approx(0.0259259, abs=1e-6)


def test_as_many_groups_as_indices_keep_every_extreme_and_one_is_the_layer() -> None:
    labels = cluster(*ends()[Axis.CHANNEL], 4)
    assert sorted(labels.tolist()) == [0, 1, 2, 3]
    values, scale, _ = by_group(labels, 4, 4)
    lo, hi = reduce_minmax(X, PerGroup(1, tuple(labels.tolist())))
    assert torch.allclose(scale[labels], ((hi - lo) / 15).flatten())
    assert ((values - X).abs() <= scale[labels] / 2 + 1e-6).all()

    one = cluster(*ends()[Axis.CHANNEL], 1)
    _, scale, zero_point = by_group(one, 1, 4)
    layer = fit_affine(X.min(), X.max(), 4, include_zero=False)
    assert (scale.item(), zero_point.item()) == (layer.scale.item(), layer.zero_point.item())


def test_zero_is_part_of_a_range_only_where_asked() -> None:
    lo, hi, labels = torch.tensor([8.0]), torch.tensor([12.0]), torch.tensor([0])
    free = fit_groups(lo, hi, labels, 1, 4, include_zero=False)
    padded = fit_groups(lo, hi, labels, 1, 4, include_zero=True)
    assert (free.scale.item(), free.zero_point.item()) == (pytest.approx(4 / 15), -30)
    assert (padded.scale.item(), padded.zero_point.item()) == (pytest.approx(12 / 15), 0)


def test_the_order_of_indices_changes_no_group() -> None:
    generator = torch.Generator().manual_seed(0)
    lo = -torch.rand(96, generator=generator).pow(3)
    hi = torch.rand(96, generator=generator).pow(3) * 4
    order = torch.randperm(96, generator=generator)
    assert torch.equal(cluster(lo[order], hi[order], 7), cluster(lo, hi, 7)[order])
    few = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert cluster(few, few, 4).tolist() == [0, 1, 0, 1], "no more groups than different points"


def test_groups_are_at_most_a_quarter_of_the_indices() -> None:
    assert [most_groups(16, length) for length in (1, 3, 16, 64, 320)] == [1, 1, 4, 16, 16]


def test_groups_behind_the_last_repeat_it() -> None:
    lo, hi = group_range(torch.tensor([-1.0, 2, 0]), torch.tensor([1.0, 4, 3]), torch.tensor([0, 1, 0]), 4)
    assert (lo.tolist(), hi.tolist()) == ([-1, 2, 2, 2], [3, 4, 4, 4])


def test_a_row_of_labels_ends_where_its_axis_does() -> None:
    labels = torch.tensor([[0, 1, 0, 2], [1, 0, NO_INDEX, NO_INDEX]], dtype=torch.uint8)
    groups = Grouping(torch.tensor([0, 1], dtype=torch.uint8), labels)
    assert groups.row(0)[0] is Axis.CHANNEL
    assert groups.row(0)[1].tolist() == [0, 1, 0, 2]
    assert groups.row(1)[0] is Axis.POSITION
    assert groups.row(1)[1].tolist() == [1, 0]


@pytest.mark.parametrize(("length", "unit"), [(64, 16), (100, 16), (640, 64)])
def test_aligned_groups_are_cut_at_multiples(length: int, unit: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hi = torch.rand(3, length, generator=generator) + 0.1
    wide = torch.randperm(length, generator=generator)[:5]
    hi[:, wide] *= 50
    labels = align(-hi, hi, 3)
    sizes = torch.bincount(labels)
    assert len(sizes) <= 3
    assert (sizes[:-1] % unit == 0).all(), "the last takes what is over"
    assert set(labels[wide].tolist()) == {len(sizes) - 1}, "in order of magnitude"
    assert sizes[-1] < 2 * unit


def test_aligned_cuts_are_the_best_ones() -> None:
    hi = torch.rand(2, 80, generator=torch.Generator().manual_seed(2)).pow(4)
    order = (hi / hi.amax(1, keepdim=True)).amax(0).argsort(stable=True)

    def cost(parts: list[torch.Tensor]) -> float:
        whole = hi.double().amax(1)
        return sum(len(p) * float((hi[:, p].double().amax(1) / whole).square().sum()) for p in parts)

    labels = align(torch.zeros_like(hi), hi, 3)
    found = cost([(labels == k).nonzero()[:, 0] for k in range(int(labels.max()) + 1)])
    every = [cost([order[:a], order[a:b], order[b:]]) for a, b in itertools.combinations((16, 32, 48, 64), 2)]
    assert found == pytest.approx(min(every))
