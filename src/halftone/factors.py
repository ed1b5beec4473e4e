"""What `halftone reparameterize` finds: a factor per input channel of its layers, and what that balances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halftone.errors import UserError
from halftone.files import write_json, write_text, writing
from halftone.plan import Division
from halftone.provenance import Provenance
from halftone.report.plots import HUES, MUTED, RULE, STYLE, canvas, short, svg_text

FACTORS, DATA, PLOT = "factors.safetensors", "imbalance.json", "imbalance.svg"
_DIGITS = 6
_NAMED = 90  # layers, no more of which can be told apart below a plot
_LETTER = 0.05  # inches, of a layer's name there


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Balance(_Part):
    """How unequal a layer's inputs are."""

    channels: float | None = Field(
        description="largest over median channel's magnitude, median over the calls; null where that is 0"
    )
    calls: float | None = Field(description="largest over smallest call's magnitude; null where that is 0")


class LayerBalance(_Part):
    """One layer, before and after its input is divided."""

    layer: str
    division: Division
    before: Balance
    after: Balance
    median_factor: float
    largest_factor: float
    truncated: float = Field(description="share of the channels whose factor is the limit")


@dataclass(frozen=True)
class Factors:
    """values: (input channels,) float32 by module. difference: largest change of the denoiser's output, as a
    share of the largest. denoiser_calls: made for this, each on one batch."""

    values: dict[str, Tensor]
    layers: tuple[LayerBalance, ...]
    difference: float
    denoiser_calls: int

    def save(self, folder: Path, made_for: Provenance) -> list[Path]:
        """factors.safetensors, imbalance.json and imbalance.svg."""
        folder.mkdir(parents=True, exist_ok=True)
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in self.values.items()}
        facts = {
            "format": 1,
            "made_for": made_for.model_dump(mode="json"),
            "difference": rounded(self.difference),
            "denoiser_calls": self.denoiser_calls,
            "layers": [layer.model_dump(mode="json") for layer in self.layers],
        }
        write_json(folder / DATA, facts)
        write_text(folder / PLOT, svg(self.layers))
        with writing(folder / FACTORS) as temporary:
            save_file(plain, temporary, metadata=made_for.to_metadata())
        return [folder / FACTORS, folder / DATA, folder / PLOT]


def load(path: Path) -> tuple[dict[str, Tensor], Provenance]:
    """The factors by module that `Factors.save` wrote, and what they were made for. Raises UserError."""
    try:
        with safe_open(path, framework="pt") as stored:
            made_for = Provenance.from_metadata(stored.metadata(), path)
            return {name: stored.get_tensor(name) for name in stored.keys()}, made_for  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the step reparameterize") from None
    except (SafetensorError, OSError) as fault:
        raise UserError(f"{path}: not factors ({str(fault)[:100]}); run reparameterize again") from None


def balance(maxima: Tensor) -> Balance:
    """Of largest magnitudes (calls, channels)."""
    middle = maxima.median(dim=1).values
    ratios = (maxima.amax(1) / middle)[middle > 0]
    tensor = maxima.amax(1)
    smallest = float(tensor.min())
    return Balance(
        channels=rounded(float(ratios.median())) if len(ratios) else None,
        calls=rounded(float(tensor.max()) / smallest) if smallest > 0 else None,
    )


def svg(layers: tuple[LayerBalance, ...]) -> str:
    """Both kinds of imbalance of every layer, before and after."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        return svg_text(drawn(layers))


def drawn(layers: tuple[LayerBalance, ...]) -> Any:
    """The figure of `svg`."""
    panels = (
        ("channels", "over channels: largest over median channel (median over the calls)"),
        ("calls", "over calls: the tensor's largest magnitude, largest over smallest call"),
    )
    names = [short(layer.layer) for layer in layers]
    named = len(names) <= _NAMED
    longest = max((len(name) for name in names), default=0) if named else 0
    figure, axes = canvas(len(panels), heights=(3.0,) * len(panels), bottom=0.6 + _LETTER * longest)
    for axis, (key, title) in zip(axes, panels, strict=True):
        _panel(axis, layers, key, title)
        axis.set_xticks(range(len(names)))
        axis.set_xticklabels([])
    if named:
        axes[-1].set_xticklabels(names, rotation=90, fontsize=6)
    axes[-1].set_xlabel("layers, in the order in which they run")
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8)
    return figure


def _panel(axis: Any, layers: tuple[LayerBalance, ...], key: str, title: str) -> None:
    from matplotlib.ticker import LogFormatter

    for place, layer in enumerate(layers):
        before, after = getattr(layer.before, key), getattr(layer.after, key)
        if before is not None and after is not None:
            axis.plot((place, place), (before, after), color=MUTED, linewidth=0.8, zorder=1)
    looks = (
        ("before", Division.QUANTIZE_STEP, HUES[1], "o"),
        ("after", Division.QUANTIZE_STEP, HUES[0], "o"),
        ("before", Division.FOLDED, HUES[1], "^"),
        ("after", Division.FOLDED, HUES[0], "^"),
    )
    for when, division, hue, marker in looks:
        chosen = [
            (place, getattr(getattr(layer, when), key))
            for place, layer in enumerate(layers)
            if layer.division is division and getattr(getattr(layer, when), key) is not None
        ]
        if chosen:
            where = "folded" if division is Division.FOLDED else "quantize step"
            # a ring, so that a layer that nothing changes shows both
            size, face = (26, "none") if when == "before" else (12, hue)
            label = f"{when}, {where}"
            axis.scatter(
                *zip(*chosen, strict=True),
                s=size,
                edgecolors=hue,
                facecolors=face,
                marker=marker,
                label=label,
            )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))  # plain numbers
    axis.set_title(title)
    axis.grid(axis="y", color=RULE, linewidth=0.6)


def rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
