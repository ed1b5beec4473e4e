"""One plot for each phenomenon of the card, as SVG text, from the finding's own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from halftone.proxy.finding import Finding
from halftone.report.plots import HUES, INK, LINES, MUTED, RULE, STYLE, canvas, short, svg_text

_CALL = "call (0 starts from pure noise)"


def svg(finding: Finding) -> str | None:
    """None where there was nothing to measure."""
    from matplotlib import rc_context

    if any(test.figure is None for test in finding.tests):
        return None
    with rc_context(STYLE):
        return svg_text(_PLOTS[finding.key](finding.data))


def _drift(data: Mapping[str, Any]) -> Any:
    found = sorted(data["drift"].items(), key=lambda item: -item[1])
    values = [drift for _, drift in found]
    figure, (axis,) = canvas(1, heights=(3.4,))
    places = (np.arange(len(values)) + 0.5) / len(values)
    axis.plot(places, values, color=HUES[0], linewidth=1.8, drawstyle="steps-mid")
    for hue, (name, drift) in zip(HUES[1:], _different(found), strict=False):
        at = values.index(drift)
        axis.plot(places[at], drift, "o", color=hue, markersize=5, label=f"{short(name)} ×{drift:.3g}")
    axis.set_yscale("log", base=2)
    _plain_ticks(axis)
    _threshold(axis, data["line"], "one bit")
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_title("activation range over calls, largest over smallest")
    axis.set_xlabel("share of the sites, in order of drift")
    axis.set_ylabel("drift")
    _legend(axis)
    return figure


def _different(found: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The first of each value: layers that read the same tensor have the same."""
    chosen: dict[float, str] = {}
    for name, value in found:
        chosen.setdefault(value, name)
    return [(name, value) for value, name in chosen.items()]


def _outliers(data: Mapping[str, Any]) -> Any:
    figure, axes = canvas(2, heights=(3.2, 3.2))
    rows = (("over_prompts", "two prompts"), ("over_calls", "two calls"))
    for axis, (key, between) in zip(axes, rows, strict=True):
        for hue, channels, label in ((HUES[0], 1.0, "channels"), (HUES[1], 0.0, "tokens")):
            chosen = [
                (site["peak"], site[key])
                for site in data["sites"].values()
                if site["channels"] == channels and site["peak"] is not None and site[key] is not None
            ]
            if chosen:
                x, y = zip(*chosen, strict=True)
                axis.plot(x, y, "o", color=hue, markersize=5, alpha=0.7, label=f"{label} differ more", mew=0)
        axis.axvline(data["peak"], color=INK, linewidth=0.8, linestyle="--")
        _threshold(axis, data["stable"], "")
        axis.set_ylim(-0.03, 1.03)
        axis.set_ylabel("overlap")
        axis.set_title(f"leading indices that {between} have in common (dashed: thresholds)")
    axes[-1].set_xlabel("largest magnitude over the 99.9th percentile, median over calls")
    _legend(axes[0])
    return figure


def _start(data: Mapping[str, Any]) -> Any:
    figure, axis = _lines(data["calls"], "mean probability of the start token")
    axis.set_ylim(0, 1)
    axis.axhline(data["even"], color=MUTED, linewidth=0.8)
    axis.text(0.005, data["even"] + 0.015, "even share", transform=axis.get_yaxis_transform(), color=MUTED)
    _threshold(axis, data["line"], "half of all")
    axis.set_ylabel("probability")
    return figure


def _maximum(data: Mapping[str, Any]) -> Any:
    figure, axis = _lines(
        data["calls"], "largest probability of another token: deviation over mean, over prompts"
    )
    _threshold(axis, data["line"], "threshold")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("deviation over mean")
    return figure


def _halves(data: Mapping[str, Any]) -> Any:
    figure, axis = _lines(
        data["per_call"], "wider over narrower half of the inputs of concatenated shortcuts"
    )
    axis.set_yscale("log", base=2)
    _plain_ticks(axis)
    _threshold(axis, data["line"], "one bit")
    axis.set_ylabel("ratio of ranges")
    return figure


