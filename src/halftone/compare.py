"""Two rows, figure by figure, prompt by prompt: from the per-image data beside their metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from halftone.errors import UserError
from halftone.evaluate.statistics import bootstrap
from halftone.files import read_json

PER_IMAGE = (
    "alignment",
    "alignment_objects",
    "alignment_flips",
    "clip_score",
    "lpips",
    "psnr",
    "ssim",
    "latent_error",
)
_SAME = ("model", "tier", "n_images", "prompts_sha256", "features")


@dataclass(frozen=True)
class Change:
    """A figure of two rows (means over prompts), and second minus first with a paired interval of 95 %."""

    name: str
    first: float
    second: float
    change: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0


def changes(first: Path, second: Path, *, resamples: int = 1000, seed: int = 0) -> list[Change]:
    """Every per-image figure that both metrics files have. Raises UserError for rows that do not compare."""
    check_alike(first, second)
    values = [_values(path.with_suffix(".safetensors")) for path in (first, second)]
    found = []
    for name in PER_IMAGE:
        if name in values[0] and name in values[1]:
            a, b = values[0][name], values[1][name]
            paired = bootstrap(b - a, resamples=resamples, seed=seed)
            found.append(Change(name, float(a.mean()), float(b.mean()), paired.value, paired.lo, paired.hi))
    return found


def check_alike(first: Path, second: Path) -> None:
    """Raises UserError unless the rows of two metrics files are of one model and were measured alike."""
    rows = [_row(path) for path in (first, second)]
    for name in _SAME:
        a, b = (row.get(name) for row in rows)
        if a != b:
            raise UserError(
                f"{second}: {name} is {b}, that of {first} is {a}; only rows measured alike compare"
            )


def _row(path: Path) -> dict[str, object]:
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not rows:
        raise UserError(f"{path}: holds no rows; run halftone metrics again")
    return dict(rows[0])


def _values(path: Path) -> dict[str, NDArray[np.float64]]:
    try:
        with safe_open(str(path), framework="np") as file:
            return {
                name: file.get_tensor(name).astype(np.float64)
                for name in PER_IMAGE
                if name in set(file.keys())
            }
    except (FileNotFoundError, SafetensorError, OSError) as fault:
        raise UserError(
            f"{path}: per-image data cannot be read ({fault}); run halftone metrics again"
        ) from None
