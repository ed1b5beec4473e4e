"""The plan: a recipe resolved for one model, site by site, before anything is spent.

For every site its quantizer, granularity, time axis, bits and execution, and what stays in float and why;
with it the size of the weights and the bit operations of a call. `halftone plan` and `analyze` both make it
here, from the sites of the denoiser, the axes and the bits.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from halftone.axes import MOST_GROUPS, Axes
from halftone.errors import UserError
from halftone.files import read_json, write_json
from halftone.policies import (
    GroupLayout,
    Probabilities,
    ProbabilitiesScale,
    Range,
    Reparameterization,
    StartToken,
    TimeAxis,
)
from halftone.quantizers.bits import Bits
from halftone.relaxing import Interval, Relaxation, relaxed_calls
from halftone.settings import Protocol

FLOAT_BITS = 32  # of float execution; a model's file may hold its weights at 16
MIB = 2**20
_SCALE_BYTES = 4


class Execution(StrEnum):
    """How a site, an artefact or a row of figures is run."""

    FLOAT = "float"
    SIMULATED = "simulated"
    INTEGER = "integer"


class Quantizer(StrEnum):
    """The map between floats and codes at a site."""

    AFFINE = "affine"
    NON_NEGATIVE = "affine, zero point 0"
    LOG2 = "log2"
    ADAPTIVE = "affine or log2"


class Division(StrEnum):
    """Where the input of a reparameterized layer is divided by its factors."""

    FOLDED = "folded into the module before"
    QUANTIZE_STEP = "in the quantize step"


class Granularity(StrEnum):
    """Which elements of a tensor share a scale and a zero point."""

    TENSOR = "per tensor"
    CHANNEL = "per channel"
    HALF = "per half"
    CHANNEL_AND_HALF = "per channel and half"
    ROW = "per sample or head"
    SAMPLE = "per sample"
    HEAD = "per head"
    GROUP = "per group"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GroupPlan(_Part):
    """Groups of a site's channels or positions, known once it is calibrated."""

    most: int = Field(ge=1, le=MOST_GROUPS, description="groups held, at the call that has most")
    channels: int | None = Field(default=None, ge=1, description="indices, where channels are grouped")
    positions: int | None = Field(default=None, ge=1, description="indices, where positions are grouped")
    position_calls: tuple[int, ...] = Field(
        default=(), description="calls whose groups are of positions, rising; 0 stands for all that share one"
    )

    def length(self, partition: int) -> int:
        """Indices of the axis grouped. Raises ValueError where the plan does not give it."""
        found = self.positions if partition in self.position_calls else self.channels
        if found is None:
            raise ValueError("the length of a grouped axis is missing")
        return found

    @property
    def axis(self) -> str:
        if not self.position_calls:
            return "channels"
        return "channels or positions" if self.channels is not None else "positions"


class SitePlan(_Part):
    """One site. A site left in float has a `float_reason` and none of the quantizer's properties."""

    name: str
    module: str
    kind: str
    module_type: str
    execution: Execution
    float_reason: str | None = None
    fallback: str | None = Field(
        default=None, description="why integer execution simulates a quantized site, None if it does not"
    )
    bits: int | None = None
    quantizer: Quantizer | None = None
    granularity: Granularity | None = None
    range: Range | None = None
    split: int | None = Field(
        default=None, description="channels of the first of two halves with parameters of their own"
    )
    division: Division | None = Field(
        default=None, description="of a reparameterized layer's input, None of any other site"
    )
    groups: GroupPlan | None = Field(default=None, description="None before calibration")
    time_axis: TimeAxis | None = Field(default=None, description="None for a weight, which no call changes")
    start_apart: Literal[True] | None = Field(
        default=None, description="the first key token, a start token, stays in float"
    )
    parameters: int = Field(default=0, description="scales (and as many zero points) held for the site")
    elements: int | None = Field(default=None, description="of a weight")
    macs: int | None = Field(
        default=None, description="multiply-accumulates of the site's layer or product, in one call"
    )


class Sizes(_Part):
    """Bytes of the denoiser's tensors as stored, before and after.

    Both sides hold floats at the width of the model's own file: a model stored at 16 bits is not credited
    with the step from 32.
    """

    float_bits: int = Field(default=FLOAT_BITS, description="width of a float in the model's file")
    original: int = Field(description="every parameter in float")
    packed: int = Field(description="weight codes at their own bits")
    parameters: int = Field(description="scales and zero points of weights and activations")
    left_float: int = Field(description="biases, norms and the layers left in float")

    @property
    def weight_mib(self) -> float:
        return (self.packed + self.parameters + self.left_float) / MIB

    @property
    def original_mib(self) -> float:
        return self.original / MIB

    @property
    def ratio(self) -> float:
        return self.original / (self.packed + self.parameters + self.left_float)


