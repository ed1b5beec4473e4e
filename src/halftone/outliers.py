"""Where the outliers of activations sit (the analysis behind DGQ's groups): for every layer and call, how far
the extremes of channels and of positions lie apart, which of the two axes differs more, which indices lead,
and whether they stay the same over prompts and over calls.

Read off the full-precision model along its own trajectory. Convolutions are looked at before they are
unfolded: channels and pixels; of q, k and v a channel is a place in one of the heads. An index leads where
its magnitude is among the largest twentieth of its axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from halftone import device
from halftone.denoiser import denoiser_of
from halftone.files import write_json, write_text
from halftone.outlier_plots import Bars, Row, map_svg, worst_svg
from halftone.provenance import Provenance
from halftone.proxy.activations import PEAK
from halftone.proxy.walk import walk
from halftone.proxy.watch import LEADING, ActivationWatch, AxisWatch
from halftone.source import Source
from halftone.steps.choice import check_same_model
from halftone.trajectory import Trajectory

DATA, MAP, WORST = "outliers.json", "outliers.svg", "worst.svg"
WORST_SHOWN = 4
_LEADERS = 8
_DIGITS = 4


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Leader(_Part):
    """An index among the leading ones, and the share of the calls at which it is."""

    index: int
    calls: float


class AxisOutliers(_Part):
    """One axis of one site."""

    indices: int
    spread: tuple[float, ...] = Field(description="of the extremes of its indices, at every call (DGQ's D)")
    contrast: tuple[float | None, ...] = Field(
        description="largest over median magnitude of an index, at every call"
    )
    over_prompts: float | None = Field(
        description="share of leading indices that two prompts have in common, median over calls"
    )
    over_calls: float | None = Field(description="the same of two calls")
    leaders: tuple[Leader, ...] = Field(description="indices that lead most often")


class SiteOutliers(_Part):
    """One activation. peak: largest magnitude over the 99.9th percentile, at every call."""

    site: str
    peak: tuple[float | None, ...]
    channels: AxisOutliers
    positions: AxisOutliers

    @property
    def channel_calls(self) -> int:
        """Calls at which channels differ more than positions."""
        pairs = zip(self.channels.spread, self.positions.spread, strict=True)
        return sum(channel > position for channel, position in pairs)

    @property
    def wins(self) -> AxisOutliers:
        """The axis that differs more over all calls; channels in a tie."""
        more = sum(self.channels.spread) >= sum(self.positions.spread)
        return self.channels if more else self.positions

    @property
    def peaks(self) -> bool:
        """Whether values stand out as the proxy card counts it."""
        return (_median(self.peak) or 0.0) >= PEAK

    @property
    def contrast(self) -> float:
        """How far the widest index of the axis that differs more stands out, median over the calls."""
        return _median(self.wins.contrast) or 0.0


class Outliers(_Part):
    """What was found in one model."""

    format: int = 1
    name: str
    made_for: Provenance
    calls: int
    left_out: tuple[str, ...] = Field(description="sites that see one vector per sample, without positions")
    says: tuple[str, ...] = Field(default=(), description="what it comes to, in words")
    sites: tuple[SiteOutliers, ...]

    def save(self, folder: Path, watches: Mapping[str, ActivationWatch]) -> list[Path]:
        """Write outliers.json and the two plots into a folder; returns them."""
        whole = self.model_copy(update={"says": tuple(self.say())})
        write_json(folder / DATA, whole.model_dump(mode="json"))
        rows = [Row(s.site, s.channels.spread, s.positions.spread, s.wins.contrast) for s in self.sites]
        write_text(folder / MAP, map_svg(rows, self.name))
        write_text(folder / WORST, worst_svg([bars(s, watches[s.site]) for s in self.worst()]))
        return [folder / name for name in (DATA, MAP, WORST)]

    def worst(self) -> list[SiteOutliers]:
        """Sites with the widest outliers, each tensor once."""
        ranked = sorted(self.sites, key=lambda site: (-site.contrast, site.site))
        different: dict[Any, SiteOutliers] = {}
        for site in ranked:
            different.setdefault((site.channels.spread, site.positions.spread), site)
        return list(different.values())[:WORST_SHOWN]

    def figures(self) -> dict[str, float]:
        """In numbers, over the sites; None where nothing is known is left out."""
        count = len(self.sites)
        if not count:
            return {}
        known: dict[str, float | None] = {
            "sites": count,
            "peaked_share": sum(site.peaks for site in self.sites) / count,
            "channels_win_share": sum(site.wins is site.channels for site in self.sites) / count,
            "axis_changes_share": sum(0 < site.channel_calls < self.calls for site in self.sites) / count,
            "overlap_of_prompts": _median([site.wins.over_prompts for site in self.sites]),
            "overlap_of_calls": _median([site.wins.over_calls for site in self.sites]),
        }
        return {key: _round(value) for key, value in known.items() if value is not None}

    def say(self) -> list[str]:
        """In words."""
        found = self.figures()
        if not found:
            return ["no activation has both channels and positions"]
        lines = [
            f"{len(self.sites)} activations, {self.calls} calls: channels differ more than positions in "
            f"{found['channels_win_share']:.0%}; which of them does changes from call to call in "
            f"{found['axis_changes_share']:.0%}",
            f"largest magnitude at least {PEAK:g} x the 99.9th percentile in {found['peaked_share']:.0%}",
        ]
        if "overlap_of_prompts" in found and "overlap_of_calls" in found:
            lines.append(
                f"of the leading {LEADING:.0%} of indices two prompts have {found['overlap_of_prompts']:.0%} "
                f"in common, two calls {found['overlap_of_calls']:.0%} ({LEADING:.0%} by chance)"
            )
        for site in self.worst():
            axis = "channels" if site.wins is site.channels else "positions"
            leaders = ", ".join(str(leader.index) for leader in site.wins.leaders[:4])
            lines.append(f"{site.site}: {axis} {leaders}, the widest {site.contrast:.3g} x the median")
        return lines


def find(
    source: Source, trajectory: Trajectory, known: Provenance, *, name: str, batch_size: int
) -> tuple[Outliers, Mapping[str, ActivationWatch]]:
    """Walk along the trajectory, the model's own; also the watches, which hold the extremes of every index.

    batch_size: prompts per forward. Raises UserError for the trajectory of another model, and naming site and
    call where a tensor holds NaN or infinite values.
    """
    check_same_model(source, known)
    source.pipeline.to(device.best())
    watches = walk(denoiser_of(source.pipeline), trajectory, batch_size=batch_size).activations
    found = Outliers(
        name=name,
        made_for=known,
        calls=trajectory.n_calls,
        left_out=tuple(site for site, watch in watches.items() if watch.flat),
        sites=tuple(_site(site, watch) for site, watch in watches.items() if not watch.flat),
    )
    return found, watches


def _site(name: str, watch: ActivationWatch) -> SiteOutliers:
    return SiteOutliers(
        site=name,
        peak=tuple(None if peak is None else _round(peak) for peak in watch.peaks),
        channels=_axis(watch.channel),
        positions=_axis(watch.token),
    )


def _axis(watch: AxisWatch) -> AxisOutliers:
    calls = len(watch.spread)
    order = sorted(range(watch.led.numel()), key=lambda index: (-int(watch.led[index]), index))
    leaders = [Leader(index=index, calls=_round(int(watch.led[index]) / calls)) for index in order[:_LEADERS]]
    return AxisOutliers(
        indices=watch.led.numel(),
        spread=tuple(_round(value) for value in watch.spread),
        contrast=tuple(None if value is None else _round(value) for value in watch.contrast),
        over_prompts=_median(watch.over_prompts),
        over_calls=None if watch.over_calls is None else _round(watch.over_calls),
        leaders=tuple(leader for leader in leaders if leader.calls > 0),
    )


def bars(site: SiteOutliers, watch: ActivationWatch) -> Bars:
    """What the plot of a site shows: the extremes of every index of the axis that differs more."""
    wins = site.wins is site.channels
    axis = watch.channel if wins else watch.token
    leading = {leader.index for leader in site.wins.leaders if leader.calls >= 0.5}
    return Bars(
        site.site,
        "channel" if wins else "position",
        axis.least.tolist(),
        axis.most.tolist(),
        leading,
        site.contrast,
    )


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return _round(median(known)) if known else None


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
