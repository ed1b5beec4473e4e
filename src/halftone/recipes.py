"""Recipes: names for points on the policy axes. A recipe has no machinery of its own.

A recipe is a choice on every axis of `Axes`; the verbs read the axes, never the name. Any axis of a preset
can be overridden in a scenario (`axes:` in params.yaml, `--axes` on the command line); unknown axes are
refused.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

FULL_PRECISION = "fp"


class Range(StrEnum):
    """How a range (lo, hi) is estimated from the values seen."""

    MINMAX = "minmax"
    MOVING_AVERAGE = "moving_average"
    PERCENTILE = "percentile"
    LP = "lp"


class TimeAxis(StrEnum):
    """Whether activation parameters are shared over all calls or kept per call."""

    SHARED = "shared"
    PER_CALL = "per_call"


class Rounding(StrEnum):
    """How weights are rounded: to nearest, or learned by block reconstruction (AdaRound/BRECQ)."""

    NEAREST = "nearest"
    ADAROUND = "adaround"


class UnitInput(StrEnum):
    """Inputs a unit is reconstructed on: those of the quantized prefix, or of the full-precision model."""

    QUANTIZED_PREFIX = "quantized_prefix"
    FULL_PRECISION = "full_precision"


class Axes(BaseModel):
    """One choice per axis; the defaults are the neutral ones of a plain min-max quantizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_range: Range = Field(Range.MINMAX, description="range of each output channel's weights")
    activation_range: Range = Field(Range.MINMAX, description="range of an activation")
    percentile: float = Field(99.99, gt=50, le=100, description="of `percentile` ranges, in percent")
    time_axis: TimeAxis = Field(
        TimeAxis.SHARED, description="activation parameters shared over calls or per call"
    )
    rounding: Rounding = Field(Rounding.NEAREST, description="nearest, or learned by block reconstruction")
    unit_input: UnitInput = Field(UnitInput.QUANTIZED_PREFIX, description="inputs of block reconstruction")


PRESETS: dict[str, Axes] = {
    # ranges shared over all calls, nearest rounding: what a tool that knows nothing of timesteps does
    "minmax": Axes(),
    # per-call ranges from the reference trajectory, weights reconstructed block by block
    "static": Axes(time_axis=TimeAxis.PER_CALL, weight_range=Range.LP, rounding=Rounding.ADAROUND),
}


def resolve(recipe: str, overrides: dict[str, Any] | None = None) -> Axes:
    """The axes of a preset with `overrides` applied.

    Raises ValueError (pydantic's ValidationError is one) for an unknown preset, axis or value.
    """
    if recipe not in PRESETS:
        raise ValueError(
            f"recipe {recipe!r} is unknown: choose one of {', '.join([FULL_PRECISION, *PRESETS])}"
        )
    return Axes.model_validate({**PRESETS[recipe].model_dump(), **(overrides or {})})
