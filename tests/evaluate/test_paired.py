"""Pixel distances between paired images."""

from __future__ import annotations

import numpy as np
import pytest

from halftone.evaluate import paired
from halftone.evaluate.features import channels_first, in_batches


def images(count: int = 3, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 230, (count, side, side, 3)).astype(np.uint8)


def test_psnr_of_a_known_error() -> None:
    """Off by 5 levels everywhere: 20 log10(255 / 5)."""
    found = paired.psnr(images() + 5, images())
    assert found.tolist() == pytest.approx([20 * np.log10(51)] * 3, abs=1e-4)


def test_identical_images() -> None:
    assert paired.psnr(images(), images()).tolist() == [paired.MOST_PSNR] * 3
    flat = np.full((1, 32, 32, 3), 180, np.uint8)
    assert paired.ssim(images(), images()).tolist() == pytest.approx([1.0] * 3, abs=1e-9)
    assert paired.ssim(flat, flat).tolist() == pytest.approx([1.0], abs=1e-9)


def test_each_pair_by_itself() -> None:
    off = images()
    off[1] //= 2
    for measure, same in ((paired.psnr, paired.MOST_PSNR), (paired.ssim, 1.0)):
        found = measure(off, images()).tolist()
        assert found[0] == found[2] == pytest.approx(same)
        assert found[1] < found[0]
        assert measure(off[1:2], images()[1:2]).tolist() == pytest.approx(found[1:2])


def test_unequal_shapes_are_refused() -> None:
    for measure in (paired.psnr, paired.ssim):
        with pytest.raises(ValueError, match="differ in shape"):
            measure(images(2), images(3))


def test_batches_keep_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from halftone.evaluate import features

    monkeypatch.setattr(features, "BATCH", 2)
    found = in_batches(lambda batch: batch.float().mean((1, 2, 3)), images(5))
    assert found.tolist() == pytest.approx(images(5).mean((1, 2, 3)).tolist(), rel=1e-5)
    with pytest.raises(ValueError, match="no images"):
        in_batches(lambda batch: batch.float(), images(0))
    with pytest.raises(ValueError, match="must be uint8"):
        channels_first(images().astype(np.float32))
