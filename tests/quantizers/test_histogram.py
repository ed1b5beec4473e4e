"""The histogram's grid, at the edges of float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halftone.quantizers.histogram import BINS, Histogram


def counted(x: torch.Tensor) -> Histogram:
    lo, hi = x.min()[None], x.max()[None]
    histogram = Histogram(lo, hi)
    histogram.add(x[None], None, lo, hi)
    return histogram


def test_widths_are_exact_powers_of_two():
    exponents = torch.arange(-126, 128, dtype=torch.float64)
    assert torch.exp2(exponents).tolist() == [2.0**e for e in range(-126, 128)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_every_value_lies_in_the_bin_that_counts_it(values):
    x = torch.tensor(values)
    histogram = counted(x)
    assert histogram.counts.sum().item() == len(values)
    edges, width = histogram.edges()
    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in x.double().tolist():
        inside = (edges[0] <= value) & (value < edges[0] + width[0])
        # values below float32's normal numbers may be flushed to zero
        if abs(value) < 2.0**-120:
            return
        assert inside.sum().item() == 1
        expected += inside
    assert torch.equal(expected, histogram.counts[0])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_bins_are_used(scale):
    histogram = counted(torch.rand(1000, generator=torch.Generator().manual_seed(0)) * scale)
    span = (histogram.hi - histogram.lo).double() / histogram.edges()[1][:, 0]
    assert BINS / 2 - 1 < span.item() < BINS
