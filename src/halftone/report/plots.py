"""Plots as SVG text, the same bytes for the same numbers: no dates, no random ids, no fonts embedded."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

INK, MUTED, RULE = "#1b1f24", "#5b6470", "#d8dce1"
# eight hues told apart by colour-blind readers too (Okabe and Ito, black and yellow darkened for thin lines)
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a4fb5", "#4d4d4d")
LINES = len(HUES)
_STAGE = re.compile(r"^(down|mid|up)_blocks?\.(?:(\d+)\.)?")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "halftone",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.titlepad": 7,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.facecolor": "white",
    "path.simplify": False,
}


@dataclass(frozen=True)
class SiteRange:
    """Activation range (hi - lo) of one site at every call; drift is its largest over its smallest."""

    site: str
    range: tuple[float, ...]
    drift: float | None


@dataclass(frozen=True)
class SiteCodes:
    """Codes of one layer's attention probabilities at every call: log2, or uniform."""

    site: str
    log2: tuple[bool, ...]


def short(site: str) -> str:
    """A site's name without what every name repeats: `down 1 · attentions.0.0.attn2.to_k.input`."""
    name = _STAGE.sub(lambda stage: f"{' '.join(filter(None, stage.groups()))} · ", site)
    return name.replace("transformer_blocks.", "")


def ranges_svg(sites: Sequence[SiteRange], title: str, codes: Sequence[SiteCodes] = ()) -> str:
    """Range against call for the sites of greatest drift, above a heat map of all sites by all calls; below
    it, where codes of attention probabilities were chosen, which layers and calls have log2 codes.

    Sites come in the order of the denoiser. With a single call there is no drift to show, and the plot
    ranks the sites by range instead.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        single = all(len(site.range) < 2 for site in sites)
        return svg_text(_single(sites, title) if single else _per_call(sites, title, codes))


@dataclass(frozen=True)
class Errors:
    """Error of the latents of one row after every call: value, lower and upper end of its interval.

    relaxed: the calls whose activations have more bits. forced: the same error where every call starts from
    full precision's latents, so that none inherits any.
    """

    name: str
    values: tuple[float, ...]
    lo: tuple[float, ...]
    hi: tuple[float, ...]
    relaxed: tuple[int, ...] = ()
    forced: tuple[float, ...] = ()


def errors_svg(rows: Sequence[Errors]) -> str:
    """How far the latents of each row are from full precision's after every call, as SVG; relaxed calls are
    shaded in the row's colour."""
    from matplotlib import rc_context

    forced = any(row.forced for row in rows)
    looks = [(hue, dashes) for dashes in (("-",) if forced else ("-", "--", ":", "-.")) for hue in HUES]
    with rc_context(STYLE):
        figure, axes = canvas(1, heights=(4.0,))
        for row, (hue, dashes) in zip(rows, looks, strict=False):
            calls = range(len(row.values))
            axes[0].plot(calls, row.values, dashes, color=hue, linewidth=1.6, label=row.name)
            axes[0].fill_between(calls, row.lo, row.hi, color=hue, alpha=0.15, linewidth=0)
            shade(axes[0], row.relaxed, hue)
            if row.forced:
                label = f"{row.name}, teacher-forced"
                axes[0].plot(calls, row.forced, ":", color=hue, linewidth=1.6, label=label)
        axes[0].set_yscale("log")
        axes[0].set_title("error of the latents after every call, over the norm of full precision's")
        axes[0].set_xlabel("call (0 starts from pure noise)")
        axes[0].grid(axis="y", which="major", color=RULE, linewidth=0.6)
        axes[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8)
        return svg_text(figure)


def shade(axis: Any, relaxed: Sequence[int], hue: str) -> None:
    """Mark calls whose activations have more bits."""
    for call in relaxed:
        axis.axvspan(call - 0.5, call + 0.5, color=hue, alpha=0.07, linewidth=0)


