"""What is kept of an activation while the denoiser walks along the trajectory, call by call.

Of each tensor only the extremes of its channels and tokens, a sample of its values and counts of leading
indices are kept, so memory does not grow with prompts, and with calls only by a few numbers a site.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from halftone.errors import UserError
from halftone.passes.power_law import likelihood_ratio
from halftone.quantizers.groups import spread

LEADING = 0.05
"""Share of an axis's indices that count as its leading ones."""
QUANTILE = 0.999
VALUES = 65_536
"""Values drawn a call and site for quantiles and likelihoods: at least 65 lie above the 99.9th percentile."""


@dataclass
class Place:
    """Where the walk is: shared by all watches. prompts: rows of the conditional half, the last of the
    batch."""

    call: int = 0
    prompts: int = 1
    batches: int = 1
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def draw(self, x: Tensor) -> Tensor:
        """This batch's part of a call's `VALUES`, drawn at random: a stride could hit one channel alone."""
        count = -(-VALUES // self.batches)
        flat = x.reshape(-1)
        if flat.numel() <= count:
            return flat.float().cpu()
        places = torch.randint(flat.numel(), (count,), generator=self.generator)
        return flat[places.to(flat.device)].float().cpu()


def leading(length: int) -> int:
    """How many indices of an axis lead: one at least."""
    return max(1, round(LEADING * length))


def leaders(magnitudes: Tensor) -> Tensor:
    """(sets, n) -> (n,): in how many of the sets each index is among the leading ones."""
    length = magnitudes.shape[1]
    top = magnitudes.topk(leading(length), dim=1).indices
    return torch.bincount(top.flatten().cpu(), minlength=length)


def overlap(counts: Tensor, sets: int) -> float | None:
    """Mean share of leading indices that two different sets have in common; None of a single set.

    counts (n,): in how many of the `sets` sets each index leads. By chance it is about `LEADING`.
    """
    if sets < 2:
        return None
    pairs = float((counts.double() * (counts.double() - 1)).sum())
    return pairs / (sets * (sets - 1) * leading(counts.numel()))


class AxisWatch:
    """One axis of one site: channels, or tokens (positions of an image). One value per call in each list.

    least, most: extremes of every index over the calls done. led: at how many of them it was among the
    leading ones.
    """

    def __init__(self) -> None:
        self.spread: list[float] = []
        self.contrast: list[float | None] = []  # largest over median magnitude of an index
        self.over_prompts: list[float | None] = []
        self.led = self.least = self.most = torch.zeros(0)
        self._start()

    def _start(self) -> None:
        self.lo = self.hi = torch.zeros(0)
        self._counts, self._rows = torch.zeros(0), 0

    def update(self, lo: Tensor, hi: Tensor, prompts: int) -> None:
        """lo, hi: (rows, n), extremes of every index in every row of a batch, whose last `prompts` rows
        count as prompts."""
        least, most = lo.amin(0).float().cpu(), hi.amax(0).float().cpu()
        known = self.lo.numel() > 0
        self.lo, self.hi = (
            (torch.minimum(self.lo, least), torch.maximum(self.hi, most)) if known else (least, most)
        )
        counts = leaders(torch.maximum(-lo, hi)[-prompts:])
        self._counts = self._counts + counts if known else counts
        self._rows += prompts

    def finish_call(self) -> None:
        magnitudes = torch.maximum(-self.lo, self.hi)
        self.spread.append(spread(self.lo, self.hi))
        middle = float(magnitudes.median())
        self.contrast.append(float(magnitudes.amax()) / middle if middle > 0 else None)
        self.over_prompts.append(overlap(self._counts, self._rows))
        led = leaders(magnitudes[None])
        known = self.led.numel() > 0
        self.led = self.led + led if known else led
        self.least = torch.minimum(self.least, self.lo) if known else self.lo
        self.most = torch.maximum(self.most, self.hi) if known else self.hi
        self._start()

    @property
    def over_calls(self) -> float | None:
        return overlap(self.led, len(self.spread))


class ActivationWatch:
    """An activation other than a softmax output: its range, outliers and their places, at every call.

    convolution: channels come first, not last; heads: of q, k, v, whose rows are (sample, head); split:
    channels of the first half of a concatenated input. ranges: of the whole (and of both halves), a call.
    """

    def __init__(
        self, name: str, place: Place, *, convolution: bool = False, heads: int = 1, split: int | None = None
    ) -> None:
        self.name, self.place = name, place
        self.convolution, self.heads, self.split = convolution, heads, split
        self.ends: list[tuple[float, float]] = []
        self.halves: list[tuple[tuple[float, float], tuple[float, float]]] = []
        self.peaks: list[float | None] = []  # largest magnitude over the 99.9th percentile
        self.channel, self.token = AxisWatch(), AxisWatch()
        self.flat = True  # no token axis, such as the time embedding
        self._drawn: list[Tensor] = []

    @property
    def ranges(self) -> list[float]:
        return [hi - lo for lo, hi in self.ends]

    def update(self, x: Tensor) -> None:
        channels, tokens = _extremes(x.detach(), self.convolution, self.heads)
        if not bool(torch.isfinite(channels[0]).all() & torch.isfinite(channels[1]).all()):
            raise UserError(
                f"{self.name}, call {self.place.call}: the tensor holds NaN or infinite values; "
                "run the model in float32, or see if it makes images"
            )
        prompts = self.place.prompts
        self.channel.update(*channels, prompts)
        if tokens is not None:
            self.flat = False
            self.token.update(*tokens, prompts)
        self._drawn.append(self.place.draw(x.detach()).abs())

    def finish_call(self) -> None:
        lo, hi = self.channel.lo, self.channel.hi
        self.ends.append((float(lo.amin()), float(hi.amax())))
        if self.split is not None:
            first, second = slice(None, self.split), slice(self.split, None)
            ends = [(float(lo[part].amin()), float(hi[part].amax())) for part in (first, second)]
            self.halves.append((ends[0], ends[1]))
        values = torch.cat(self._drawn)
        usual = float(values.kthvalue(max(1, round(QUANTILE * values.numel()))).values)
        self.peaks.append(max(-self.ends[-1][0], self.ends[-1][1]) / usual if usual > 0 else None)
        self._drawn = []
        self.channel.finish_call()
        if not self.flat:
            self.token.finish_call()


Ends = tuple[Tensor, Tensor]


def _extremes(x: Tensor, convolution: bool, heads: int) -> tuple[Ends, Ends | None]:
    """Lowest and highest value of every channel (rows, channels) and token (rows, tokens) of every row."""
    if x.ndim == 2:
        return (x, x), None
    if heads > 1:
        x = x.unflatten(0, (-1, heads))  # (rows, heads, tokens, width): a channel is a place in a head
        return (
            (x.amin(2).flatten(1), x.amax(2).flatten(1)),
            (x.amin(3).amin(1), x.amax(3).amax(1)),
        )
    x = x.flatten(2) if convolution else x.flatten(1, -2)
    channel, token = (1, 2) if convolution else (2, 1)
    return (x.amin(token), x.amax(token)), (x.amin(channel), x.amax(channel))


class ProbabilityWatch:
    """A softmax output: its range, what falls on the first token, and which law its values follow."""

    def __init__(self, name: str, place: Place, *, heads: int, cross: bool) -> None:
        self.name, self.place, self.heads, self.cross = name, place, heads, cross
        self.tokens = 0
        self.ends: list[tuple[float, float]] = []
        self.first: list[float] = []  # mean probability of token 0
        self.remaining: list[list[float]] = []  # per prompt, the largest probability of another token
        self.ratios: list[tuple[float, float]] = []  # per value; above the smallest, and above the median
        self._start()

    def _start(self) -> None:
        self._drawn: list[Tensor] = []
        self._first: list[Tensor] = []
        self._remaining: list[Tensor] = []
        self._lo, self._hi = float("inf"), 0.0

    def update(self, x: Tensor) -> None:
        """x: (rows * heads, queries, tokens)."""
        x = x.detach()
        self.tokens = x.shape[-1]
        self._lo, self._hi = min(self._lo, float(x.amin())), max(self._hi, float(x.amax()))
        self._drawn.append(self.place.draw(x))
        if self.cross and self.tokens > 1:
            own = x.unflatten(0, (-1, self.heads))[-self.place.prompts :].float()
            self._first.append(own[..., 0].mean((1, 2)).cpu())
            self._remaining.append(own[..., 1:].amax((1, 2, 3)).cpu())

    def finish_call(self) -> None:
        self.ends.append((self._lo, self._hi))
        values = torch.cat(self._drawn)
        middle = float(values[values > 0].median())
        ratios = likelihood_ratio(values), likelihood_ratio(values, middle)
        self.ratios.append((ratios[0] / len(values), ratios[1] / len(values)))
        if self._first:
            self.first.append(float(torch.cat(self._first).mean()))
            self.remaining.append(torch.cat(self._remaining).tolist())
        self._start()

    @property
    def ranges(self) -> list[float]:
        return [hi - lo for lo, hi in self.ends]