def _power_law(data: Mapping[str, Any]) -> Any:
    values = np.array(list(data["calls"].values()), dtype=np.float64)
    layers, calls = values.shape
    figure, (axis,) = canvas(1, heights=(0.28 * max(layers, 4) + 0.4,), left=0.34, right=0.86)
    end = float(np.abs(values).max()) or 1.0
    image = axis.imshow(
        values,
        aspect="auto",
        interpolation="none",
        cmap="PuOr",
        vmin=-end,
        vmax=end,
        extent=(-0.5, calls - 0.5, layers - 0.5, -0.5),
    )
    axis.set_yticks(range(layers), [short(name).removesuffix(".probabilities") for name in data["calls"]])
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(_CALL)
    axis.set_title("softmax outputs: which law fits better")
    place = axis.get_position()
    bar = figure.add_axes((place.x1 + 0.012, place.y0, 0.012, place.height))
    colours = figure.colorbar(image, cax=bar, ticks=[-end, 0, end])
    colours.ax.set_yticklabels(["exponential", "neither", "power law"], fontsize=8)
    colours.ax.tick_params(length=0)
    colours.outline.set_visible(False)
    return figure


def _accumulation(data: Mapping[str, Any]) -> Any:
    figure, (top, bottom) = canvas(2, heights=(3.0, 2.6))
    calls = range(len(data["ratio"]))
    for hue, key, label in (
        (HUES[1], "free_running", "output, free-running"),
        (HUES[0], "teacher_forced", "output, single call"),
        (HUES[2], "latents", "latents, free-running"),
    ):
        positive = [value if value > 0 else np.nan for value in data[key]]  # the first latents are the same
        top.plot(calls, positive, color=hue, linewidth=1.6, label=label)
    top.set_yscale("log")
    top.set_title("error of the quantized model over what full precision gives, root mean square")
    top.set_ylabel("relative error")
    top.grid(axis="y", which="major", color=RULE, linewidth=0.6)
    _legend(top)
    bottom.plot(calls, [np.nan if r is None else r for r in data["ratio"]], color=HUES[1], linewidth=1.6)
    bottom.axvspan(
        len(data["ratio"]) // 2 - 0.5, len(data["ratio"]) - 0.5, color=RULE, alpha=0.35, linewidth=0
    )
    _threshold(bottom, data["line"], "half is inherited")
    bottom.set_ylim(bottom=0)
    bottom.set_title("free-running over single-call error (shaded: the half that counts)")
    bottom.set_ylabel("ratio")
    bottom.set_xlabel(_CALL)
    for axis in (top, bottom):
        axis.set_xlim(-0.5, len(data["ratio"]) - 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _lines(calls: Mapping[str, Sequence[float | None]], title: str) -> tuple[Any, Any]:
    """A line per site; with more sites than hues the rest stays grey and unnamed."""
    figure, (axis,) = canvas(1, heights=(3.4,))
    for place, (name, values) in enumerate(calls.items()):
        numbers = [np.nan if value is None else value for value in values]
        named = place < LINES
        label = short(name).removesuffix(".probabilities").removesuffix(".input") if named else None
        style = {"color": HUES[place], "linewidth": 1.6} if named else {"color": RULE, "linewidth": 1.0}
        axis.plot(range(len(numbers)), numbers, label=label, zorder=2 if named else 1, **style)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(title)
    axis.set_xlabel(_CALL)
    _legend(axis)
    return figure, axis


def _threshold(axis: Any, value: float, text: str) -> None:
    axis.axhline(value, color=INK, linewidth=0.8, linestyle="--")
    axis.annotate(
        text, (1, value), xycoords=axis.get_yaxis_transform(), xytext=(-2, 3), textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", which="major", color=RULE, linewidth=0.6)


def _legend(axis: Any) -> None:
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8, handlelength=1.4)


_PLOTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "drift": _drift,
    "outliers": _outliers,
    "start": _start,
    "maximum": _maximum,
    "halves": _halves,
    "powerlaw": _power_law,
    "accumulation": _accumulation,
}
