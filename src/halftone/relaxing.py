"""Activation relaxing (PCR): a few calls whose activations get more bits, weights unchanged.

The paper relaxes one interval of calls, chosen by hand: near x_0 for Stable Diffusion, whose quantized images
lose fidelity, near x_T for SDXL, whose images lose their match with the text. Every activation that is
quantized is relaxed, q, k, v and attention probabilities included (our choice: the paper quantizes none of
these, so its relaxed calls are not held back by them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, model_validator

from halftone.errors import UserError


class Interval(StrEnum):
    """No call; the paper's intervals; or what `halftone sensitivity` has found."""

    NONE = "none"
    NEAR_X0 = "near_x0"
    NEAR_XT = "near_xT"
    AUTO = "auto"


class Share(BaseModel):
    """An interval of the sampling run, from 0 (pure noise) to 1, both ends included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: tuple[float, float] = Field(description="start and end, in 0..1")

    @model_validator(mode="after")
    def _ordered(self) -> Share:
        start, end = self.share
        if not 0 <= start <= end <= 1:
            raise ValueError(f"share {start:g} to {end:g}: must be two numbers in 0..1, the smaller first")
        return self


class Calls(BaseModel):
    """Calls by index, 0 at pure noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calls: tuple[int, ...] = Field(min_length=1, description="indices of calls, rising")

    @model_validator(mode="after")
    def _rising(self) -> Calls:
        if min(self.calls) < 0 or list(self.calls) != sorted(set(self.calls)):
            raise ValueError("calls: must be indices from 0, rising, each once")
        return self


WINDOWS = 9
"""Of calls, that `halftone sensitivity` tells apart."""
Relaxing = Interval | Share | Calls
_PUBLISHED = {Interval.NEAR_X0: (0.8, 1.0), Interval.NEAR_XT: (0.0, 0.2)}  # for SD 1.4/1.5 and for SDXL


@dataclass(frozen=True)
class Relaxation:
    """The calls that are relaxed, and the width of their activations."""

    calls: tuple[int, ...]
    bits: int

    def width(self, base: int, call: int) -> int:
        """Of an activation with `base` bits elsewhere; never fewer than that."""
        return max(base, self.bits) if call in self.calls else base

    def widths(self, base: int, n_calls: int) -> list[int]:
        return [self.width(base, call) for call in range(n_calls)]

    def average(self, base: int, n_calls: int) -> float:
        """Mean width over the calls."""
        return math.fsum(self.widths(base, n_calls)) / n_calls


def relaxed_calls(relaxing: Relaxing, n_calls: int) -> tuple[int, ...]:
    """Indices of the relaxed calls, rising: {int(N s), ..., int(N e)} among 0..N-1 (PCR; both ends included).

    None for `auto`, which only a measurement can tell. Raises UserError for a call that a run of `n_calls`
    does not have.
    """
    if isinstance(relaxing, Calls):
        if relaxing.calls[-1] >= n_calls:
            raise UserError(
                f"axes: relaxing: call {relaxing.calls[-1]} is named, but a run makes {n_calls} calls, from 0"
            )
        return relaxing.calls
    share = relaxing.share if isinstance(relaxing, Share) else _PUBLISHED.get(relaxing)
    if share is None:
        return ()
    # 100 x 0.29 is a little less than 29
    start, end = (math.floor(n_calls * place + 1e-9) for place in share)
    return tuple(range(start, min(end, n_calls - 1) + 1))
