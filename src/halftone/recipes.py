"""Recipes: names for points on the policy axes. A recipe has no machinery of its own.

A recipe is a choice on every axis of `Axes`; the verbs read the axes, never the name. Any axis of a preset
can be overridden in a scenario (`axes:` in params.yaml, `--axes` on the command line); unknown axes are
refused.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from halftone.quantizers.bits import HIGHEST, LOWEST
from halftone.relaxing import Interval, Relaxing

FULL_PRECISION = "fp"
MOST_GROUPS = 32


class Range(StrEnum):
    """How a range (lo, hi) is estimated from the values seen."""

    MINMAX = "minmax"
    MOVING_AVERAGE = "moving_average"
    PERCENTILE = "percentile"
    LP = "lp"


class TimeAxis(StrEnum):
    """Activation parameters shared over all calls, kept per call, or taken from each tensor as it comes."""

    SHARED = "shared"
    PER_CALL = "per_call"
    DYNAMIC = "dynamic"


class Rounding(StrEnum):
    """How weights are rounded: to nearest, or learned by block reconstruction (AdaRound/BRECQ)."""

    NEAREST = "nearest"
    ADAROUND = "adaround"


class CalibrationCalls(StrEnum):
    """Calls of the trajectory that calibration data are taken from.

    `uniform`: every second one (Q-Diffusion: evenly spaced timesteps, as many samples of each). `normal`:
    timesteps drawn from a clamped normal distribution (PTQ4DM, NDTC).
    """

    ALL = "all"
    UNIFORM = "uniform"
    NORMAL = "normal"


class CalibrationInputs(StrEnum):
    """What a call's parameters are fitted to: the reference trajectory, or what the quantized calls before it
    hand on (PCR)."""

    REFERENCE = "reference"
    PROGRESSIVE = "progressive"


class Shortcut(StrEnum):
    """Input and weight of a shortcut convolution that reads cat([hidden, skip]): one range, or one for
    each half (Q-Diffusion)."""

    WHOLE = "whole"
    SPLIT = "split"


class GroupAxis(StrEnum):
    """Axis of an activation whose indices are grouped: the one whose extremes differ more, or a fixed one."""

    AUTO = "auto"
    CHANNEL = "channel"
    POSITION = "position"


class GroupLayout(StrEnum):
    """Any partition, one for each call (DGQ), or one that integer kernels can run.

    `aligned` (ours): contiguous after a permutation of the axis that all calls share, cut at multiples of 64
    indices (of 16 where the axis has fewer than 512).
    """

    FREE = "free"
    ALIGNED = "aligned"


class StepSize(StrEnum):
    """Scales of activations as fitted to their ranges, or learned block by block afterwards (BRECQ)."""

    FITTED = "fitted"
    LEARNED = "learned"


class TemporalBlock(StrEnum):
    """Layers that depend on the timestep alone: learned with the blocks they feed, or apart (TFMQ-DM)."""

    JOINT = "joint"
    APART = "apart"


class UnitInput(StrEnum):
    """Inputs a unit is reconstructed on: those of the quantized prefix, or of the full-precision model."""

    QUANTIZED_PREFIX = "quantized_prefix"
    FULL_PRECISION = "full_precision"


class Probabilities(StrEnum):
    """Codes of attention probabilities: evenly spaced from zero, or octaves below a scale (DGQ), or one of
    the two, chosen for every layer and call (TCAQ-DM, DAQ)."""

    UNIFORM = "uniform"
    LOG2 = "log2"
    ADAPTIVE = "adaptive"


class Alternative(StrEnum):
    """What a power law is weighed against. The paper does not say; the choice decides much, and against a
    lognormal a power law hardly ever wins."""

    EXPONENTIAL = "exponential"
    HALF_NORMAL = "half_normal"
    LOGNORMAL = "lognormal"


class Selector(StrEnum):
    """How codes are chosen: log2 where a power law fits the probabilities better (DAQ), or where it disturbs
    their product with the values less (our choice: both are tried)."""

    LIKELIHOOD_RATIO = "likelihood_ratio"
    OUTPUT_ERROR = "output_error"


class StartToken(StrEnum):
    """The start token of cross-attention: quantized with the others; or its probability and its key stay in
    float, and the scales of both are those of the other tokens (DGQ). Its value is quantized either way."""

    JOINT = "joint"
    APART = "apart"


class ProbabilitiesScale(StrEnum):
    """Scale of attention probabilities: fitted like other activations', or the largest value of the
    probabilities at hand (DGQ)."""

    STATIC = "static"
    DYNAMIC = "dynamic"


class Scope(StrEnum):
    """What shares a dynamic scale.

    DGQ's code takes one maximum of the whole tensor, so that an image depends on the others in its batch; of
    a sample (the halves of guidance are two), or a head of one, it depends on nothing else (our choice).
    """

    TENSOR = "tensor"
    SAMPLE = "sample"
    HEAD = "head"


class Reparameterization(StrEnum):
    """Range moved from the channels of activations to the input channels of weights, the layer's output kept.

    `tcr`: every channel shrinks towards the quietest, one factor for all calls (TCAQ-DM, TCR). `smooth`: the
    range is shared out between activation and weight (SmoothQuant).
    """

    NONE = "none"
    TCR = "tcr"
    SMOOTH = "smooth"


class ReparameterizedLayers(StrEnum):
    """Layers whose input is reparameterized: convolutions (TCAQ-DM), or Linear ones too."""

    CONVOLUTIONS = "convolutions"
    ALL = "all"


class Axes(BaseModel):
    """One choice per axis; the defaults are the neutral ones of a plain min-max quantizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_range: Range = Field(Range.MINMAX, description="range of each output channel's weights")
    activation_range: Range = Field(Range.MINMAX, description="range of an activation")
    percentile: float = Field(99.99, gt=50, le=100, description="of `percentile` ranges, in percent")
    momentum: float = Field(0.05, gt=0, le=1, description="weight of new values in `moving_average` ranges")
    time_axis: TimeAxis = Field(
        TimeAxis.SHARED, description="activation parameters shared over calls, per call, or dynamic"
    )
    calibration_calls: CalibrationCalls = Field(
        CalibrationCalls.ALL, description="calls that calibration and reconstruction draw samples from"
    )
    calibration_inputs: CalibrationInputs = Field(
        CalibrationInputs.REFERENCE, description="activations fitted to the reference or progressively"
    )
    calibrate_last: bool = Field(
        True, description="progressive: the last call too; false leaves it at its reference parameters (PCR)"
    )
    replay_prefix: bool = Field(
        False, description="progressive: every call's prefix run again from the start; slow, an oracle"
    )
    refresh_noise: bool = Field(
        False, description="progressive, replayed: every call is calibrated on noise of its own (PCR)"
    )
    shortcut: Shortcut = Field(Shortcut.WHOLE, description="concatenated shortcut inputs, whole or split")
    reparameterization: Reparameterization = Field(
        Reparameterization.NONE, description="range moved from activations to weights: none, tcr or smooth"
    )
    reparameterization_layers: ReparameterizedLayers = Field(
        ReparameterizedLayers.CONVOLUTIONS, description="layers that are reparameterized"
    )
    reparameterization_groups: int | None = Field(
        None, ge=1, description="tcr: uniform groups of calls with statistics of their own; null: every call"
    )
    reparameterization_limit: float = Field(10.0, ge=1, le=1000, description="largest factor of a channel")
    reparameterization_floor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="quantile of the channels that the others shrink to, 0 the quietest; more guards against "
        "channels that are nearly dead",
    )
    smooth_exponent: float = Field(
        0.5, ge=0, le=1, description="smooth: share of the range that moves to the weights"
    )
    rounding: Rounding = Field(Rounding.NEAREST, description="nearest, or learned by block reconstruction")
    unit_input: UnitInput = Field(UnitInput.QUANTIZED_PREFIX, description="inputs of block reconstruction")
    rounds: int = Field(
        1,
        ge=1,
        le=10,
        description="reconstructions, each on data that the model quantized so far makes (PAR)",
    )
    later_iterations: float = Field(
        0.25, gt=0, le=1, description="iterations of rounds after the first, as a share of its own"
    )
    later_beta: float = Field(
        10.0, ge=2, le=20, description="exponent from which rounds after the first are annealed"
    )
    temporal_block: TemporalBlock = Field(
        TemporalBlock.JOINT, description="timestep layers reconstructed with their blocks or apart"
    )
    step_size: StepSize = Field(StepSize.FITTED, description="scales of activations fitted or learned")
    probabilities: Probabilities = Field(
        Probabilities.UNIFORM,
        description="codes of attention probabilities: uniform, log2 (DGQ), or adaptive: chosen by layer and "
        "call (DAQ)",
    )
    start_token: StartToken = Field(
        StartToken.JOINT,
        description="cross-attention's start token: quantized with the others, or apart, in float (DGQ)",
    )
    probabilities_scale: ProbabilitiesScale = Field(
        ProbabilitiesScale.STATIC,
        description="scale of attention probabilities: fitted, or their largest value at hand (dynamic)",
    )
    probabilities_scope: Scope = Field(
        Scope.SAMPLE, description="what shares a dynamic scale: the whole tensor, a sample or a head"
    )
    adaptive_selector: Selector = Field(
        Selector.LIKELIHOOD_RATIO, description="adaptive: what chooses, likelihood_ratio or output_error"
    )
    adaptive_alternative: Alternative = Field(
        Alternative.EXPONENTIAL,
        description="likelihood_ratio: the law beside the power law; exponential, half_normal or lognormal",
    )
    adaptive_xmin: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="likelihood_ratio: quantile of the positive values where both laws begin; null: least",
    )
    adaptive_groups: int | None = Field(
        None,
        ge=1,
        description="adaptive: uniform groups of calls that share a choice; null: every call its own",
    )
    groups: int = Field(
        1,
        ge=1,
        le=MOST_GROUPS,
        description="of channels or positions of an activation, each with a range of its own, from "
        "smallest to largest value (DGQ); 1: one range, found as activation_range says",
    )
    group_axis: GroupAxis = Field(GroupAxis.AUTO, description="what is grouped: auto, channel or position")
    group_layout: GroupLayout = Field(
        GroupLayout.FREE, description="any groups (free), or ones that kernels can run (aligned)"
    )
    legacy_lookup: bool = Field(
        False,
        description="look parameters up by timestep, as DGQ's published code does; under PNDM most calls "
        "then take those of the call before",
    )
    relaxing: Relaxing = Field(
        Interval.NONE,
        description="calls whose activations get more bits: none, near_x0, near_xT, auto, {share: [s, e]} "
        "or {calls: [...]}",
    )
    relaxed_bits: int = Field(10, ge=LOWEST, le=HIGHEST, description="activation bits of relaxed calls")
    relaxed_budget: float | None = Field(
        None,
        gt=0,
        le=HIGHEST,
        description="relaxing auto: bits that it may add to the average activation; null: those of near_x0",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Axes:
        shared = self.time_axis is TimeAxis.SHARED
        if self.step_size is StepSize.LEARNED and not shared:
            raise ValueError(f"step_size learned: learns shared parameters, time_axis is {self.time_axis}")
        if self.calibration_calls is not CalibrationCalls.ALL and not shared:
            raise ValueError(
                f"calibration_calls {self.calibration_calls}: leaves calls out, but time_axis is "
                f"{self.time_axis}; write calibration_calls: all"
            )
        progressive = self.calibration_inputs is CalibrationInputs.PROGRESSIVE
        if progressive and self.time_axis is not TimeAxis.PER_CALL:
            raise ValueError(
                f"calibration_inputs progressive: fits call by call, time_axis is {self.time_axis}"
            )
        if not progressive and (self.replay_prefix or not self.calibrate_last):
            raise ValueError("replay_prefix, calibrate_last: write calibration_inputs: progressive with them")
        if self.refresh_noise and not self.replay_prefix:
            raise ValueError("refresh_noise: new noise has a prefix of its own; write replay_prefix: true")
        if self.relaxing != Interval.NONE and self.time_axis is TimeAxis.DYNAMIC:
            raise ValueError("relaxing: needs stored parameters, time_axis is dynamic")
        if self.shortcut is Shortcut.SPLIT and self.time_axis is TimeAxis.DYNAMIC:
            raise ValueError("shortcut split: needs stored parameters, time_axis is dynamic")
        attention = [name for name in _ATTENTION if getattr(self, name) != _default(name)]
        if self.time_axis is TimeAxis.DYNAMIC and attention:
            raise ValueError(
                f"{attention[0]}: time_axis dynamic takes every scale from the tensor, those of attention "
                "probabilities too; choose time_axis per_call or shared"
            )
        if (
            self.probabilities_scale is ProbabilitiesScale.STATIC
            and self.probabilities_scope is not Scope.SAMPLE
        ):
            raise ValueError(
                "probabilities_scope: says what shares a dynamic scale; write probabilities_scale: dynamic"
            )
        self._check_adaptive()
        self._check_groups()
        if self.temporal_block is TemporalBlock.APART and self.rounding is Rounding.NEAREST:
            raise ValueError("temporal_block apart: nothing is learned with rounding nearest")
        self._check_rounds()
        self._check_reparameterization()
        return self

    def _check_adaptive(self) -> None:
        further = [name for name in _ADAPTIVE if getattr(self, name) != _default(name)]
        if self.probabilities is not Probabilities.ADAPTIVE:
            if further:
                raise ValueError(f"{further[0]}: write probabilities: adaptive with it")
            return
        if self.time_axis is not TimeAxis.PER_CALL:
            raise ValueError(f"probabilities adaptive: chosen call by call, time_axis is {self.time_axis}")
        if self.adaptive_groups and self.calibration_inputs is CalibrationInputs.PROGRESSIVE:
            raise ValueError(
                "adaptive_groups: progressive calibration has to choose at every call; leave them out"
            )
        of_laws = [name for name in further if name in ("adaptive_alternative", "adaptive_xmin")]
        if of_laws and self.adaptive_selector is Selector.OUTPUT_ERROR:
            raise ValueError(f"{of_laws[0]}: of laws, which adaptive_selector output_error does not ask")

    def _check_rounds(self) -> None:
        for name in ("later_iterations", "later_beta"):
            if self.rounds == 1 and getattr(self, name) != _default(name):
                raise ValueError(f"{name}: there is one round only; write rounds: 3 with it")
        if self.rounds > 1 and self.rounding is Rounding.NEAREST:
            raise ValueError("rounds: nothing is learned with rounding nearest; write rounding: adaround")
        if self.rounds > 1 and self.unit_input is UnitInput.FULL_PRECISION:
            raise ValueError(
                "rounds: bring the inputs of the quantized model; write unit_input: quantized_prefix"
            )

    def _check_reparameterization(self) -> None:
        how = self.reparameterization
        for axis in ("layers", "limit", "floor"):
            name = f"reparameterization_{axis}"
            if how is Reparameterization.NONE and getattr(self, name) != _default(name):
                raise ValueError(f"{name}: nothing is reparameterized; write reparameterization: tcr with it")
        if how is not Reparameterization.TCR and self.reparameterization_groups is not None:
            raise ValueError("reparameterization_groups: of tcr, which averages over calls; leave it out")
        if how is not Reparameterization.SMOOTH and self.smooth_exponent != _default("smooth_exponent"):
            raise ValueError("smooth_exponent: of reparameterization smooth; leave it out")

    def _check_groups(self) -> None:
        aligned = self.group_layout is GroupLayout.ALIGNED
        if self.legacy_lookup and (
            self.time_axis is not TimeAxis.PER_CALL
            or self.calibration_inputs is not CalibrationInputs.REFERENCE
            or self.relaxing != Interval.NONE
        ):
            raise ValueError(
                "legacy_lookup: takes parameters of other calls; write time_axis: per_call, "
                "calibration_inputs: reference, relaxing: none with it"
            )
        if self.groups == 1:
            if aligned or self.group_axis is not GroupAxis.AUTO:
                raise ValueError("group_axis, group_layout: there is one group; write groups: 2 or more")
            return
        if self.time_axis is TimeAxis.DYNAMIC:
            raise ValueError("groups: need stored parameters, time_axis is dynamic")
        if self.shortcut is Shortcut.SPLIT:
            raise ValueError("groups: tell the halves of a shortcut apart themselves; write shortcut: whole")
        if self.step_size is StepSize.LEARNED:
            raise ValueError("groups: take their scales from their ranges; write step_size: fitted")
        if aligned and self.group_axis is GroupAxis.POSITION:
            raise ValueError(
                "group_layout aligned: no kernel groups positions of a convolution; "
                "write group_axis: channel or auto"
            )

    @model_serializer(mode="wrap")
    def _said(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the choices of `_UNSAID` where they are neutral: plans of other recipes, and with them the
        hashes of their artefacts, do not speak of them."""
        found: dict[str, Any] = dump(self)
        return {
            name: value
            for name, value in found.items()
            if name not in _UNSAID or getattr(self, name) != _default(name)
        }


_ADAPTIVE = ("adaptive_selector", "adaptive_alternative", "adaptive_xmin", "adaptive_groups")
_ATTENTION = ("probabilities", "start_token", "probabilities_scale", "probabilities_scope", *_ADAPTIVE)
_UNSAID = (
    *_ATTENTION,
    "groups",
    "group_axis",
    "group_layout",
    "legacy_lookup",
    "reparameterization",
    "reparameterization_layers",
    "reparameterization_groups",
    "reparameterization_limit",
    "reparameterization_floor",
    "smooth_exponent",
    "rounds",
    "later_iterations",
    "later_beta",
)


def _default(name: str) -> Any:
    return Axes.model_fields[name].default


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
