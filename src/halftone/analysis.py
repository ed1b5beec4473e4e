"""The verb `analyze`: what a calibration amounts to, read from its file; no denoiser is run.

Writes the plan (plan.json), statistics of every site (statistics.json) and a plot of the activation ranges
(ranges.svg), the same bytes for the same calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from halftone.axes import Axes
from halftone.denoiser import sites
from halftone.errors import UserError
from halftone.files import write_json, write_text
from halftone.macs import count
from halftone.passes.state import CalibrationState, SiteParameters
from halftone.plan import GroupPlan, Plan
from halftone.planner import make_plan
from halftone.quantizers.bits import Bits
from halftone.quantizers.groups import Axis
from halftone.relaxing import relaxed_calls
from halftone.report.plots import SiteCodes, SiteRange, ranges_svg
from halftone.settings import Protocol
from halftone.skeleton import Skeleton, read_skeleton
from halftone.start_token import kept_apart

PLAN, STATISTICS, RANGES = "plan.json", "statistics.json", "ranges.svg"
_DIGITS = 6
T = TypeVar("T")


def analyze(calibration: Path | str, output: Path | str, *, name: str = "") -> Plan:
    """Write plan.json, statistics.json and ranges.svg into the folder `output`; returns the plan.

    name: of the scenario, for the title of the plot. Of the model that the calibration names, only the
    configurations are read. Raises UserError where the file is no calibration or does not fit that model.
    """
    found, known = CalibrationState.load(calibration)
    skeleton = read_skeleton(known.model_path, known.model_revision, known.resolution)
    plan = resolve(
        skeleton,
        recipe=_known(calibration, "recipe", known.recipe),
        axes=_known(calibration, "axes", known.axes),
        bits=Bits.parse(_known(calibration, "bits", known.bits)),
        protocol=_known(calibration, "protocol", known.protocol),
        calls=len(found.timesteps),
        relaxed=found.relaxed_calls,
        groups=group_plans(found),
    )
    _check_fit(calibration, found, plan, known.model_path)
    output = Path(output)
    plan.save(output / PLAN)
    write_json(output / STATISTICS, statistics(found, plan))
    ranges, title = site_ranges(found, plan), name or f"{plan.recipe} {plan.bits}"
    write_text(output / RANGES, ranges_svg(ranges, title, site_codes(found, plan)))
    return plan


def resolve(
    skeleton: Skeleton,
    *,
    recipe: str,
    axes: Axes,
    bits: Bits,
    protocol: Protocol,
    calls: int,
    relaxed: tuple[int, ...] | None = None,
    groups: Mapping[str, GroupPlan | None] | None = None,
) -> Plan:
    """The plan of a recipe for a model (`halftone plan` and `analyze` both end here).

    relaxed: the relaxed calls; by default those that the axes name, none for `auto`. groups: of activation
    sites that are calibrated. Raises UserError where
    the axes name calls that there are not.
    """
    if relaxed is None:
        relaxed = relaxed_calls(axes.relaxing, calls)
    macs = count(skeleton.denoiser, latent_size=skeleton.latent_size, text_tokens=skeleton.text_tokens)
    apart = kept_apart(axes, skeleton.tokenizers)
    found = sites(skeleton.denoiser, protocol, recipe, axes.shortcut, apart, bits=bits)
    return make_plan(
        skeleton.denoiser,
        found,
        axes,
        bits,
        recipe=recipe,
        protocol=protocol,
        calls=calls,
        relaxed=relaxed,
        macs=macs,
        groups=groups,
        float_bits=skeleton.float_bits,
    )


def group_plans(found: CalibrationState) -> dict[str, GroupPlan | None]:
    """How every activation site is grouped, None where it is not."""
    return {site: group_plan(parameters) for site, parameters in found.activations.items()}


def group_plan(parameters: SiteParameters) -> GroupPlan | None:
    """How a site is grouped, summed up; None if it is not."""
    if parameters.groups is None:
        return None
    rows = parameters.groups.rows()
    lengths = {axis: len(labels) for axis, labels in rows}
    return GroupPlan(
        most=max(int(labels.max()) + 1 for _, labels in rows),
        channels=lengths.get(Axis.CHANNEL),
        positions=lengths.get(Axis.POSITION),
        position_calls=tuple(at for at, (axis, _) in enumerate(rows) if axis is Axis.POSITION),
    )


def statistics(found: CalibrationState, plan: Plan) -> dict[str, Any]:
    """Ranges and drift of every activation site, spread of every weight; plain values, for JSON.

    drift: largest over smallest range of a site over the calls, null with one call or where a range is zero.
    log2_calls: of attention probabilities whose codes were chosen, the calls with log2 codes. groups,
    group_axes: of a grouped site, number and axis at every call, one entry if all calls share a partition.
    spread: largest over median range of a weight's output channels, null where the median is zero.
    """
    activations: list[dict[str, Any]] = []
    for site in plan.quantized:
        if site.elements is None:
            lo, hi = _extremes(found.activations[site.name])
            activations.append(
                {
                    "site": site.name,
                    "bits": site.bits,
                    "lo": _rounded(lo),
                    "hi": _rounded(hi),
                    "range": _rounded(hi - lo),
                    "drift": _drift(hi - lo),
                    **_log2_calls(found.activations[site.name]),
                    **_groups(found.activations[site.name]),
                }
            )
    weights: list[dict[str, Any]] = []
    for site in plan.quantized:
        if site.elements is not None:
            scale = found.weights[site.module].scale.reshape(-1).double().numpy()
            middle = float(np.median(scale))
            weights.append(
                {
                    "site": site.name,
                    "bits": site.bits,
                    "channels": found.weights[site.module].codes.shape[0],
                    "spread": _round(float(scale.max()) / middle) if middle > 0 else None,
                }
            )
    drifts = [entry["drift"] for entry in activations if entry["drift"] is not None]
    return {
        "calls": plan.calls,
        "relaxed_calls": list(plan.relaxed_calls),
        "calibration_denoiser_calls": found.denoiser_calls,
        "noise_levels": [_round(x) if math.isfinite(x) else None for x in found.noise_levels.tolist()],
        "timesteps": [_round(x) for x in found.timesteps.tolist()],
        "median_drift": _round(float(np.median(drifts))) if drifts else None,
        "activations": activations,
        "weights": weights,
    }


def _groups(parameters: SiteParameters) -> dict[str, Any]:
    if parameters.groups is None:
        return {}
    rows = parameters.groups.rows()
    return {
        "groups": [int(labels.max()) + 1 for _, labels in rows],
        "group_axes": [axis.name.lower() for axis, _ in rows],
    }


def site_ranges(found: CalibrationState, plan: Plan) -> list[SiteRange]:
    """What the plot shows, in the order of the denoiser."""
    ranges = []
    for site in plan.quantized:
        if site.elements is None:
            lo, hi = _extremes(found.activations[site.name])
            ranges.append(SiteRange(site.name, tuple(_rounded(hi - lo)), _drift(hi - lo)))
    return ranges


def site_codes(found: CalibrationState, plan: Plan) -> list[SiteCodes]:
    """Of probabilities that take uniform or log2 codes, in the order of the denoiser."""
    chosen = [
        (site.name, found.activations[site.name].log2) for site in plan.quantized if site.elements is None
    ]
    return [SiteCodes(name, tuple(log2.tolist())) for name, log2 in chosen if log2 is not None]


def _log2_calls(parameters: SiteParameters) -> dict[str, list[int]]:
    """Calls with log2 codes; nothing of a site without a choice."""
    return {} if parameters.log2 is None else {"log2_calls": parameters.log2.nonzero().flatten().tolist()}


def _check_fit(path: Path | str, found: CalibrationState, plan: Plan, model: str) -> None:
    expected = {site.name for site in plan.quantized if site.elements is None}
    modules = {site.module for site in plan.quantized if site.elements is not None}
    for what, wanted, given in (
        ("activation site", expected, set(found.activations)),
        ("weight", modules, set(found.weights)),
    ):
        for problem, names in (("lacks", wanted - given), ("has the unknown", given - wanted)):
            if names:
                raise UserError(
                    f"{path}: {problem} {what} {min(names)} ({len(names)} in all) and so does not "
                    f"fit {model}; run halftone calibrate again"
                )


def _known(path: Path | str, key: str, value: T | None) -> T:
    if value is None:
        raise UserError(f"{path}: its provenance has no {key}; give the file that halftone calibrate wrote")
    return value


def _extremes(parameters: SiteParameters) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """lo and hi of a site at every call, (n_calls,) each, over whatever shares a parameter."""
    lo, hi = (value.reshape(value.shape[0], -1).double() for value in (parameters.lo, parameters.hi))
    return lo.amin(1).numpy(), hi.amax(1).numpy()


def _drift(ranges: NDArray[np.float64]) -> float | None:
    smallest = float(ranges.min())
    return _round(float(ranges.max()) / smallest) if len(ranges) > 1 and smallest > 0 else None


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [_round(float(value)) for value in values]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
