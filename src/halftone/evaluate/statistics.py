"""How sure a figure is: paired bootstrap, group jackknife, and the verdict against full precision.

Per-image figures (alignment, CLIP score, feature LPIPS, PSNR, SSIM) get a bootstrap over prompts. All rows
are resampled with the same prompts, so intervals of differences between rows are paired. Distances between
distributions get a jackknife over groups of prompts instead: resampling with replacement repeats images,
and that alone about doubles a Fréchet distance near its floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL = 0.95
GROUPS = 20
SAME = "not distinguishable from full precision"


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error, and its interval at some level."""

    value: float
    error: float
    lo: float
    hi: float

    @property
    def excludes_zero(self) -> bool:
        return self.lo > 0 or self.hi < 0


def bonferroni(tests: int, level: float = LEVEL) -> float:
    """Level of each of several intervals such that all hold together at `level`."""
    return 1 - (1 - level) / tests


def bootstrap(values: Floats, *, resamples: int, seed: int, level: float = LEVEL) -> Estimate:
    """Percentile interval of the mean of per-prompt values [n]; of their differences, it is a paired one.

    The prompts drawn depend on n, `resamples` and `seed` alone. ValueError without values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("no values to resample")
    rng = np.random.default_rng([seed, count])
    means = np.empty(resamples)
    for first in range(0, resamples, 256):  # bounds memory at any number of images
        block = rng.integers(count, size=(min(256, resamples - first), count))
        means[first : first + len(block)] = values[block].mean(axis=1)
    tail = (1 - level) / 2
    lo, hi = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(values.mean()), float(means.std(ddof=1)), float(lo), float(hi))


def prompt_groups(count: int, seed: int, groups: int = GROUPS) -> NDArray[np.int64]:
    """Group of each prompt: equal sizes but for one, drawn once, the same for every row."""
    return np.random.default_rng([seed, count, groups]).permutation(np.arange(count) % min(groups, count))


def group_jackknife(
    statistic: Callable[[NDArray[np.bool_]], float], labels: NDArray[np.int64], level: float = LEVEL
) -> Estimate:
    """Delete-a-group jackknife. `statistic` takes a mask [n] of the prompts to keep.

    For the difference of two rows, `statistic` computes both on the same mask, so that what they share
    cancels. A bias that depends on n alone is the same in every replicate and leaves the error untouched.
    Student's t with groups - 1 degrees of freedom. ValueError with fewer than two groups.
    """
    groups = int(labels.max()) + 1 if len(labels) else 0
    if groups < 2:
        raise ValueError("a jackknife needs at least two groups")
    whole = statistic(np.ones(len(labels), bool))
    left = np.array([statistic(labels != group) for group in range(groups)])
    error = float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    reach = float(stats.t.ppf((1 + level) / 2, groups - 1)) * error
    return Estimate(whole, error, whole - reach, whole + reach)


def verdict(differences: Mapping[str, Estimate]) -> str:
    """One line on differences to full precision whose intervals hold together (see `bonferroni`); empty where
    nothing was compared."""
    if not differences:
        return ""
    found = [name for name, difference in differences.items() if difference.excludes_zero]
    return f"differs from full precision in {', '.join(found)}" if found else SAME