class BitOperations(_Part):
    """2 x multiply-accumulates x bits of either operand (DGQ), for one call on one latent; where calls are
    relaxed, the mean over the calls, rounded."""

    quantized: int
    original: int

    @property
    def ratio(self) -> float:
        return self.original / self.quantized


class Plan(_Part):
    """What a recipe does to one denoiser. Deterministic JSON through `save` and `load`."""

    format: int = 1
    recipe: str
    bits: str
    protocol: Protocol
    axes: Axes
    relaxed_calls: tuple[int, ...] = Field(
        default=(), description="calls whose activations have axes.relaxed_bits, rising"
    )
    denoiser: str = Field(description="class of the denoiser")
    calls: int = Field(ge=1, description="denoiser calls of one sampling run")
    sites: tuple[SitePlan, ...]
    sizes: Sizes
    bit_operations: BitOperations | None = Field(
        default=None, description="None where the denoiser's inputs are unknown"
    )

    @model_validator(mode="after")
    def _relaxes_what_the_axes_say(self) -> Plan:
        if self.axes.relaxing == Interval.AUTO:
            rising = list(self.relaxed_calls) == sorted(set(self.relaxed_calls))
            sound = rising and all(0 <= call < self.calls for call in self.relaxed_calls)
        else:
            sound = self.relaxed_calls == relaxed_calls(self.axes.relaxing, self.calls)
        if not sound:
            raise ValueError("relaxed_calls are not those that the axes ask for")
        return self

    @model_validator(mode="after")
    def _treats_probabilities_as_the_axes_say(self) -> Plan:
        wanted = probabilities_of(self.axes)
        for site in self.quantized:
            found = site.quantizer, site.granularity, site.time_axis
            if site.kind == "probabilities" and found != wanted:
                raise ValueError(f"{site.name[:200]} is not quantized as the axes ask for")
            if site.start_apart and self.axes.start_token is not StartToken.APART:
                raise ValueError(f"{site.name[:200]} keeps a start token apart, against the axes")
        starts = {
            kind: {site.module for site in self.quantized if site.kind == kind and site.start_apart}
            for kind in ("key", "probabilities")
        }
        if starts["key"] != starts["probabilities"]:
            raise ValueError("a start token is kept apart in one of keys and probabilities only")
        return self

    @model_validator(mode="after")
    def _divides_what_the_axes_say(self) -> Plan:
        divided = [site for site in self.sites if site.division is not None]
        if divided and self.axes.reparameterization is Reparameterization.NONE:
            raise ValueError(f"{divided[0].name} is divided, but the axes reparameterize nothing")
        if any(site.kind != "input" or site.bits is None for site in divided):
            raise ValueError("a site is divided that is no quantized layer input")
        return self

    @property
    def relaxation(self) -> Relaxation | None:
        """Calls with more bits; None where there are none."""
        return Relaxation(self.relaxed_calls, self.axes.relaxed_bits) if self.relaxed_calls else None

    @property
    def slots(self) -> int:
        """Entries that an activation site holds for each of its parameters, if it holds any."""
        return parameter_slots(self.axes, self.calls, self.relaxation)

    def slots_of(self, site: SitePlan) -> int:
        """The same of one site, of which a dynamic one has none."""
        return 0 if site.time_axis is TimeAxis.DYNAMIC else self.slots

    @property
    def partitions(self) -> int:
        """Rows of labels that a grouped site holds: one a call, or one for all."""
        return partitions(self.axes, self.calls)

    @property
    def quantized(self) -> tuple[SitePlan, ...]:
        return tuple(site for site in self.sites if site.bits is not None)

    @property
    def left_float(self) -> tuple[SitePlan, ...]:
        return tuple(site for site in self.sites if site.bits is None)

    @property
    def average_activation_bits(self) -> float | None:
        """Mean width of the quantized activation sites over the calls, each counted once per call."""
        widths = [
            _average(site.bits, self.calls, self.relaxation)
            for site in self.quantized
            if site.elements is None and site.bits is not None
        ]
        return sum(widths) / len(widths) if widths else None

    @property
    def execution(self) -> Execution:
        """Integer only if every quantized site is."""
        kinds = {site.execution for site in self.quantized}
        return kinds.pop() if len(kinds) == 1 else Execution.SIMULATED if kinds else Execution.FLOAT

    def counts(self) -> list[tuple[str, str, int]]:
        """(kind, how it is held, number of sites), in the order of the denoiser."""
        seen = Counter((site.kind, describe(site)) for site in self.sites)
        return [(kind, how, number) for (kind, how), number in seen.items()]

    def float_list(self) -> list[tuple[str, list[str]]]:
        """Reasons for staying in float, each with its sites."""
        reasons: dict[str, list[str]] = {}
        for site in self.left_float:
            reasons.setdefault(site.float_reason or "", []).append(site.name)
        return list(reasons.items())

    def columns(self) -> dict[str, Any]:
        """The columns of the summary that the plan alone decides."""
        bits = Bits.parse(self.bits)
        average = self.average_activation_bits
        return {
            "weight_bits": bits.weight,
            "act_bits": bits.activation,
            "softmax_bits": bits.softmax,
            "boundary_bits": bits.boundary,
            "avg_act_bits": None if average is None else round(average, 3),
            "float_sites": len(self.left_float),
            "weight_mib": round(self.sizes.weight_mib, 3),
            "bops": None if self.bit_operations is None else self.bit_operations.quantized,
            "denoiser_calls": self.calls,
            "execution": self.execution.value,
        }

    def save(self, path: Path | str) -> None:
        write_json(path, self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Raises UserError where the file is missing or is no plan."""
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as fault:
            first = fault.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{path}: not a plan ({key}: {first['msg']}); run halftone analyze again"
            ) from None


def describe(site: SitePlan) -> str:
    """`4-bit affine, per channel`, `4-bit log2, per sample, dynamic, start column apart` or `float`."""
    if site.bits is None:
        return "float"
    time = {
        TimeAxis.PER_CALL: ", per call",
        TimeAxis.SHARED: ", shared over calls",
        TimeAxis.DYNAMIC: ", dynamic",
        None: "",
    }[site.time_axis]
    apart = "" if not site.start_apart else f", start {'row' if site.kind == 'key' else 'column'} apart"
    groups = f" of {site.groups.axis} ({site.groups.most})" if site.groups is not None else ""
    divided = "" if site.division is None else f", divided {site.division}"
    return f"{site.bits}-bit {site.quantizer}, {site.granularity}{groups}{time}{apart}{divided}"


def describe_start_token(plan: Plan) -> str | None:
    """Where a start token stays in float; None where the axes do not ask for it."""
    if plan.axes.start_token is not StartToken.APART:
        return None
    apart = sum(site.start_apart is not None and site.kind == "probabilities" for site in plan.quantized)
    if not apart:
        return "none to keep apart: no text, or a tokenizer that puts none first"
    return f"apart in {apart} cross-attentions: its key and its probabilities in float, its value quantized"


def describe_relaxing(plan: Plan) -> str | None:
    """Which calls have more bits, and how these run; None where there are none."""
    if plan.relaxation is None:
        waits = plan.axes.relaxing == Interval.AUTO
        return "calls that halftone sensitivity chooses" if waits else None
    calls, average = plan.relaxed_calls, plan.average_activation_bits
    ends = f"{calls[0]} to {calls[-1]}" if len(calls) == calls[-1] - calls[0] + 1 > 1 else None
    named = ends or ", ".join(map(str, calls))
    return (
        f"calls {named} of {plan.calls}: activations of {plan.axes.relaxed_bits} bits, "
        f"{average:.3f} on average; "
        "in integers a layer takes the low and the high byte of a code apart, one product each"
    )


def parameter_slots(axes: Axes, calls: int, relaxation: Relaxation | None) -> int:
    """Entries that an activation site holds for each of its parameters. Shared ones that are relaxed at some
    calls differ there, so they are kept per call."""
    if axes.time_axis is TimeAxis.DYNAMIC:
        return 0
    return calls if axes.time_axis is TimeAxis.PER_CALL or relaxation is not None else 1


def probabilities_of(axes: Axes) -> tuple[Quantizer, Granularity, TimeAxis]:
    """How the axes treat attention probabilities."""
    quantizer = {
        Probabilities.UNIFORM: Quantizer.NON_NEGATIVE,
        Probabilities.LOG2: Quantizer.LOG2,
        Probabilities.ADAPTIVE: Quantizer.ADAPTIVE,
    }[axes.probabilities]
    if axes.probabilities_scale is ProbabilitiesScale.DYNAMIC:
        return quantizer, Granularity(f"per {axes.probabilities_scope}"), TimeAxis.DYNAMIC
    dynamic = axes.time_axis is TimeAxis.DYNAMIC
    return quantizer, Granularity.ROW if dynamic else Granularity.TENSOR, axes.time_axis


def partitions(axes: Axes, calls: int) -> int:
    """Rows of labels that a grouped site holds."""
    free = axes.group_layout is GroupLayout.FREE and axes.time_axis is TimeAxis.PER_CALL
    return calls if free else 1


def label_bits(groups: int) -> int:
    """Of a label, the number of a group: 0 where there is one group, else 2 at least."""
    return 0 if groups == 1 else max(2, (groups - 1).bit_length())


def label_bytes(groups: GroupPlan, rows: int) -> int:
    """Of a site's labels, packed, in `rows` partitions."""
    of_positions = len(groups.position_calls)
    count = of_positions * (groups.positions or 0) + (rows - of_positions) * (groups.channels or 0)
    return -(-label_bits(groups.most) * count // 8)


def _average(bits: int, calls: int, relaxation: Relaxation | None) -> float:
    return bits if relaxation is None else relaxation.average(bits, calls)
