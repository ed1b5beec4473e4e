"""Which elements share parameters."""

import math

import pytest
import torch

from halftone.quantizers.granularity import PerChannel, PerGroup, PerTensor, PerToken, reduce_minmax

X = torch.arange(24.0).reshape(2, 3, 4) - 10


def test_per_tensor():
    lo, hi = reduce_minmax(X, PerTensor())
    assert (lo.item(), hi.item(), lo.shape) == (-10, 13, (1, 1, 1))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_per_channel_reduces_all_other_axes(axis):
    lo, hi = reduce_minmax(X, PerChannel(axis))
    others = tuple(d for d in range(3) if d != axis % 3)
    assert torch.equal(lo, X.amin(others, keepdim=True))
    assert torch.equal(hi, X.amax(others, keepdim=True))


def test_per_token_is_one_per_vector_of_every_sample():
    lo, hi = reduce_minmax(X, PerToken())
    assert torch.equal(lo, X.amin(-1, keepdim=True))
    assert torch.equal(hi, X.amax(-1, keepdim=True))


def test_per_group_shares_the_extremes_of_its_indices():
    x = torch.tensor([[1.0, 1, 10, -1], [0, 2, 8, -2], [-1, 1, 12, -1]])
    lo, hi = reduce_minmax(x, PerGroup(1, (0, 0, 1, 0)))
    assert lo.tolist() == [[-2, -2, 8, -2]]
    assert hi.tolist() == [[2, 2, 12, 2]]


def test_groups_of_one_index_are_channels_and_one_group_is_the_tensor():
    lo, hi = reduce_minmax(X, PerGroup(1, (2, 0, 1)))
    assert torch.equal(lo, reduce_minmax(X, PerChannel(1))[0])
    lo, hi = reduce_minmax(X, PerGroup(-1, (5, 5, 5, 5)))
    assert lo.unique().tolist() == [-10]
    assert hi.unique().tolist() == [13]
    assert lo.shape == (1, 1, 4)


def test_permuting_channels_permutes_parameters():
    order = torch.tensor([2, 0, 3, 1])
    labels = (0, 1, 0, 1)
    lo, _ = reduce_minmax(X, PerGroup(2, labels))
    moved, _ = reduce_minmax(X[..., order], PerGroup(2, tuple(labels[i] for i in order)))
    assert torch.equal(moved, lo[..., order])


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerToken(), PerGroup(1, (0, 1, 0))])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(granularity, fault):
    x = X.clone()
    x[1, 2, 3] = fault
    with pytest.raises(ValueError, match="NaN or infinite"):
        reduce_minmax(x, granularity)


def test_what_does_not_match_the_tensor_is_refused():
    with pytest.raises(ValueError, match="2 labels for the 3 indices"):
        reduce_minmax(X, PerGroup(1, (0, 1)))
    with pytest.raises(ValueError, match="axis 3"):
        reduce_minmax(X, PerChannel(3))
    with pytest.raises(ValueError, match="no elements"):
        reduce_minmax(torch.empty(0, 3), PerTensor())
    with pytest.raises(ValueError, match="no axes"):
        reduce_minmax(torch.tensor(1.0), PerToken())
    with pytest.raises(ValueError, match="non-negative"):
        PerGroup(0, (0, -1))
