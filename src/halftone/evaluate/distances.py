"""Distances between two sets of features: Fréchet and kernel, through torchmetrics.

Features are extracted once and handed to the library by a module that returns its input, so the same
features serve every distance, every jackknife replicate, and whoever recomputes a figure later.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

SUBSET = 1000  # features per kernel estimate; a smaller set is used whole
SUBSETS = 100
SPLITS = 10  # of the Inception score


class Given(nn.Module):
    """A feature network whose images are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [n, d] of one network, not {list(a.shape)} and {list(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError("a distance between distributions needs at least two images on either side")


def frechet(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to [n, d] and [m, d], in float64. ValueError for other shapes.

    Depends on n and m: compare only distances of equal counts.
    """
    _check(features, reference)
    metric = FrechetInceptionDistance(Given(features.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    # the library's matrix root leaves about 1e-12 of noise about zero, on either side
    return max(round(float(metric.compute()), 9), 0.0)


def kernel(features: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Unbiased squared maximum mean discrepancy, cubic kernel (KID). ValueError for other shapes than [n, d].

    May be below zero. Up to `SUBSET` features a side it is one estimate on all of them; above, the mean of
    `SUBSETS` seeded subsets.
    """
    _check(features, reference)
    count = min(len(features), len(reference))
    whole = len(features) == len(reference) <= SUBSET
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all features are kept in memory
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            Given(features.shape[1]), subsets=1 if whole else SUBSETS, subset_size=min(count, SUBSET)
        )
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        return float(metric.compute()[0])


def inception_score(logits: Tensor, seed: int = 0) -> float:
    """Inception score of logits [n, classes]: mean over `SPLITS` splits, in an order drawn from `seed`."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        metric = InceptionScore(Given(logits.shape[1]), splits=min(SPLITS, len(logits)))
        metric.update(logits.double())
        return float(metric.compute()[0])
