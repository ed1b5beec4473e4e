"""Which kernel runs each module of a plan in integer execution, and what stays simulated, with the reason.

A site of a kind that is not known here is never guessed at: its module is simulated, and listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from halftone.axes import Axes
from halftone.plan import Execution, Granularity, Plan, Quantizer, SitePlan, describe
from halftone.policies import GroupAxis, GroupLayout, TimeAxis
from halftone.runtime.grouped_attention import WIDEST_HEAD
from halftone.runtime.int8 import MOST_TERMS, ability
from halftone.runtime.operands import geometry_of

_ATTENTION = {"query", "key", "value", "probabilities"}
_LAYER = {"input", "weight"}
_STORED = (TimeAxis.SHARED, TimeAxis.PER_CALL)
_FACTORS = (Granularity.TENSOR, Granularity.SAMPLE, Granularity.HEAD)  # dynamic scales of whole rows
_WIDEST_INT8 = 8


class Kernel(StrEnum):
    """What computes a module."""

    INT8 = "8-bit products"
    WHOLE = "products of whole numbers in float"
    REFERENCE = "exact and slow"
    SIMULATED = "simulated"


@dataclass(frozen=True)
class Decision:
    """A kernel, and why not a faster one, None if it is the one meant for such modules."""

    kernel: Kernel
    reason: str | None = None

    @property
    def integer(self) -> bool:
        return self.kernel is not Kernel.SIMULATED


def choose(plan: Plan, denoiser: nn.Module) -> dict[str, Decision]:
    """The kernel of every module that has quantized sites, by name; the denoiser may lie on the meta device.

    It depends on the machine: the 8-bit operators are tried first.
    """
    modules: dict[str, list[SitePlan]] = {}
    for site in plan.quantized:
        modules.setdefault(site.module, []).append(site)
    return {name: _decide(denoiser.get_submodule(name), sites, plan.axes) for name, sites in modules.items()}


def executed(plan: Plan, decisions: Mapping[str, Decision]) -> Plan:
    """The plan with the execution of its sites: integer, or simulated with the reason."""

    def resolve(site: SitePlan) -> SitePlan:
        decision = decisions.get(site.module)
        if site.bits is None or decision is None:
            return site
        if decision.integer:
            return site.model_copy(update={"execution": Execution.INTEGER})
        return site.model_copy(update={"execution": Execution.SIMULATED, "fallback": decision.reason})

    return plan.model_copy(update={"sites": tuple(resolve(site) for site in plan.sites)})


def kernels(decisions: Mapping[str, Decision]) -> dict[str, int]:
    """Number of modules of each kernel."""
    found = [decision.kernel for decision in decisions.values()]
    return {kernel.value: found.count(kernel) for kernel in Kernel if kernel in found}


def fallbacks(decisions: Mapping[str, Decision]) -> dict[str, list[str]]:
    """Reasons for a slower or no integer kernel, each with its modules."""
    found: dict[str, list[str]] = {}
    for module, decision in decisions.items():
        if decision.reason is not None:
            found.setdefault(f"{decision.kernel.value}: {decision.reason}", []).append(module)
    return found


def _decide(module: nn.Module, sites: Iterable[SitePlan], axes: Axes) -> Decision:
    by_kind = {site.kind: site for site in sites}
    for site in by_kind.values():
        grouped = site.granularity is Granularity.GROUP
        if (reason := _ungroupable(site, axes) if grouped else _unknown(site)) is not None:
            return Decision(Kernel.SIMULATED, reason)
    if by_kind.keys() == _ATTENTION:
        grouped = by_kind["query"].granularity is Granularity.GROUP
        if grouped and module.to_q.out_features // module.heads > WIDEST_HEAD:
            return Decision(Kernel.SIMULATED, f"groups in heads of more than {WIDEST_HEAD} channels")
        return Decision(Kernel.WHOLE)
    if by_kind.keys() != _LAYER or not isinstance(module, nn.Linear | nn.Conv2d):
        alone = " and ".join(by_kind)
        return Decision(Kernel.SIMULATED, f"only {alone} of this {type(module).__name__} are quantized")
    weight, input = by_kind["weight"], by_kind["input"]
    try:
        geometry = geometry_of(module)
    except ValueError as fault:
        return Decision(Kernel.SIMULATED, f"no integer kernel for {fault}")
    if weight.split != input.split or (weight.split and geometry is not None and geometry.groups != 1):
        return Decision(Kernel.SIMULATED, "its input and its weight are not split alike")
    if input.granularity is Granularity.GROUP and geometry is not None and geometry.groups != 1:
        return Decision(Kernel.SIMULATED, "a grouped input of a convolution that has groups itself")
    if (weight.bits or 0) > _WIDEST_INT8:
        return Decision(Kernel.REFERENCE, f"weights of {weight.bits} bits")
    if module.weight[0].numel() > MOST_TERMS:
        return Decision(Kernel.REFERENCE, f"sums of more than {MOST_TERMS} products")
    if not ability().usable:
        return Decision(Kernel.REFERENCE, ability().reason)
    return Decision(Kernel.INT8)


def _ungroupable(site: SitePlan, axes: Axes) -> str | None:
    """Why no integer kernel takes a grouped site; None if one does: q, k and v; a layer's input whose
    positions are grouped, or its channels where all calls share the partition and every range holds zero."""
    if site.kind != "input" or axes.group_layout is GroupLayout.ALIGNED:
        return None
    if site.groups is None and axes.group_axis is GroupAxis.AUTO:
        return "groups that only calibration can tell"
    if site.groups is None:
        return (
            None if axes.group_axis is GroupAxis.POSITION else "no integer kernel for free groups of channels"
        )
    if site.groups.channels is None:
        return None
    when = " at some calls" if site.groups.position_calls else ""
    return f"no integer kernel for free groups of channels{when}"


def _unknown(site: SitePlan) -> str | None:
    """Why no integer kernel takes a site; None if one does."""
    reason = f"no integer kernel for {site.kind} of {describe(site)}"
    if site.kind == "probabilities":
        known = site.granularity in _FACTORS if site.time_axis is TimeAxis.DYNAMIC else _per_tensor(site)
        return None if known else reason
    if site.kind == "weight":
        granularity = Granularity.CHANNEL if site.split is None else Granularity.CHANNEL_AND_HALF
        known = site.granularity is granularity
    else:
        known = _per_tensor(site)
    return None if known and site.quantizer is Quantizer.AFFINE else reason


def _per_tensor(site: SitePlan) -> bool:
    """Whether a call has one scale, or one for each half."""
    granularity = Granularity.TENSOR if site.split is None else Granularity.HALF
    return site.granularity is granularity and site.time_axis in _STORED
