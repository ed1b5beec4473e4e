"""A histogram of everything seen, in bounded memory, that does not depend on the order of the batches.

Bins are as wide as a power of two and start at multiples of their width. When values fall outside, the width
doubles and neighbouring bins merge exactly, so the counts are always those of all values at the final width.
Our own construction; torch's histogram observer re-bins approximately and depends on the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 8192


class Histogram:
    """Counts per group of rows. Between BINS/2 and BINS bins span the values of a group; 64 KiB per group.

    `lo`, `hi` (n_groups,) float32 are the exact extremes; `counts` (n_groups, BINS) int64; `origin`
    (n_groups,) int64 is the number of the first bin and `exponent` (n_groups,) int64 the width's: bin j of
    group g starts at (origin[g] + j) * 2^exponent[g].
    """

    def __init__(self, lo: Tensor, hi: Tensor) -> None:
        self.lo, self.hi = lo.float(), hi.float()
        self.exponent, self.origin = _grid(self.lo, self.hi)
        self.counts = torch.zeros(lo.numel(), BINS, dtype=torch.int64, device=lo.device)

    def add(self, values: Tensor, labels: Tensor | None, lo: Tensor, hi: Tensor) -> None:
        """Count `values` (n_rows, n), row r in group labels[r] or r; `lo`, `hi` (n_groups,) are extremes."""
        self._grow(torch.minimum(self.lo, lo.float()), torch.maximum(self.hi, hi.float()))
        group = torch.arange(values.shape[0], device=values.device) if labels is None else labels
        width = torch.exp2(self.exponent.double()).float()
        # dividing by a power of two is exact, so a value's bin does not depend on when it came
        position = torch.floor(values.float() / width[group, None]).long().sub_(self.origin[group, None])
        position.clamp_(0, BINS - 1).add_(group[:, None] * BINS)
        counted = torch.bincount(position.reshape(-1), minlength=self.counts.numel())
        self.counts += counted.reshape(self.counts.shape)

    def edges(self) -> tuple[Tensor, Tensor]:
        """Lower edge of every bin (n_groups, BINS) and the width (n_groups, 1), float64."""
        width = torch.exp2(self.exponent.double())[:, None]
        bins = torch.arange(BINS, device=self.counts.device)
        return (self.origin[:, None] + bins) * width, width

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on later, as tensors."""
        return {"lo": self.lo, "hi": self.hi, "counts": self.counts}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Histogram:
        histogram = cls(state["lo"], state["hi"])
        histogram.counts = state["counts"].clone()
        return histogram

    def _grow(self, lo: Tensor, hi: Tensor) -> None:
        exponent, origin = _grid(lo, hi)
        if not (torch.equal(exponent, self.exponent) and torch.equal(origin, self.origin)):
            bins = torch.arange(BINS, device=self.counts.device)
            number = (self.origin[:, None] + bins) >> (exponent - self.exponent)[:, None]
            # empty bins may land outside the new grid; counted ones cannot
            position = (number - origin[:, None]).clamp_(0, BINS - 1)
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, position, self.counts)
        self.lo, self.hi, self.exponent, self.origin = lo, hi, exponent, origin


def _grid(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest width (as exponent) at which [lo, hi] fits BINS bins, and the number of the first bin.

    A function of the range alone, and never smaller for a wider range: hence independence of order.
    """
    low, high = lo.double(), hi.double()
    # starts at least one doubling too fine; but no finer than float32 tells values apart, and a normal number
    spread = _exponent(high - low) - BINS.bit_length()
    exponent = torch.maximum(spread, _exponent(torch.maximum(low.abs(), high.abs())) - 24).clamp_(min=-126)
    for _ in range(3):
        width = torch.exp2(exponent.double())
        too_many = torch.floor(high / width) - torch.floor(low / width) >= BINS
        exponent = exponent + too_many.long()
    return exponent, torch.floor(low / torch.exp2(exponent.double())).long()


def _exponent(x: Tensor) -> Tensor:
    """e with x < 2^e, for x >= 0; for zero, less than for any float32."""
    return torch.where(x > 0, torch.frexp(x)[1].long(), -1000)
