"""What is to be done to a model: a recipe, bits and a protocol, from words to types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halftone.axes import Axes
from halftone.errors import UserError
from halftone.policies import Reparameterization, Rounding
from halftone.provenance import Provenance, scheduler_facts
from halftone.quantizers.bits import Bits
from halftone.recipes import resolve as resolve_axes
from halftone.settings import Budget, Protocol
from halftone.source import Source


@dataclass(frozen=True)
class Choice:
    """What is to be done to a model: a resolved recipe at certain bits, on the sites of a protocol."""

    recipe: str
    axes: Axes
    bits: Bits
    protocol: Protocol = Protocol.EQUAL

    @property
    def learns_rounding(self) -> bool:
        return self.axes.rounding is not Rounding.NEAREST

    @property
    def reparameterizes(self) -> bool:
        return self.axes.reparameterization is not Reparameterization.NONE

    def describe(self, known: Provenance, budget: Budget | None = None) -> Provenance:
        """`known`, with this choice added, and the budget that its weights were learned with."""
        chosen = {"recipe": self.recipe, "axes": self.axes, "bits": str(self.bits), "protocol": self.protocol}
        chosen["budget"] = budget
        return known.model_copy(update=chosen)


def choose(
    recipe: str,
    bits: str | Bits,
    axes: Axes | Mapping[str, Any] | None = None,
    protocol: Protocol | str = Protocol.EQUAL,
) -> Choice:
    """A choice from its words. axes: what differs from the recipe's, or all of them, resolved. Raises
    UserError for an unknown recipe, axis, value or width."""
    try:
        width = bits if isinstance(bits, Bits) else Bits.parse(bits)
        resolved = axes if isinstance(axes, Axes) else resolve_axes(recipe, dict(axes or {}))
        return Choice(recipe, resolved, width, Protocol(protocol))
    except ValueError as fault:
        errors = getattr(fault, "errors", None)
        if errors is None:
            raise UserError(str(fault)) from None
        first = errors()[0]
        raise UserError(f"axes: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def check_same_model(source: Source, known: Provenance) -> None:
    """Raises UserError where a trajectory was recorded with other weights or with another scheduler."""
    if known.model_sha256 != source.weights_sha256:
        raise UserError(
            f"{source.path}: its weights are not those that the trajectory was recorded with; "
            "run the step calibration-data again"
        )
    now = scheduler_facts(source.pipeline.scheduler)
    if (name := _changed(known.scheduler, now)) is not None:
        raise UserError(
            f"{source.path}: its scheduler is not the one that the trajectory was recorded with ({name} "
            "differs); run the step calibration-data again"
        )


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two schedulers' facts; another version of diffusers may know further settings."""
    if then["class"] != now["class"]:
        return "its class"
    both = sorted(then["config"].keys() & now["config"].keys())
    return next((name for name in both if then["config"][name] != now["config"][name]), None)
