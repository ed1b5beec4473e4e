"""Groups of indices of one axis that share a scale (DGQ): which axis, which indices belong together, and
what range each group has.

Everything follows from the extremes of every index: lo, hi (n,), the least and the largest value at index i
over all other axes, batches and samples.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halftone.quantizers.affine import AffineParams, fit_affine

NO_INDEX = 255
"""Label beyond the end of an axis, where rows of labels differ in length."""
SEED, STARTS = 0, 1
_ALIGNED, _ALIGNED_SHORT, _SHORT = 64, 16, 512


class Axis(IntEnum):
    """What is grouped, see `halftone.quantizers.layout`."""

    CHANNEL = 0
    POSITION = 1


class Grouping(NamedTuple):
    """Groups of one site. axis: uint8 (rows,), of `Axis`. labels: uint8 (rows, longest),
    the group of every index, `NO_INDEX` behind the last. One row a call, or one for all."""

    axis: Tensor
    labels: Tensor

    def row(self, call: int) -> tuple[Axis, Tensor]:
        """Axis and labels (n,) int64 at a call."""
        at = call if len(self.axis) > 1 else 0
        labels = self.labels[at]
        return Axis(int(self.axis[at])), labels[labels != NO_INDEX].long()

    def rows(self) -> list[tuple[Axis, Tensor]]:
        """Axis and labels of every row held."""
        return [self.row(at) for at in range(len(self.axis))]


def spread(lo: Tensor, hi: Tensor) -> float:
    """How far the extremes (n,) of an axis's indices lie apart: maxima and minima together (DGQ's D)."""
    return float((hi.amax() - hi.amin()) + (lo.amax() - lo.amin()))


def most_groups(wanted: int, length: int) -> int:
    """At most a quarter of the indices, so that small maps do not fall into one group a pixel (ours)."""
    return max(1, min(wanted, length // 4))


def cluster(lo: Tensor, hi: Tensor, groups: int) -> Tensor:
    """Labels (n,) int64 of K-means on the points (lo, hi), clusters in order of their centres.

    The same for any order of the indices, and never more groups than there are different points (both ours).
    """
    points = torch.stack([lo, hi], dim=1).double().cpu().numpy()
    different, place, counts = np.unique(points, axis=0, return_inverse=True, return_counts=True)
    place = place.reshape(-1)
    if groups <= 1 or len(different) == 1:
        return torch.zeros(len(points), dtype=torch.int64)
    if groups >= len(different):
        return torch.from_numpy(place.astype(np.int64))
    from sklearn.cluster import KMeans

    means = KMeans(groups, n_init=STARTS, random_state=SEED)
    with _threads().limit(limits=1, user_api="openmp"):  # sums of several threads come in any order
        found = means.fit(different, sample_weight=counts)
    order = np.lexsort((found.cluster_centers_[:, 1], found.cluster_centers_[:, 0]))
    rank = np.empty(groups, dtype=np.int64)
    rank[order] = np.arange(groups)
    _, labels = np.unique(rank[found.labels_[place]], return_inverse=True)
    return torch.from_numpy(labels.reshape(-1).astype(np.int64))


@cache
def _threads() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def align(lo: Tensor, hi: Tensor, groups: int) -> Tensor:
    """Labels (n,) int64 of groups that kernels can run: indices in order of magnitude, cut at multiples of 64
    (of 16 below 512), where the sum of size x squared range is least. Ours; zero belongs to every range.

    lo, hi: (calls, n); every call counts relative to its own range. The indices that no unit is left for join
    the last group.
    """
    lo, hi = lo.double().clamp(max=0), hi.double().clamp(min=0)
    length = lo.shape[1]
    unit = _ALIGNED if length >= _SHORT else _ALIGNED_SHORT
    units = max(1, length // unit)
    whole = (hi.amax(1) - lo.amin(1)).clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    magnitude = (torch.maximum(-lo, hi) / whole).amax(0)
    order = magnitude.argsort(stable=True)
    ends = [unit * (k + 1) for k in range(units - 1)] + [length]
    starts = [0, *ends[:-1]]

    def cost(first: int, last: int) -> float:
        inside = order[starts[first] : ends[last]]
        ranges = (hi[:, inside].amax(1) - lo[:, inside].amin(1)) / whole[:, 0]
        return len(inside) * float(ranges.square().sum())

    cuts = _best_cuts(units, min(groups, units), cost)
    labels = torch.zeros(length, dtype=torch.int64)
    for label, (first, last) in enumerate(cuts):
        labels[order[starts[first] : ends[last]]] = label
    return labels


def _best_cuts(units: int, groups: int, cost: Any) -> list[tuple[int, int]]:
    """First and last unit of each of at most `groups` parts, of the least sum of costs."""
    costs = {(i, j): cost(i, j) for i in range(units) for j in range(i, units)}
    # best[j]: cost and parts of units 0..j
    best: list[tuple[float, list[tuple[int, int]]]] = [(costs[0, j], [(0, j)]) for j in range(units)]
    for _ in range(groups - 1):
        best = [
            min(
                [best[j], *((best[i][0] + costs[i + 1, j], [*best[i][1], (i + 1, j)]) for i in range(j))],
                key=lambda found: found[0],
            )
            for j in range(units)
        ]
    return best[-1][1]


def group_range(lo: Tensor, hi: Tensor, labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Lowest lo and highest hi of each group, (groups,) each; behind the last group, that one's again."""
    found_lo, found_hi = (
        values.new_zeros(groups).scatter_reduce(0, labels, values, how, include_self=False)
        for values, how in ((lo, "amin"), (hi, "amax"))
    )
    last = int(labels.max())
    found_lo[last + 1 :], found_hi[last + 1 :] = found_lo[last], found_hi[last]
    return found_lo, found_hi


def fit_groups(
    lo: Tensor, hi: Tensor, labels: Tensor, groups: int, bits: int, *, include_zero: bool
) -> AffineParams:
    """Parameters (groups,) of the ranges of groups.

    DGQ's published code does not force zero into a range; kernels that pad with zero need it there.
    """
    return fit_affine(*group_range(lo, hi, labels, groups), bits, include_zero=include_zero)
