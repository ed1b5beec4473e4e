"""Granularity: which elements of a tensor share one scale and zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PerTensor:
    """One parameter for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One parameter per index of `axis` (output channels of a weight: axis 0), shared over all other axes."""

    axis: int


@dataclass(frozen=True)
class PerToken:
    """One parameter per vector along the last axis: every token of every sample has its own.

    Fitted to the tensor at hand (dynamic), because it depends on the batch; parameters per token *position*,
    shared over a batch, are PerChannel(axis=-2).
    """


@dataclass(frozen=True)
class PerGroup:
    """One parameter per group of the indices of `axis`; `labels[i]` >= 0 is the group of index i.

    Parameters are expanded to one per index, so that they broadcast like PerChannel's.
    Raises ValueError for empty or negative labels.
    """

    axis: int
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.labels or min(self.labels) < 0:
            raise ValueError("groups: labels must be one non-negative integer per index")


Granularity = PerTensor | PerChannel | PerToken | PerGroup


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor as rows of elements that share parameters.

    `values` (n_rows, n) holds the elements. `labels` (n_rows,), where given, says which rows share
    parameters: row r belongs to group labels[r] of `n_groups`; otherwise every row is a group. `shape` is the
    broadcastable shape of one parameter per row.
    """

    values: Tensor
    labels: Tensor | None
    n_groups: int
    shape: tuple[int, ...]

    def expand(self, per_group: Tensor) -> Tensor:
        """One value per group (n_groups,) -> one per row, in the shape that broadcasts against the tensor."""
        per_row = per_group if self.labels is None else per_group[self.labels]
        return per_row.reshape(self.shape)

    def minmax(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each group, (n_groups,) each.

        Raises ValueError for an empty tensor, and for NaN or infinite values.
        """
        if self.values.numel() == 0:
            raise ValueError("range: the tensor has no elements")
        # two passes: aminmax along an axis is a hundred times slower on a CPU
        lo, hi = self.values.amin(1), self.values.amax(1)
        if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
            raise ValueError("range: the tensor holds NaN or infinite values")
        if self.labels is None:
            return lo, hi
        # a label no index carries leaves its group at zero; expand() never reads it
        zeros = lo.new_zeros(self.n_groups)
        return (
            zeros.scatter_reduce(0, self.labels, lo, "amin", include_self=False),
            zeros.scatter_reduce(0, self.labels, hi, "amax", include_self=False),
        )


def rows(x: Tensor, granularity: Granularity) -> Rows:
    """View (or, for an inner axis, copy) `x` as rows that share parameters.

    Raises ValueError for an axis that `x` lacks, or labels that do not match it.
    """
    x = x.detach()
    match granularity:
        case PerTensor():
            return Rows(x.reshape(1, -1), None, 1, (1,) * x.ndim)
        case PerToken():
            if x.ndim == 0:
                raise ValueError("per-token parameters: the tensor has no axes")
            values = x.reshape(-1, x.shape[-1])
            return Rows(values, None, values.shape[0], (*x.shape[:-1], 1))
        case PerChannel(axis):
            values, shape = _along(x, axis)
            return Rows(values, None, values.shape[0], shape)
        case PerGroup(axis, labels):
            values, shape = _along(x, axis)
            if len(labels) != values.shape[0]:
                raise ValueError(
                    f"groups: {len(labels)} labels for the {values.shape[0]} indices of axis {axis}"
                )
            return Rows(values, torch.tensor(labels, device=x.device), max(labels) + 1, shape)


def _along(x: Tensor, axis: int) -> tuple[Tensor, tuple[int, ...]]:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis}: the tensor has {x.ndim} axes")
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return x.movedim(axis, 0).reshape(x.shape[axis], -1), tuple(shape)


def reduce_minmax(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of the elements that share parameters, each broadcastable against `x`.

    Raises ValueError for an empty tensor, for NaN or infinite values, and for an axis or labels that do not
    match `x`.
    """
    split = rows(x, granularity)
    lo, hi = split.minmax()
    return split.expand(lo), split.expand(hi)
