"""Makes a plan: axes and bits resolved for the sites of one denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halftone.axes import Axes
from halftone.plan import (
    FLOAT_BITS,
    BitOperations,
    Division,
    Execution,
    Granularity,
    GroupPlan,
    Plan,
    Quantizer,
    SitePlan,
    Sizes,
    label_bytes,
    parameter_slots,
    partitions,
    probabilities_of,
)
from halftone.policies import GroupLayout, Range, TimeAxis
from halftone.quantizers.bits import Bits
from halftone.relaxing import Relaxation
from halftone.settings import Protocol

if TYPE_CHECKING:
    from torch import nn

    from halftone.denoiser import Site
    from halftone.macs import Macs

_SCALE_BYTES = 4
_FACTOR_BYTES = 2


def make_plan(
    denoiser: nn.Module,
    sites: Iterable[Site],
    axes: Axes,
    bits: Bits,
    *,
    recipe: str,
    protocol: Protocol,
    calls: int,
    relaxed: tuple[int, ...] = (),
    macs: Macs | None = None,
    groups: Mapping[str, GroupPlan | None] | None = None,
    float_bits: int = FLOAT_BITS,
    execution: Execution = Execution.SIMULATED,
) -> Plan:
    """Resolve `axes` and `bits` for the sites of a denoiser, which may lie on the meta device.

    relaxed: the relaxed calls. macs: from `halftone.macs.count`, or None where they cannot be told; the plan
    then has no bit operations. groups: of the activation sites, once they are calibrated (None of one that
    has no axes to group); before, every site is thought to have as many as the axes ask for. float_bits:
    width of the floats in the model's file.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in denoiser.named_parameters()}
    relaxation = Relaxation(relaxed, axes.relaxed_bits) if relaxed else None
    slots = parameter_slots(axes, calls, relaxation)
    from halftone.folding import divisions, reparameterized_layers

    sites = tuple(sites)
    divided = divisions(reparameterized_layers(denoiser, sites, axes))
    resolved = tuple(
        _resolve(site, shapes, axes, bits, slots, macs, groups, execution, divided.get(site.module))
        for site in sites
    )
    # factors that the quantize step divides by; folded ones are in the weights
    kept = [name for name, where in divided.items() if where is Division.QUANTIZE_STEP]
    factors = sum(shapes[f"{name}.weight"][1] for name in kept)
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    return Plan(
        recipe=recipe,
        bits=str(bits),
        protocol=protocol,
        axes=axes,
        relaxed_calls=relaxed,
        denoiser=type(denoiser).__name__,
        calls=calls,
        sites=resolved,
        sizes=_sizes(resolved, total, float_bits, relaxation, factors, axes, calls),
        bit_operations=None if macs is None else _bit_operations(resolved, macs, calls, relaxation),
    )


def _resolve(
    site: Site,
    shapes: dict[str, tuple[int, ...]],
    axes: Axes,
    bits: Bits,
    slots: int,
    macs: Macs | None,
    groups: Mapping[str, GroupPlan | None] | None,
    execution: Execution,
    division: Division | None,
) -> SitePlan:
    from halftone.denoiser import SiteKind, width_at

    weight = site.kind is SiteKind.WEIGHT
    common: dict[str, Any] = {
        "name": site.name,
        "module": site.module,
        "kind": site.kind.name.lower(),
        "module_type": site.module_type,
    }
    shape = shapes.get(f"{site.module}.weight", ()) if weight else ()
    if weight:
        elements = 1
        for size in shape:
            elements *= size
        common["elements"] = elements
    if macs is not None:
        # an input's products are those of its weight: counted there, once
        per_module = macs.layers if weight else macs.attention
        if weight or site.kind in (SiteKind.QUERY, SiteKind.PROBABILITIES):
            common["macs"] = per_module.get(site.module, 0)
    if site.float_reason is not None:
        return SitePlan(**common, execution=Execution.FLOAT, float_reason=site.float_reason)
    halves = 1 if site.split is None else 2
    if weight:
        return SitePlan(
            **common,
            execution=execution,
            bits=width_at(site.module, site.kind, bits),
            quantizer=Quantizer.AFFINE,
            granularity=Granularity.CHANNEL if site.split is None else Granularity.CHANNEL_AND_HALF,
            range=axes.weight_range,
            split=site.split,
            parameters=shape[0] * halves,
        )
    probabilities = site.kind is SiteKind.PROBABILITIES
    treatment = Quantizer.AFFINE, _granularity(site, axes), axes.time_axis
    quantizer, granularity, time_axis = probabilities_of(axes) if probabilities else treatment
    # the scale of log2 codes and of what is dynamic is a maximum
    own = probabilities and (quantizer is Quantizer.LOG2 or time_axis is not axes.time_axis)
    known = None if groups is None else groups.get(site.name)
    grouped = axes.groups > 1 and not probabilities and (known is not None or groups is None)
    held = (axes.groups if known is None else known.most) if grouped else halves
    return SitePlan(
        **common,
        execution=execution,
        bits=width_at(site.module, site.kind, bits),
        quantizer=quantizer,
        granularity=Granularity.GROUP if grouped else granularity,
        # groups reach from smallest to largest value
        range=Range.MINMAX if own or grouped else axes.activation_range,
        split=site.split,
        division=division if site.kind is SiteKind.INPUT else None,
        groups=known,
        time_axis=time_axis,
        start_apart=True if site.start else None,
        parameters=0 if time_axis is TimeAxis.DYNAMIC else held * slots,
    )


