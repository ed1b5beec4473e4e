"""Two sets of images of the same prompts and noise, image by image: those of two executions, say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halftone.compare import Change
from halftone.evaluate import alignment, paired
from halftone.evaluate.features import FeatureNetwork, Images
from halftone.evaluate.images import check_belong, read_images
from halftone.evaluate.scenario import texts_of
from halftone.evaluate.statistics import bootstrap
from halftone.prompts import prompts_sha256

RARE = 5
"""Percentile of the PSNR that is given beside its median."""


@dataclass(frozen=True)
class ImageParity:
    """How far apart two sets are: in what is measured of them, and in pixels (PSNR in dB, 100 if identical).

    changes: alignment, where the prompts say what can be checked, and perceptual distance to full precision.
    """

    count: int
    identical: int
    changes: tuple[Change, ...]
    psnr_median: float
    psnr_rare: float

    @property
    def distinguishable(self) -> tuple[str, ...]:
        """Figures whose paired interval of 95 % leaves out zero."""
        return tuple(change.name for change in self.changes if change.clear)


def compare_images(
    first: Path,
    second: Path,
    full: Path,
    prompts: Path | None,
    network: FeatureNetwork,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> ImageParity:
    """Compare the images of seed set A of two zips. full: those of full precision; network: for distances;
    prompts: None for a model without text.

    Raises UserError for images of other prompts, noise, model or schedule than full precision's.
    """
    base, base_index = read_images([full])
    texts = texts_of(prompts, base_index)
    sets = []
    for path in (first, second):
        images, index = read_images([path])
        check_belong(index, base_index, prompts_sha256(texts))
        sets.append(images.a)
    seen = [_figures(images, base.a, texts[: len(base.a)], network) for images in sets]
    changes = []
    for name in seen[0]:
        a, b = (figures[name] for figures in seen)
        change = bootstrap(b - a, resamples=resamples, seed=seed)
        changes.append(Change(name, float(a.mean()), float(b.mean()), change.value, change.lo, change.hi))
    psnr = paired.psnr(*sets).double().numpy()
    return ImageParity(
        count=len(psnr),
        identical=int((sets[0] == sets[1]).all(axis=(1, 2, 3)).sum()),
        changes=tuple(changes),
        psnr_median=float(np.median(psnr)),
        psnr_rare=float(np.percentile(psnr, RARE)),
    )


def _figures(
    images: Images, full: Images, prompts: list[str], network: FeatureNetwork
) -> Mapping[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = {}
    scenes = alignment.scenes_of(images, prompts)
    if scenes is not None:
        found["alignment"] = alignment.check(images, scenes).everything.astype(np.float64)
    found["lpips"] = network.perceptual(images, full).double().numpy()
    return found
