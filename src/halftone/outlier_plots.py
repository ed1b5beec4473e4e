"""Plots of an outlier analysis: a map of all layers by all calls, and the extremes of single layers."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from halftone.report.plots import HUES, INK, MUTED, STYLE, canvas, short, svg_text

MOST_ROWS = 120
_LINE = 0.135  # inches a layer
_ENDS = 3.0  # of the colours, in octaves


class Row(NamedTuple):
    """A site at every call: spread of channels, spread of positions; largest over median magnitude of an
    index of the axis that differs more."""

    site: str
    channels: Sequence[float]
    positions: Sequence[float]
    contrast: Sequence[float | None]


class Bars(NamedTuple):
    """Extremes of every index of an axis of a site; leading: indices that lead in half of the calls."""

    site: str
    axis: str
    lo: Sequence[float]
    hi: Sequence[float]
    leading: Set[int]
    contrast: float


def map_svg(rows: Sequence[Row], name: str) -> str:
    """Left, which axis differs more; right, how far outliers stand out. Layers that read one tensor share a
    line; of more than 120 tensors those are shown whose outliers stand out most."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        return svg_text(_map(_different(rows), name))


def _different(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    alike: dict[tuple[float, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault((*row.channels, *row.positions), []).append(row)
    labelled = [
        (
            short(same[0].site).removesuffix(".input") + (f" +{len(same) - 1}" if len(same) > 1 else ""),
            same[0],
        )
        for same in alike.values()
    ]
    if len(labelled) <= MOST_ROWS:
        return labelled
    chosen = sorted(labelled, key=lambda one: -max(value or 0 for value in one[1].contrast))[:MOST_ROWS]
    names = {row.site for _, row in chosen}
    return [one for one in labelled if one[1].site in names]


def _map(rows: Sequence[tuple[str, Row]], name: str) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    count, calls = max(len(rows), 1), max((len(row.contrast) for _, row in rows), default=1)
    height = _LINE * count + 1.3
    figure = Figure(figsize=(11, height))
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.27, right=0.99, top=1 - 0.5 / height, bottom=0.8 / height, wspace=0.05)
    tiny = np.finfo(np.float64).tiny
    ratio = [np.log2((np.array(r.channels) + tiny) / (np.array(r.positions) + tiny)) for _, r in rows]
    contrasts = [
        [np.nan if value is None else np.log2(max(value, tiny)) for value in row.contrast] for _, row in rows
    ]
    panels = (
        (
            np.array(ratio),
            "PuOr",
            -_ENDS,
            _ENDS,
            "spread of channels over spread of positions",
            ("1/8", "1", "8"),
        ),
        (
            np.array(contrasts),
            "magma_r",
            0.0,
            4.0,
            "widest index over the median one, on that axis",
            ("1", "4", "16"),
        ),
    )
    for axis, (values, colours, low, high, title, ticks) in zip(axes, panels, strict=True):
        image = axis.imshow(
            values.reshape(len(rows), -1) if len(rows) else np.zeros((1, 1)),
            aspect="auto",
            interpolation="none",
            cmap=colours,
            vmin=low,
            vmax=high,
            extent=(-0.5, calls - 0.5, count - 0.5, -0.5),
        )
        axis.set_title(title)
        axis.set_xlabel("call (0 starts from pure noise)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        place = axis.get_position()
        bar = figure.add_axes((place.x0 + place.width * 0.3, 0.22 / height, place.width * 0.4, 0.09 / height))
        shown = figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[low, (low + high) / 2, high])
        shown.ax.set_xticklabels(ticks, fontsize=7)
        shown.ax.tick_params(length=0, pad=2)
        shown.outline.set_visible(False)
    axes[0].set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=6.5)
    figure.text(0.01, 1 - 0.22 / height, name, fontsize=10, color=INK)
    return figure


def worst_svg(sites: Sequence[Bars]) -> str:
    """From smallest to largest value of every index, over all calls and prompts."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure, axes = canvas(max(len(sites), 1), heights=(1.7,) * max(len(sites), 1))
        for axis, one in zip(axes, sites, strict=False):
            places = np.arange(len(one.lo))
            lo, hi = np.array(one.lo), np.array(one.hi)
            leads = np.array([index in one.leading for index in places], dtype=bool)
            axis.fill_between(places, lo, hi, step="mid", color=MUTED, linewidth=0)
            axis.bar(
                places[leads],
                (hi - lo)[leads],
                bottom=lo[leads],
                color=HUES[1],
                width=max(1.0, len(places) / 400),  # wide enough to be seen
                label="leads in half of the calls",
            )
            axis.set_xlim(-0.5, len(places) - 0.5)
            axis.set_title(
                f"{short(one.site)}, every {one.axis} · the widest {one.contrast:.3g} x the median"
            )
            axis.set_ylabel("value")
            if leads.any():
                axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8)
        return svg_text(figure)
