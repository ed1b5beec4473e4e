"""Range drift, outliers and the halves of concatenated shortcuts: what activations other than softmax
outputs show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from halftone.proxy.finding import Finding, Test, median, rounded, share
from halftone.proxy.walk import Seen
from halftone.proxy.watch import LEADING, ActivationWatch, AxisWatch

DRIFT = 2.0
"""One bit: where the widest call decides the range, the narrowest has half the codes."""
DRIFTING = 0.25
"""Share of the sites that lose that bit. With fewer, the others decide what an image looks like."""
PEAK = 3.0
"""Largest magnitude over the 99.9th percentile. A million normal values give 1.5, Laplacian ones 2.0; at 3
the usual values are left 1.6 bits fewer."""
PEAKED = 0.1
"""Share of the sites with such a peak. The method speaks of some layers, not of all."""
STABLE = 0.5
"""Share of leading indices that two prompts, or two calls, have in common; 0.05 is chance. With half of them
kept, groups fixed at calibration hold most outliers at inference."""
HALVES = 2.0
"""One bit: with a range in common the narrower half has half the codes."""


def range_drift(seen: Seen) -> Finding:
    """Are the ranges of activations different from call to call?"""
    drifts = {name: _ratio(ranges) for name, ranges in seen.ranges.items() if len(ranges) > 1}
    known = {name: drift for name, drift in drifts.items() if drift is not None}
    return Finding(
        key="drift",
        title="Range drift over calls",
        methods=("PCR", "TCR"),
        claim="Ranges of activations chosen for each call (PCR), or made alike over calls and channels by "
        "scaling (TCR), keep what a range shared by all calls loses.",
        tests=(
            Test(
                measure="share of activation sites whose largest range over calls is at least "
                f"{DRIFT:g} x their smallest",
                figure=share(drift >= DRIFT for drift in known.values()),
                threshold=DRIFTING,
                reason="a factor of two is one bit at the narrowest call; in fewer than a quarter of the "
                "sites the others decide",
            ),
        ),
        further={
            "median drift": median(known.values()),
            "largest drift": rounded(max(known.values())) if known else None,
            "sites": len(known),
        },
        data={"drift": {name: rounded(drift) for name, drift in known.items()}, "line": DRIFT},
    )


def outliers(seen: Seen) -> Finding:
    """Do a few values lie far out, and always in the same channels or at the same tokens?"""
    watches = [watch for watch in seen.activations.values() if not watch.flat]
    sites = {watch.name: _outliers(watch) for watch in watches}
    peaked = [watch for watch in watches if (sites[watch.name]["peak"] or 0) >= PEAK]
    axes = [(watch, _axis(watch)) for watch in peaked]
    prompts = median(median(axis.over_prompts) for _, axis in axes)
    calls = median(axis.over_calls for _, axis in axes)
    stable = None if prompts is None and calls is None else min(x for x in (prompts, calls) if x is not None)
    found = share(watch in peaked for watch in watches)
    if found is not None and not peaked:
        stable = 0.0  # nothing that could be stable
    return Finding(
        key="outliers",
        title="Outliers in fixed channels or tokens",
        methods=("DGQ",),
        claim="Groups of channels or of tokens, fixed at calibration, keep outliers without widening the "
        "range of everything else.",
        tests=(
            Test(
                measure=f"share of sites whose largest magnitude is at least {PEAK:g} x the 99.9th "
                "percentile (median over calls)",
                figure=found,
                threshold=PEAKED,
                reason="normal values give 1.5, Laplacian ones 2.0; some layers are enough for the method",
            ),
            Test(
                measure=f"of those sites, share of the leading {LEADING:.0%} of indices that two prompts, or "
                "two calls, have in common, whichever is less (median over sites)",
                figure=stable,
                threshold=STABLE,
                reason="groups are fixed at calibration, and must hold the outliers of other prompts; "
                f"{LEADING:g} is chance",
            ),
        ),
        further={
            "median of largest magnitude over 99.9th percentile": median(s["peak"] for s in sites.values()),
            "share of sites whose channels differ more than their tokens": share(
                _axis(watch) is watch.channel for watch in watches
            ),
            "the same, of sites with outliers": share(axis is watch.channel for watch, axis in axes),
            "median over sites, largest over median channel": median(
                median(watch.channel.contrast) for watch in watches
            ),
            "median over sites, largest over median token": median(
                median(watch.token.contrast) for watch in watches
            ),
            "of sites with outliers, overlap of two prompts": prompts,
            "of sites with outliers, overlap of two calls": calls,
            "overlap of two prompts, all sites": median(s["over_prompts"] for s in sites.values()),
            "overlap of two calls, all sites": median(s["over_calls"] for s in sites.values()),
        },
        note="Leading indices are those of the axis, channels or tokens, whose extremes differ more. Layers "
        "that see no tokens (the time embedding) are left out.",
        data={"sites": sites, "peak": PEAK, "stable": STABLE},
    )


def shortcut_halves(seen: Seen) -> Finding:
    """Have the two tensors that a shortcut convolution reads side by side ranges of different size?"""
    watches = [watch for watch in seen.activations.values() if watch.halves]
    per_call = {watch.name: [_ratio(_widths(halves)) for halves in watch.halves] for watch in watches}
    pooled = {watch.name: _ratio([_pooled(watch, half) for half in (0, 1)]) for watch in watches}
    return Finding(
        key="halves",
        title="Unequal halves of concatenated shortcuts",
        methods=("Q-Diffusion",),
        claim="Quantizing the two halves of a concatenated shortcut input, and of the weight that reads it, "
        "each with a range of its own keeps the narrower one.",
        tests=(
            Test(
                measure="wider over narrower half, ranges shared by all calls (median over shortcuts)",
                figure=median(pooled.values()),
                threshold=HALVES,
                reason="a factor of two is one bit of the narrower half",
            ),
        ),
        further={
            "largest such ratio": max((r for r in pooled.values() if r is not None), default=None),
            "the same within a call (median over shortcuts and calls)": median(
                ratio for ratios in per_call.values() for ratio in ratios
            ),
            "shortcuts": len(watches),
        },
        data={
            "per_call": {name: [r and rounded(r) for r in ratios] for name, ratios in per_call.items()},
            "line": HALVES,
        },
    )


def _ratio(values: Sequence[float]) -> float | None:
    """Largest over smallest; None where that is nothing."""
    return rounded(max(values) / min(values)) if min(values) > 0 else None


def _widths(halves: Iterable[tuple[float, float]]) -> list[float]:
    return [hi - lo for lo, hi in halves]


def _pooled(watch: ActivationWatch, half: int) -> float:
    """Range of a half over all calls."""
    return max(ends[half][1] for ends in watch.halves) - min(ends[half][0] for ends in watch.halves)


def _axis(watch: ActivationWatch) -> AxisWatch:
    """The axis along which extremes differ more, over all calls; channels in a tie."""
    return watch.channel if sum(watch.channel.spread) >= sum(watch.token.spread) else watch.token


def _outliers(watch: ActivationWatch) -> dict[str, float | None]:
    axis = _axis(watch)
    return {
        "peak": median(watch.peaks),
        "channels": float(axis is watch.channel),
        "over_prompts": median(axis.over_prompts),
        "over_calls": None if axis.over_calls is None else rounded(axis.over_calls),
    }