def _granularity(site: Site, axes: Axes) -> Granularity:
    if axes.time_axis is TimeAxis.DYNAMIC:
        return Granularity.ROW
    return Granularity.TENSOR if site.split is None else Granularity.HALF


def _sizes(
    sites: Sequence[SitePlan],
    total: int,
    float_bits: int,
    relaxation: Relaxation | None,
    factors: int,
    axes: Axes,
    calls: int,
) -> Sizes:
    grouped = [site.groups for site in sites if site.groups is not None]
    # zero points of free groups lie outside the codes, and one table holds those of all sites
    least = 2 if grouped and axes.group_layout is GroupLayout.FREE else 1

    def code_bytes(site: SitePlan) -> int:
        if site.elements is not None:
            return _code_bytes(site.bits or 0)
        return max(least, _code_bytes(max(site.bits or 0, 0 if relaxation is None else relaxation.bits)))

    weights = [site for site in sites if site.elements is not None and site.bits is not None]
    quantized = sum(site.elements or 0 for site in weights)
    return Sizes(
        float_bits=float_bits,
        original=total * float_bits // 8,
        packed=sum(_packed(site.elements or 0, site.bits or 0) for site in weights),
        parameters=sum(site.parameters * (_SCALE_BYTES + code_bytes(site)) for site in sites)
        + sum(label_bytes(groups, partitions(axes, calls)) for groups in grouped)
        + _FACTOR_BYTES * factors,
        left_float=(total - quantized) * float_bits // 8,
    )


def _code_bytes(bits: int) -> int:
    """Bytes of a zero point, which is a code that stands for zero."""
    return 1 if bits <= 8 else 2 if bits <= 15 else 4


def _packed(elements: int, bits: int) -> int:
    """Bytes of a contiguous bitstream; above 8 bits a code takes two bytes."""
    return -(-elements * bits // 8) if bits <= 8 else 2 * elements


def _bit_operations(
    sites: Sequence[SitePlan], macs: Macs, calls: int, relaxation: Relaxation | None
) -> BitOperations:
    plain = {(site.module, site.kind): site.bits or FLOAT_BITS for site in sites}
    mean = _products(plain, macs)
    if relaxation is not None:
        relaxed = {
            (site.module, site.kind): relaxation.width(site.bits, relaxation.calls[0])
            for site in sites
            if site.bits is not None and site.elements is None
        }
        more = len(relaxation.calls)
        total = (calls - more) * mean + more * _products({**plain, **relaxed}, macs)
        mean = round(total / calls)
    return BitOperations(quantized=mean, original=2 * macs.total * FLOAT_BITS**2)


def _products(width: Mapping[tuple[str, str], int], macs: Macs) -> int:
    """Bit operations of a call, from the width of every quantized operand by module and kind."""

    def bits(module: str, kind: str) -> int:
        return width.get((module, kind), FLOAT_BITS)

    layers = sum(n * bits(name, "weight") * bits(name, "input") for name, n in macs.layers.items())
    products = sum(
        n * (bits(name, "query") * bits(name, "key") + bits(name, "probabilities") * bits(name, "value"))
        for name, n in macs.attention.items()
    )
    return 2 * (layers + products)
