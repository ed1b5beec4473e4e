"""The axes of a recipe: one choice on each says everything that is done to a model. Which choices go together
is checked here, once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictInt,
    model_serializer,
    model_validator,
)

from halftone.policies import (
    Alternative,
    CalibrationCalls,
    CalibrationInputs,
    Correction,
    GroupAxis,
    GroupLayout,
    Probabilities,
    ProbabilitiesScale,
    Range,
    Reparameterization,
    ReparameterizedLayers,
    Rounding,
    Scope,
    Selector,
    Shortcut,
    StartToken,
    StepSize,
    TemporalBlock,
    TimeAxis,
    UnitInput,
)
from halftone.quantizers.bits import HIGHEST, LOWEST
from halftone.relaxing import Interval, Relaxing

MOST_GROUPS = 32


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
    reparameterization_groups: StrictInt | None = Field(
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
    rounds: StrictInt = Field(
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
    later_softness: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="least distance from 0 and 1 with which rounds after the first take soft choices up",
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
    adaptive_groups: StrictInt | None = Field(
        None,
        ge=1,
        description="adaptive: uniform groups of calls that share a choice; null: every call its own",
    )
    groups: StrictInt = Field(
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
    correction: Correction = Field(
        Correction.NONE,
        description="taken off the output, call by call: its mean error (PTQD), or what undoes drift as well",
    )
    relaxing: Relaxing = Field(
        Interval.NONE,
        description="calls whose activations get more bits: none, near_x0, near_xT, auto, {share: [s, e]} "
        "or {calls: [...]}",
    )
    relaxed_bits: StrictInt = Field(10, ge=LOWEST, le=HIGHEST, description="activation bits of relaxed calls")
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
            raise ValueError(
                f"probabilities adaptive: chosen call by call, time_axis is {self.time_axis}; write "
                "probabilities: uniform or log2"
            )
        if self.adaptive_groups and self.calibration_inputs is CalibrationInputs.PROGRESSIVE:
            raise ValueError(
                "adaptive_groups: progressive calibration has to choose at every call; leave them out"
            )
        of_laws = [name for name in further if name in ("adaptive_alternative", "adaptive_xmin")]
        if of_laws and self.adaptive_selector is Selector.OUTPUT_ERROR:
            raise ValueError(f"{of_laws[0]}: of laws, which adaptive_selector output_error does not ask")

    def _check_rounds(self) -> None:
        for name in _ROUNDS[1:]:
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
            or self.correction is not Correction.NONE
        ):
            raise ValueError(
                "legacy_lookup: takes parameters of other calls; write time_axis: per_call, "
                "calibration_inputs: reference, relaxing: none, correction: none with it"
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


class Off(NamedTuple):
    """The value that switches something off, and the axes that then mean nothing."""

    value: str
    of_it: tuple[str, ...]


_REPARAMETERIZATION = (
    "reparameterization_layers",
    "reparameterization_groups",
    "reparameterization_limit",
    "reparameterization_floor",
    "smooth_exponent",
)
_ROUNDS = ("rounds", "later_iterations", "later_beta", "later_softness")
SWITCHES = {
    "reparameterization": Off(Reparameterization.NONE, _REPARAMETERIZATION),
    "rounding": Off(Rounding.NEAREST, (*_ROUNDS, "temporal_block")),
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
    *_REPARAMETERIZATION,
    *_ROUNDS,
    "correction",
)


def _default(name: str) -> Any:
    return Axes.model_fields[name].default
