"""Fréchet and kernel distances against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from halftone.evaluate import distances


def gaussian(mean: list[float], variance: list[float], count: int = 64) -> Tensor:
    """Features with exactly this mean and diagonal covariance (count - 1 in the denominator)."""
    draws = np.random.default_rng(0).normal(size=(count, len(mean)))
    draws -= draws.mean(0)
    white = draws @ np.linalg.inv(np.linalg.cholesky(np.cov(draws.T).reshape(len(mean), -1))).T
    return torch.from_numpy(white * np.sqrt(variance) + mean)


def test_frechet_of_two_normals() -> None:
    """N(0, 1) and N(3, 4): 9 + 1 + 4 - 2 x 2."""
    assert distances.frechet(gaussian([0], [1]), gaussian([3], [4])) == pytest.approx(10, abs=1e-6)


def test_frechet_of_two_diagonal_gaussians() -> None:
    """Covariances diag(1, 4) and diag(4, 9), means (1, 2) apart: 5 + 1 + 1."""
    a, b = gaussian([0, 0], [1, 4]), gaussian([1, 2], [4, 9])
    assert distances.frechet(a, b) == pytest.approx(7, abs=1e-6)
    assert distances.frechet(b, a) == pytest.approx(7, abs=1e-6)


def test_frechet_of_a_set_to_itself_is_zero() -> None:
    features = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    assert distances.frechet(features, features) == 0.0
    assert distances.frechet(features[torch.randperm(100)], features) == pytest.approx(0, abs=1e-8)


def test_kernel_is_unbiased() -> None:
    """Two samples of one distribution: about zero, on either side of it; of two distributions: above it."""
    rng = torch.Generator().manual_seed(1)
    same = [
        distances.kernel(torch.randn(60, 8, generator=rng), torch.randn(60, 8, generator=rng))
        for _ in range(40)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(40)
    assert min(same) < 0 < max(same)
    apart = distances.kernel(torch.randn(60, 8, generator=rng) + 0.5, torch.randn(60, 8, generator=rng))
    assert apart > max(same)


def test_kernel_of_many_features_is_drawn_from_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "SUBSET", 50)
    rng = torch.Generator().manual_seed(2)
    a, b = torch.randn(60, 4, generator=rng), torch.randn(60, 4, generator=rng)
    before = torch.random.get_rng_state()
    assert distances.kernel(a, b, seed=1) == distances.kernel(a, b, seed=1) != distances.kernel(a, b, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_inception_score_of_sure_and_varied_classes() -> None:
    """Sure of one of ten classes each: 10. The same answer everywhere: 1."""
    sure = 50 * torch.eye(10).repeat(200, 1)
    assert distances.inception_score(sure) == pytest.approx(10, rel=0.1)
    assert distances.inception_score(sure[:1].repeat(20, 1)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("measure", [distances.frechet, distances.kernel])
def test_refuses_features_of_two_networks(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match="of one network"):
        measure(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="at least two"):
        measure(torch.zeros(1, 3), torch.zeros(1, 3))