def _per_call(sites: Sequence[SiteRange], title: str, codes: Sequence[SiteCodes] = ()) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    calls = len(sites[0].range)
    values = np.array([site.range for site in sites], dtype=np.float64)
    drifting = sorted((s for s in sites if s.drift is not None), key=lambda s: -(s.drift or 0))
    alike: dict[tuple[float, ...], list[SiteRange]] = {}  # layers that share an input share a line
    for site in drifting:
        alike.setdefault(site.range, []).append(site)
    greatest = list(alike.values())[:LINES]
    figure, axes = canvas(3, heights=(3.0, 4.8, 1.8)) if codes else canvas(2, heights=(3.0, 4.8))
    top, bottom = axes[:2]
    if codes:
        _codes(axes[2], codes)
    for hue, same in zip(HUES, greatest, strict=False):
        top.plot(range(calls), same[0].range, color=hue, linewidth=1.6, label=_label(same))
    top.set_yscale("log")
    top.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    top.yaxis.set_minor_formatter(NullFormatter())
    top.set_title(f"{title}: activation range at the sites that drift most (× largest over smallest)")
    top.set_ylabel("range, hi − lo")
    top.grid(axis="y", which="major", color=RULE, linewidth=0.6)
    if greatest:
        top.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8, handlelength=1.4)

    positive = np.where(values > 0, values, np.nan)
    middle = np.nanmedian(np.where(np.isnan(positive).all(axis=1, keepdims=True), 1.0, positive), axis=1)
    image = bottom.imshow(
        np.log2(positive / middle[:, None]),
        aspect="auto",
        interpolation="none",
        cmap="RdBu_r",
        vmin=-2,
        vmax=2,
        extent=(-0.5, calls - 0.5, len(sites) - 0.5, -0.5),
    )
    bottom.set_title("every site: range at a call over the site's median range")
    axes[-1].set_xlabel("call (0 starts from pure noise)")  # once: it would meet a title
    _block_ticks(bottom, [site.site for site in sites])
    for axis in axes:
        axis.set_xlim(-0.5, calls - 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
    place = bottom.get_position()
    bar = figure.add_axes((place.x1 + 0.012, place.y0, 0.012, place.height))
    colours = figure.colorbar(image, cax=bar, ticks=[-2, -1, 0, 1, 2])
    colours.ax.set_yticklabels(["÷4 or less", "÷2", "median", "×2", "×4 or more"], fontsize=8)
    colours.ax.tick_params(length=0)
    colours.outline.set_visible(False)
    return figure


def _codes(axis: Any, codes: Sequence[SiteCodes]) -> None:
    """Layers by calls, those with log2 codes filled."""
    from matplotlib.colors import ListedColormap

    chosen = np.array([site.log2 for site in codes])
    axis.imshow(
        chosen,
        aspect="auto",
        interpolation="none",
        cmap=ListedColormap([RULE, HUES[0]]),
        vmin=0,
        vmax=1,
        extent=(-0.5, chosen.shape[1] - 0.5, len(codes) - 0.5, -0.5),
    )
    axis.set_title(f"attention probabilities: log2 codes (blue) at {chosen.mean():.0%} of layers and calls")
    _block_ticks(axis, [site.site for site in codes])


def _label(same: Sequence[SiteRange]) -> str:
    more = f" and {len(same) - 1} alike" if len(same) > 1 else ""
    return f"{short(same[0].site)}{more} ×{same[0].drift:.3g}"


def _single(sites: Sequence[SiteRange], title: str) -> Any:
    widest = sorted(sites, key=lambda s: -s.range[0])[: 2 * LINES]
    figure, (axis,) = canvas(1, heights=(0.24 * max(len(widest), 2) + 0.2,), left=0.32, right=0.97)
    places = range(len(widest))[::-1]
    axis.barh(places, [s.range[0] for s in widest], color=HUES[0], height=0.65)
    axis.set_yticks(places, [short(s.site) for s in widest])
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.set_title(f"{title}: activation range, the {len(widest)} widest of {len(sites)} sites")
    axis.set_xlabel("range, hi − lo")
    return figure


def _block_ticks(axis: Any, names: Sequence[str]) -> None:
    """Name the stages of the denoiser at the left, with a rule between them."""
    start = 0
    ticks, labels = [], []
    for block, members in groupby(names, key=_block):
        length = len(list(members))
        if start:
            axis.axhline(start - 0.5, color=INK, linewidth=0.5)
        if length >= len(names) / 40:  # a thinner band has no room for its name
            ticks.append(start + (length - 1) / 2)
            labels.append(block)
        start += length
    axis.set_yticks(ticks, labels)
    axis.tick_params(axis="y", length=0)


def _block(site: str) -> str:
    """`down_blocks.0.conv1.input` -> `down 0`; `time_embedding.linear_1.input` -> `time embedding`."""
    stage = _STAGE.match(site)
    return " ".join(filter(None, stage.groups())) if stage else site.split(".")[0].replace("_", " ")


def canvas(
    rows: int, heights: tuple[float, ...], left: float = 0.09, right: float = 0.67, bottom: float = 0.6
) -> tuple[Any, Any]:
    """A figure of `rows` panels. heights and bottom (the margin that ticks and label need) are
    inches, left and right shares of the width."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    height = math.fsum(heights) + 0.55 * (rows - 1) + 0.35 + bottom
    figure = Figure(figsize=(11, height))
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    margin = {"left": left, "right": right, "top": 1 - 0.35 / height, "bottom": bottom / height}
    figure.subplots_adjust(**margin, hspace=0.55 * rows / math.fsum(heights))
    return figure, axes


def svg_text(figure: Any) -> str:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    return stream.getvalue()
