"""Range estimators: from the values seen to the (lo, hi) that the codes shall span."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from halftone.axes import Axes
from halftone.policies import Range
from halftone.quantizers.affine import check_bits, fake_quantize, fit_affine
from halftone.quantizers.granularity import Granularity, PerTensor, Rows, reduce_minmax, rows
from halftone.quantizers.histogram import BINS, Histogram

TORCH_MOMENTUM = 0.01
Q_DIFFUSION_MOMENTUM = 0.05
LP_NORM = 2.4
LP_STEPS = 80
PER_TENSOR = PerTensor()


class Estimator(Protocol):
    """Sees values in any number of updates, then names a range.

    `update` raises ValueError for an empty tensor, for NaN or infinite values, and for a tensor whose
    parameters have another shape than before. `range` gives (lo, hi), float32, broadcastable against the
    tensors seen, and raises ValueError before the first update. `state` and `load_state` let a long pass stop
    and go on with the same bits.
    """

    def update(self, x: Tensor) -> None: ...

    def range(self) -> tuple[Tensor, Tensor]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class MinMax:
    """Running minimum of minima, maximum of maxima."""

    def __init__(self, granularity: Granularity = PER_TENSOR) -> None:
        self.granularity = granularity
        self._range: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        lo, hi = (bound.float() for bound in reduce_minmax(x, self.granularity))
        self._range = (lo, hi) if self._range is None else self._merge(lo, hi, *self._range)

    def _merge(self, lo: Tensor, hi: Tensor, seen_lo: Tensor, seen_hi: Tensor) -> tuple[Tensor, Tensor]:
        _same_shape(lo.shape, seen_lo.shape)
        return torch.minimum(seen_lo, lo), torch.maximum(seen_hi, hi)

    def range(self) -> tuple[Tensor, Tensor]:
        if self._range is None:
            raise ValueError("range: no values were seen")
        return self._range

    def state(self) -> dict[str, Tensor]:
        return {} if self._range is None else dict(zip(("lo", "hi"), self._range, strict=True))

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._range = (state["lo"], state["hi"]) if state else None


class MovingAverage(MinMax):
    """The first update sets the range; each later one moves it by `momentum` of the way to its own extremes.

    `momentum` is the weight of the new values: 0.01 is torch's moving-average observer, 0.05 the running
    statistic of Q-Diffusion (0.95 old). Order matters: after 50 updates at 0.01 the first still weighs 61 %.
    Raises ValueError unless 0 < momentum <= 1.
    """

    def __init__(self, momentum: float = TORCH_MOMENTUM, granularity: Granularity = PER_TENSOR) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum {momentum}: must lie above 0 and not above 1")
        super().__init__(granularity)
        self.momentum = momentum

    def _merge(self, lo: Tensor, hi: Tensor, seen_lo: Tensor, seen_hi: Tensor) -> tuple[Tensor, Tensor]:
        _same_shape(lo.shape, seen_lo.shape)
        return seen_lo + self.momentum * (lo - seen_lo), seen_hi + self.momentum * (hi - seen_hi)


class _Counting:
    """What estimators that need the whole distribution share: an order-independent histogram per group."""

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self._histogram: Histogram | None = None
        self._layout: tuple[tuple[int, ...], Tensor | None] = ((), None)

    def update(self, x: Tensor) -> None:
        split = rows(x, self.granularity)
        lo, hi = split.minmax()
        if self._histogram is None:
            self._histogram = Histogram(lo, hi)
        else:
            _same_shape(split.shape, self._layout[0])
        self._layout = (split.shape, split.labels)
        self._histogram.add(split.values, split.labels, lo, hi)

    def _seen(self) -> Histogram:
        if self._histogram is None:
            raise ValueError("range: no values were seen")
        return self._histogram

    def _expand(self, per_group: Tensor) -> Tensor:
        shape, labels = self._layout
        return Rows(per_group, labels, per_group.numel(), shape).expand(per_group.float())

    def state(self) -> dict[str, Tensor]:
        if self._histogram is None:
            return {}
        shape, labels = self._layout
        state = {**self._histogram.state(), "shape": torch.tensor(shape, dtype=torch.int64)}
        return state if labels is None else {**state, "labels": labels}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._histogram = Histogram.from_state(state) if state else None
        self._layout = (tuple(state["shape"].tolist()), state.get("labels")) if state else ((), None)


class Percentile(_Counting):
    """From the (100 - percent)-th to the percent-th percentile, of a histogram.

    Each bound is the outer edge of the bin that holds the percentile (at most 1/4096 of the full range too
    wide), and never beyond the extreme seen; percent 100 is min-max.
    Raises ValueError unless 50 < percent <= 100.
    """

    def __init__(self, percent: float, granularity: Granularity = PER_TENSOR) -> None:
        if not 50 < percent <= 100:
            raise ValueError(f"percentile {percent}: must lie above 50 and not above 100")
        super().__init__(granularity)
        self.percent = percent

    def range(self) -> tuple[Tensor, Tensor]:
        histogram = self._seen()
        cumulative = histogram.counts.cumsum(1)
        last = cumulative[:, -1:] - 1
        # a whole rank that floating point left just above must not count as the next one
        above = torch.ceil(last.double() * (self.percent / 100) - 1e-6).long()
        edges, width = histogram.edges()
        # the bin that holds the order statistic of rank r is the first whose cumulative count exceeds r
        lo = edges.gather(1, (cumulative <= last - above).sum(1, keepdim=True).clamp(max=BINS - 1))
        hi = edges.gather(1, (cumulative <= above).sum(1, keepdim=True).clamp(max=BINS - 1)) + width
        lo, hi = torch.maximum(lo[:, 0].float(), histogram.lo), torch.minimum(hi[:, 0].float(), histogram.hi)
        return self._expand(lo), self._expand(hi)


class Lp(_Counting):
    """The range of `lp_range` for values that come in batches, searched on a histogram (bin centres).

    Meant for up to 10 bits, where a step is several bins wide; beyond, the search has nothing to gain.
    """

    def __init__(
        self, bits: int, granularity: Granularity = PER_TENSOR, p: float = LP_NORM, steps: int = LP_STEPS
    ) -> None:
        check_bits(bits)
        super().__init__(granularity)
        self.bits, self.p, self.steps = bits, p, steps

    def range(self) -> tuple[Tensor, Tensor]:
        histogram = self._seen()
        edges, width = histogram.edges()
        # the end bins reach beyond the values, so their centres may too
        lo, hi = histogram.lo[:, None], histogram.hi[:, None]
        centres = (edges + width / 2).float().clamp(lo, hi)
        counts = histogram.counts.double()
        best = _search(centres, histogram.lo, histogram.hi, self.bits, self.p, self.steps, counts)
        return self._expand(best[0]), self._expand(best[1])


@torch.no_grad()
def lp_range(
    x: Tensor, bits: int, granularity: Granularity, p: float = LP_NORM, steps: int = LP_STEPS
) -> tuple[Tensor, Tensor]:
    """The range, among (lo, hi) shrunk by 0, 1, ... `steps`-1 percent, with the lowest mean |x -
    x_quantized|^p.

    Source: the range search of BRECQ and Q-Diffusion (p = 2.4, 80 candidates). Zero is always part of the
    range scored (our choice: so it is in the parameters fitted to the result). Returns (lo, hi) broadcastable
    against `x`. Raises ValueError as `reduce_minmax` does, and unless 1 <= steps <= 100.
    """
    split = rows(x, granularity)
    lo, hi = split.minmax()
    if split.labels is None:
        best = _search(split.values.float(), lo.float(), hi.float(), bits, p, steps)
        return split.expand(best[0]), split.expand(best[1])
    found_lo, found_hi = lo.float(), hi.float()
    for group in split.labels.unique().tolist():
        values = split.values[split.labels == group].reshape(1, -1).float()
        best = _search(values, found_lo[group : group + 1], found_hi[group : group + 1], bits, p, steps)
        found_lo[group], found_hi[group] = best[0][0], best[1][0]
    return split.expand(found_lo), split.expand(found_hi)


def _search(
    values: Tensor, lo: Tensor, hi: Tensor, bits: int, p: float, steps: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best (lo, hi), (n_rows,) each, of `values` (n_rows, n); the widest wins a tie."""
    check_bits(bits)
    if not 1 <= steps <= 100:
        raise ValueError(f"steps {steps}: must lie in 1..100, the range shrinks by one percent in each")
    best_lo, best_hi = lo, hi
    best = torch.full_like(lo, torch.inf, dtype=torch.float64)
    for step in range(steps):
        candidate_lo, candidate_hi = lo * (1 - 0.01 * step), hi * (1 - 0.01 * step)
        params = fit_affine(candidate_lo[:, None], candidate_hi[:, None], bits)
        error = (fake_quantize(values, params) - values).abs_().pow_(p)
        score = error.mean(1, dtype=torch.float64) if weights is None else (error * weights).sum(1)
        better = score < best
        best = torch.where(better, score, best)
        best_lo = torch.where(better, candidate_lo, best_lo)
        best_hi = torch.where(better, candidate_hi, best_hi)
    return best_lo, best_hi


def make_estimator(axes: Axes, bits: int, granularity: Granularity = PER_TENSOR) -> Estimator:
    """The estimator of activation ranges that a recipe's axes ask for; only the L_p search needs `bits`."""
    match axes.activation_range:
        case Range.MINMAX:
            return MinMax(granularity)
        case Range.MOVING_AVERAGE:
            return MovingAverage(axes.momentum, granularity)
        case Range.PERCENTILE:
            return Percentile(axes.percentile, granularity)
        case Range.LP:
            return Lp(bits, granularity)


def _same_shape(shape: tuple[int, ...], seen: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(seen):
        raise ValueError(f"range: parameters of shape {tuple(shape)}, but {tuple(seen)} before")
