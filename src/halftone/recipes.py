"""Recipes: names for points on the policy axes. A recipe has no machinery of its own.

A recipe is a choice on every axis of `Axes`; the verbs read the axes, never the name. Any axis of a preset
can be overridden in a scenario (`axes:` in params.yaml, `--axes` on the command line); unknown axes are
refused.
"""

from __future__ import annotations

from typing import Any

from halftone.axes import SWITCHES, Axes
from halftone.policies import (
    CalibrationCalls,
    CalibrationInputs,
    Probabilities,
    ProbabilitiesScale,
    Range,
    Reparameterization,
    Rounding,
    Shortcut,
    StartToken,
    StepSize,
    TemporalBlock,
    TimeAxis,
)
from halftone.relaxing import Interval

FULL_PRECISION = "fp"

_SEARCHED: dict[str, Any] = {"weight_range": Range.LP, "activation_range": Range.LP}
_LEARNED: dict[str, Any] = {"weight_range": Range.LP, "rounding": Rounding.ADAROUND}

PRESETS: dict[str, Axes] = {
    # ranges shared over all calls, nearest rounding: what a tool that knows nothing of timesteps does
    "minmax": Axes(),
    # the same, every range searched for the least L_2.4 error
    "mse": Axes(**_SEARCHED),
    # per-call ranges from the reference trajectory, weights reconstructed block by block
    "static": Axes(**_LEARNED, time_axis=TimeAxis.PER_CALL),
    # weights, then activation scales, learned block by block (BRECQ)
    "brecq": Axes(**_LEARNED, activation_range=Range.LP, step_size=StepSize.LEARNED),
    # the same on evenly spaced timesteps, running ranges, concatenated shortcuts split (Q-Diffusion)
    "qdiffusion": Axes(
        **_LEARNED,
        activation_range=Range.MOVING_AVERAGE,
        calibration_calls=CalibrationCalls.UNIFORM,
        shortcut=Shortcut.SPLIT,
        step_size=StepSize.LEARNED,
    ),
    # the same as brecq on normally distributed timesteps (PTQ4DM; without QDrop's input dropping)
    "ptq4dm": Axes(
        **_LEARNED,
        activation_range=Range.LP,
        calibration_calls=CalibrationCalls.NORMAL,
        step_size=StepSize.LEARNED,
    ),
    # per-call ranges on what the quantized calls before hand on, the last fifth of the calls relaxed (PCR)
    "pcr": Axes(
        **_LEARNED,
        activation_range=Range.MOVING_AVERAGE,
        momentum=0.01,
        time_axis=TimeAxis.PER_CALL,
        calibration_inputs=CalibrationInputs.PROGRESSIVE,
        relaxing=Interval.NEAR_X0,
    ),
    # per-call ranges, the layers that see only the timestep learned apart (TFMQ-DM)
    "tfmq": Axes(
        **_LEARNED,
        activation_range=Range.MOVING_AVERAGE,
        time_axis=TimeAxis.PER_CALL,
        temporal_block=TemporalBlock.APART,
    ),
    # groups of channels or positions, log2 probabilities scaled by the sample, start token apart (DGQ)
    "dgq": Axes(
        **_LEARNED,
        time_axis=TimeAxis.PER_CALL,
        groups=8,
        probabilities=Probabilities.LOG2,
        probabilities_scale=ProbabilitiesScale.DYNAMIC,
        start_token=StartToken.APART,
    ),
    # range moved into weights of convolutions, probabilities uniform or log2 by call, three rounds (TCAQ-DM);
    # searched ranges and a floor under quiet channels: our choices, the paper is silent
    "tcaq": Axes(
        **_LEARNED,
        activation_range=Range.LP,
        time_axis=TimeAxis.PER_CALL,
        reparameterization=Reparameterization.TCR,
        reparameterization_floor=0.1,
        probabilities=Probabilities.ADAPTIVE,
        rounds=3,
    ),
}


def resolve(recipe: str, overrides: dict[str, Any] | None = None) -> Axes:
    """The axes of a preset with `overrides` applied. Where these switch something off, what the preset says
    of it goes too.

    Raises ValueError (pydantic's ValidationError is one) for an unknown preset, axis or value.
    """
    if recipe == FULL_PRECISION:
        raise ValueError(f"recipe {recipe} quantizes nothing: choose one of {', '.join(PRESETS)}")
    if recipe not in PRESETS:
        raise ValueError(
            f"recipe {recipe!r} is unknown: choose one of {', '.join([FULL_PRECISION, *PRESETS])}"
        )
    overrides = overrides or {}
    switched = [off for switch, off in SWITCHES.items() if overrides.get(switch) == off.value]
    left = [name for off in switched for name in off.of_it]
    preset = {name: value for name, value in PRESETS[recipe].model_dump().items() if name not in left}
    return Axes.model_validate({**preset, **overrides})
