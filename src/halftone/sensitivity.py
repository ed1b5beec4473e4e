"""What `halftone sensitivity` finds: how much each window of calls matters, and which calls to relax."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from halftone.errors import UserError
from halftone.files import read_json, write_json, write_text
from halftone.passes.knapsack import Option, choose
from halftone.provenance import Provenance
from halftone.relaxing import Interval, relaxed_calls
from halftone.report.plots import HUES, INK, MUTED, RULE, STYLE, canvas, shade, svg_text

DATA, PLOT = "sensitivity.json", "sensitivity.svg"
CLEAR = 2.0
"""Standard errors that quantization must have cost in text match for windows to be judged by it."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Part):
    """Of one way to sample: mean over the prompts.

    latent_error: |final latents - full precision's| / |full precision's|. text_match: cosine of image and
    prompt, of a CLIP; None where it was not measured.
    """

    latent_error: float
    text_match: float | None = None


class Window(_Part):
    """A window of calls: the quantized model with these calls restored to float, and the full-precision model
    with noise as strong as quantization error on the denoiser's output at these calls only."""

    calls: tuple[int, ...]
    restored: Measured
    perturbed: Measured
    gain: float = Field(description="share of what quantization cost that restoring the window gives back")


class Sensitivity(_Part):
    """Curves over windows, and the choice that follows."""

    format: int = 1
    made_for: Provenance
    clip: str | None = Field(default=None, description="that scored the text match")
    text_clear: bool = Field(description="quantization cost text match, so gains count it")
    quantized: Measured
    full_precision: Measured
    noise: tuple[float, ...] = Field(description="rms of quantization error in the output, at every call")
    windows: tuple[Window, ...]
    denoiser_calls: int = Field(description="made for this beside calibration, each on one batch")
    relaxed_calls: tuple[int, ...] = Field(description="the choice")
    average_bits: float = Field(description="mean activation width of the choice")

    def save(self, folder: Path) -> list[Path]:
        """sensitivity.json and sensitivity.svg."""
        write_json(folder / DATA, self.model_dump(mode="json"))
        write_text(folder / PLOT, svg(self))
        return [folder / DATA, folder / PLOT]

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Raises UserError where the file is missing or is none."""
        try:
            return cls.model_validate(read_json(path))
        except ValidationError:
            raise UserError(f"{path}: not a sensitivity.json; run halftone sensitivity again") from None


def windows(n_calls: int, count: int) -> list[tuple[int, ...]]:
    """The calls in `count` runs of as equal length as can be (no more than there are calls)."""
    count = min(count, n_calls)
    ends = [place * n_calls // count for place in range(count + 1)]
    return [tuple(range(first, last)) for first, last in itertools.pairwise(ends)]


def gains(
    quantized: Measured, full_precision: Measured, restored: list[Measured], *, text: bool
) -> list[float]:
    """For each window what restoring it gives back, as a share of what quantization cost: of the latent
    error, plus, if `text`, of the text match (our choice: the paper compares the two by eye)."""
    found = []
    for one in restored:
        gain = (quantized.latent_error - one.latent_error) / max(quantized.latent_error, 1e-12)
        if text:
            values = one.text_match, quantized.text_match, full_precision.text_match
            assert None not in values
            window, low, high = (value or 0.0 for value in values)
            gain += (window - low) / (high - low)
        found.append(gain)
    return found


def capacity(budget: float | None, base: int, relaxed: int, n_calls: int) -> int:
    """Calls that may be relaxed for `budget` more activation bits on average; None: as many as the paper's
    interval holds."""
    if budget is None:
        return len(relaxed_calls(Interval.NEAR_X0, n_calls))
    return min(n_calls, math.floor(budget * n_calls / (relaxed - base) + 1e-9))


def chosen(parts: list[tuple[int, ...]], gained: list[float], most: int) -> tuple[int, ...]:
    """Calls of the windows that gain most together, `most` calls at most (gains of windows add up: our
    choice, as far as errors do)."""
    items = [[Option(0, 0.0), Option(len(calls), gain)] for calls, gain in zip(parts, gained, strict=True)]
    places = choose(items, most)
    return tuple(call for calls, place in zip(parts, places, strict=True) if place for call in calls)


def svg(found: Sensitivity) -> str:
    """Both experiments against the calls: fidelity above, text match below where it was measured."""
    from matplotlib import rc_context

    panels: list[tuple[str, str]] = [("latent_error", "error of the final latents")]
    if found.clip is not None:
        panels.append(("text_match", f"text match (cosine, CLIP {found.clip})"))
    with rc_context(STYLE):
        figure, axes = canvas(len(panels), heights=(3.0,) * len(panels))
        for axis, (key, title) in zip(axes, panels, strict=True):
            _panel(axis, found, key, title)
        axes[-1].set_xlabel("call (0 starts from pure noise)")
        axes[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8)
        return svg_text(figure)


def _panel(axis: Any, found: Sensitivity, key: str, title: str) -> None:
    lines = (
        ("restored", HUES[0], "quantized, window in float"),
        ("perturbed", HUES[1], "full precision, window disturbed"),
    )
    for name, hue, label in lines:
        for place, window in enumerate(found.windows):
            value = getattr(getattr(window, name), key)
            ends = (window.calls[0] - 0.45, window.calls[-1] + 0.45)
            axis.plot(ends, (value, value), color=hue, linewidth=3, label=label if place == 0 else None)
    for measured, colour, label in (
        (found.quantized, INK, "quantized"),
        (found.full_precision, MUTED, "full precision"),
    ):
        axis.axhline(getattr(measured, key), color=colour, linewidth=1, linestyle="--", label=label)
    shade(axis, found.relaxed_calls, HUES[2])
    axis.set_title(f"{title}; shaded: the calls to relax")
    axis.grid(axis="y", color=RULE, linewidth=0.6)
