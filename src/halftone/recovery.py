"""How much of what one recipe loses against full precision another one gives back, with intervals.

Published claims have this form: a distance at most so many times the baseline's, an excess over full
precision at most half of the baseline's, half of the lost alignment back. All three rows are measured on the
same prompts and noise, so every replicate leaves the same prompts out of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from halftone.compare import check_alike
from halftone.errors import UserError
from halftone.evaluate import distances
from halftone.evaluate.comparison import FEWEST_FOR_FRECHET
from halftone.evaluate.statistics import Estimate, group_jackknife, prompt_groups

_SCORES = ("alignment", "alignment_objects", "clip_score")
Mask = NDArray[np.bool_]


def recoveries(first: Path, second: Path, full: Path, *, seed: int = 0) -> dict[str, Estimate]:
    """What `second` is as a share of `first`, by name, from metrics files of three rows; `full` is full
    precision's.

    `NAME, of the loss`: (second - first) / (full - first), 1 is all of it back. Where there are enough images
    for Fréchet distances also `fid_to_fp_unpaired, ratio`, `fid_to_fp_unpaired, excess over the floor` and
    `fid_to_real, excess`: second over first. Intervals of 95 % by a jackknife over groups of prompts.
    Raises UserError for rows that were not measured alike, or whose per-image data cannot be read.
    """
    for path in (first, second):
        check_alike(full, path)
    a, b, fp = (_tensors(path) for path in (first, second, full))
    count = len(fp["features_a"])
    labels = prompt_groups(count, seed)
    found: dict[str, Estimate] = {}

    def add(name: str, ratio: Callable[[Mask], float]) -> None:
        estimate = group_jackknife(ratio, labels)
        if np.isfinite([estimate.value, estimate.lo, estimate.hi]).all():
            found[name] = estimate

    for name in _SCORES:
        if all(name in one for one in (a, b, fp)):
            values = [one[name].double().numpy() for one in (a, b, fp)]
            add(f"{name}, of the loss", _share(*values))
    if count < FEWEST_FOR_FRECHET:
        return found
    if all("features_b" in one for one in (a, b, fp)):
        seen, base = (a["features_b"], b["features_b"], fp["features_b"]), fp["features_a"]
        add("fid_to_fp_unpaired, ratio", _ratio(seen[:2], base))
        add("fid_to_fp_unpaired, excess over the floor", _ratio(seen[:2], base, seen[2]))
    if "features_real" in fp:
        add(
            "fid_to_real, excess",
            _ratio((a["features_a"], b["features_a"]), fp["features_real"], fp["features_a"]),
        )
    return found


def _share(
    first: NDArray[np.float64], second: NDArray[np.float64], full: NDArray[np.float64]
) -> Callable[[Mask], float]:
    def share(kept: Mask) -> float:
        return _divided((second[kept] - first[kept]).mean(), (full[kept] - first[kept]).mean())

    return share


def _ratio(pair: tuple[Tensor, ...], to: Tensor, floor: Tensor | None = None) -> Callable[[Mask], float]:
    """Distance of the second of a pair over that of the first, each less that of the floor."""

    def ratio(kept: Mask) -> float:
        mask = torch.from_numpy(kept)
        low = 0.0 if floor is None else distances.frechet(floor[mask], to[mask])
        of_first, of_second = (distances.frechet(one[mask], to[mask]) - low for one in pair)
        return _divided(of_second, of_first)

    return ratio


def _divided(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _tensors(metrics: Path) -> dict[str, Tensor]:
    path = metrics.with_suffix(".safetensors")
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as fault:
        raise UserError(
            f"{path}: per-image data cannot be read ({str(fault)[:200]}); run halftone metrics again"
        ) from None
