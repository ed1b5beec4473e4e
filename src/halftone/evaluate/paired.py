"""How far each image is from the full-precision image of the same prompt and noise, in pixels.

The perceptual distance belongs to the feature network (`features.FeatureNetwork.perceptual`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from halftone.evaluate.features import Images, in_batches

MOST_PSNR = 100.0  # dB: stands for identical images, whose ratio is infinite


def _same_shape(images: Images, reference: Images) -> None:
    if images.shape != reference.shape:
        raise ValueError(f"paired images differ in shape: {list(images.shape)} and {list(reference.shape)}")


def psnr(images: Images, reference: Images) -> Tensor:
    """Peak signal-to-noise ratio of each pair [n], in dB, at most `MOST_PSNR`.

    ValueError for unequal shapes.
    """
    _same_shape(images, reference)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        found = peak_signal_noise_ratio(a.float(), b.float(), 255.0, reduction="none", dim=(1, 2, 3))
        return torch.nan_to_num(found, nan=MOST_PSNR).clamp(max=MOST_PSNR)

    return in_batches(ratio, images, reference)


def ssim(images: Images, reference: Images) -> Tensor:
    """Structural similarity of each pair [n], Gaussian window of 1.5 pixels.

    ValueError for unequal shapes.
    """
    _same_shape(images, reference)

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        # in float32 the variance of a flat area is lost in rounding, and identical images score 0.9999
        found = structural_similarity_index_measure(
            a.double(), b.double(), reduction="none", data_range=255.0
        )
        assert isinstance(found, Tensor)
        return found.reshape(-1)

    return in_batches(similarity, images, reference)
