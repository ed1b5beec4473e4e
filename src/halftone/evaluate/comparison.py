"""Figures with intervals, on prompts that are grouped and resampled alike in every row.

A figure of one row is compared with the same figure of a base row by dropping the same prompts from
both, so what the two rows share (noise, prompts, the reference) cancels in the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halftone.evaluate import distances
from halftone.evaluate.statistics import (
    LEVEL,
    Estimate,
    bonferroni,
    bootstrap,
    group_jackknife,
    prompt_groups,
)

FEWEST_FOR_FRECHET = 500  # images: below, only the kernel distance is shown
FEWEST_FOR_KERNEL = 4

Values = NDArray[np.float64]
Pair = tuple[Tensor, Tensor]  # features [n, d] and those they are compared with, both by prompt
Distance = Callable[[Tensor, Tensor], float]
NOTHING = Estimate(0.0, 0.0, 0.0, 0.0)  # the distance of a set of images to itself


@dataclass(frozen=True)
class Seen:
    """What is measured on one set of images: per-image values by column, features, and logits."""

    features: Tensor
    values: dict[str, Values]
    logits: Tensor | None


class Comparison:
    """For `count` prompts; `real`: features of real images by prompt, where there are any."""

    def __init__(self, count: int, real: Tensor | None, resamples: int, seed: int) -> None:
        self.count, self.real = count, real
        self._resamples, self._seed = resamples, seed
        self._labels = prompt_groups(count, seed)

    def means(self, values: Mapping[str, Values]) -> dict[str, Estimate | None]:
        """Mean of each column, with a bootstrap interval."""
        return {n: bootstrap(v, resamples=self._resamples, seed=self._seed) for n, v in values.items()}

    def own(self, seen: Seen) -> dict[str, Estimate | None]:
        """What needs no other row: means, the Inception score, and the distance to real images."""
        figures = self.means(seen.values)
        if seen.logits is not None:
            logits = seen.logits
            figures["inception_score"] = group_jackknife(
                lambda kept: distances.inception_score(logits[torch.from_numpy(kept)], self._seed),
                self._labels,
            )
        if self.real is not None:
            figures["fid_to_real"] = self.frechet((seen.features, self.real))
        return figures

    def frechet(self, pair: Pair, base: Pair | None = None) -> Estimate | None:
        """Fréchet distance of a pair; None for too few images.

        With a base pair, the interval is that of the difference to its distance, shown about the value.
        """
        if self.count < FEWEST_FOR_FRECHET:
            return None
        found = self._difference(distances.frechet, pair, base)
        if base is None:
            return found
        value = distances.frechet(*pair)
        shift = value - found.value
        return Estimate(value, found.error, found.lo + shift, found.hi + shift)

    def kernel(self, pair: Pair) -> Estimate | None:
        """Kernel distance of a pair; None for too few images."""
        return None if self.count < FEWEST_FOR_KERNEL else self._difference(distances.kernel, pair)

    def differences(
        self, seen: Seen, fp: Seen, other: Tensor | None, fp_other: Tensor | None
    ) -> dict[str, Estimate]:
        """The differences to full precision that a verdict rests on.

        They are the excess of the unpaired distance over the floor (Fréchet, or kernel where images are few),
        alignment, and CLIP score; without prompts only the first. other, fp_other: features of seed set B,
        None where only paired figures are wanted. The intervals hold all at once, so that a verdict on
        several figures is wrong no more often than one on a single figure.
        """
        names = [n for n in ("alignment", "clip_score") if n in seen.values]
        distance: tuple[str, Distance] | None = None
        if other is None or fp_other is None:
            distance = None
        elif self.count >= FEWEST_FOR_FRECHET:
            distance = "fid_excess", distances.frechet
        elif self.count >= FEWEST_FOR_KERNEL:
            distance = "kid_excess", distances.kernel
        level = bonferroni(max(1, len(names) + (distance is not None)))
        found = {}
        if distance is not None and other is not None and fp_other is not None:
            pair, floor = (other, fp.features), (fp_other, fp.features)
            found[distance[0]] = self._difference(distance[1], pair, floor, level)
        for name in names:
            off = seen.values[name] - fp.values[name]
            found[name] = bootstrap(off, resamples=self._resamples, seed=self._seed, level=level)
        return found

    def _difference(
        self, distance: Distance, pair: Pair, base: Pair | None = None, level: float = LEVEL
    ) -> Estimate:
        def statistic(kept: NDArray[np.bool_]) -> float:
            mask = torch.from_numpy(kept)
            value = distance(pair[0][mask], pair[1][mask])
            return value if base is None else value - distance(base[0][mask], base[1][mask])

        return group_jackknife(statistic, self._labels, level)
