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
from halftone.evaluate.statistics import Estimate, Floats, group_jackknife, prompt_groups

_SCORES = ("alignment", "alignment_objects", "clip_score")
Mask = NDArray[np.bool_]
Share = Callable[[Mask], tuple[float, float]]
"""Numerator and denominator, of the prompts that a mask keeps."""


def recoveries(first: Path, second: Path, full: Path, *, seed: int = 0) -> dict[str, Estimate]:
    """What `second` is as a share of `first`, by name, from metrics files of three rows; `full` is full
    precision's.

    `NAME, of the loss`: (second - first) / (full - first), 1 is all of it back. Where there are enough images
    for Fréchet distances also `fid_to_fp_unpaired, ratio`, `fid_to_fp_unpaired, excess over the floor` and
    `fid_to_real, excess`: second over first. Intervals of 95 % by a jackknife over groups of prompts. Where
    the first row's loss cannot be told from none, its shares are left out.
    Raises UserError for rows that were not measured alike, or whose per-image data cannot be read.
    """
    for path in (first, second):
        check_alike(full, path)
    a, b, fp = (_tensors(path) for path in (first, second, full))
    count = len(fp["features_a"])
    labels = prompt_groups(count, seed)
    found: dict[str, Estimate] = {}

    def add(name: str, share: Share, always: bool = False) -> None:
        if always or group_jackknife(lambda kept: share(kept)[1], labels).excludes_zero:
            found[name] = group_jackknife(lambda kept: np.divide(*share(kept)), labels)

    for name in _SCORES:
        if all(name in one for one in (a, b, fp)):
            values = [one[name].double().numpy() for one in (a, b, fp)]
            add(f"{name}, of the loss", _back(*values))
    if count < FEWEST_FOR_FRECHET:
        return found
    if all("features_b" in one for one in (a, b, fp)):
        seen, base = (a["features_b"], b["features_b"], fp["features_b"]), fp["features_a"]
        add("fid_to_fp_unpaired, ratio", _excess(seen[:2], base), always=True)
        add("fid_to_fp_unpaired, excess over the floor", _excess(seen[:2], base, seen[2]))
    if "features_real" in fp:
        own = a["features_a"], b["features_a"]
        add("fid_to_real, excess", _excess(own, fp["features_real"], fp["features_a"]))
    return found


def _back(first: Floats, second: Floats, full: Floats) -> Share:
    """What the second has back of a score, and what the first has lost."""
    return lambda kept: ((second[kept] - first[kept]).mean(), (full[kept] - first[kept]).mean())


def _excess(pair: tuple[Tensor, ...], to: Tensor, floor: Tensor | None = None) -> Share:
    """Distances of the second and of the first, each less that of the floor."""

    def both(kept: Mask) -> tuple[float, float]:
        mask = torch.from_numpy(kept)
        low = 0.0 if floor is None else distances.frechet(floor[mask], to[mask])
        of_first, of_second = (distances.frechet(one[mask], to[mask]) - low for one in pair)
        return of_second, of_first

    return both


def _tensors(metrics: Path) -> dict[str, Tensor]:
    path = metrics.with_suffix(".safetensors")
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as fault:
        raise UserError(
            f"{path}: per-image data cannot be read ({str(fault)[:200]}); run halftone metrics again"
        ) from None
