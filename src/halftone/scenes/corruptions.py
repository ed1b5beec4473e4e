"""Six kinds of damage with a strength from 0 (none) to 1, the same on every call.

The feature network learns to see them, and the tests of the distances raise them step by step.
Pictures are uint8 [n, h, w, 3]. Strength is one number or one per picture, and seeds fix all chance,
so that raising the strength makes more of the same damage.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from halftone.scenes.render import Pixels

Floats = NDArray[np.float32]


class Corruption(StrEnum):
    NOISE = "noise"  # white, per pixel and channel
    BLUR = "blur"  # Gaussian
    COLOUR = "colour"  # one offset for the whole picture, in a random direction
    DELETION = "deletion"  # a disc about a point of an object takes the ground's colour
    CHECKERBOARD = "checkerboard"  # every second pixel lighter and darker, as of a badly tuned upsampler
    BLOCKS = "blocks"  # coarse quantization of the 8x8 cosine coefficients


CORRUPTIONS = tuple(Corruption)
NOISE_LEVELS = 36.0  # standard deviation at strength 1
BLUR_PIXELS = 1.8  # standard deviation at strength 1
COLOUR_LEVELS = 60.0  # length of the offset at strength 1
DELETION_PIXELS = 14.0  # radius of the disc at strength 1
CHECKER_LEVELS = 30.0  # amplitude at strength 1
BLOCK_STEP = 120.0  # step of the coefficients at strength 1
BLOCK = 8
_OBJECT_LEVELS = 60.0  # distance from the ground beyond which a pixel is taken for an object's


def _rng(kind: Corruption, seed: int) -> np.random.Generator:
    return np.random.default_rng([CORRUPTIONS.index(kind), seed])


def _cosines() -> Floats:
    """The orthonormal DCT-II matrix [frequency, place]."""
    k, x = np.arange(BLOCK)[:, None], np.arange(BLOCK)[None, :]
    matrix = np.cos(np.pi * (2 * x + 1) * k / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    matrix[0] /= np.sqrt(2)
    return np.asarray(matrix, np.float32)


def _blocks(image: Floats, step: float) -> Floats:
    """Coefficients of each block rounded to a step that grows with frequency."""
    h, w, _ = image.shape
    cosines = _cosines()
    parts = image.reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK, 3).transpose(0, 2, 4, 1, 3)
    frequency = np.add.outer(np.arange(BLOCK), np.arange(BLOCK)).astype(np.float32) / (2 * BLOCK - 2)
    steps = np.float32(max(step, 1e-3)) * (np.float32(0.25) + frequency)
    rounded = np.rint(cosines @ parts @ cosines.T / steps) * steps
    return np.asarray((cosines.T @ rounded @ cosines).transpose(0, 3, 1, 4, 2).reshape(h, w, 3), np.float32)


def _delete(image: Floats, radius: float, rng: np.random.Generator) -> Floats:
    frame = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3)])
    ground = np.median(frame, axis=0)
    ys, xs = np.nonzero(np.linalg.norm(image - ground, axis=-1) > _OBJECT_LEVELS)
    at = rng.random()
    if len(ys) == 0:
        return image
    y, x = ys[int(at * len(ys))], xs[int(at * len(xs))]
    rows, columns = np.indices(image.shape[:2])
    gone = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return np.where(gone[..., None], ground, image).astype(np.float32)


def _one(image: Floats, kind: Corruption, strength: float, seed: int) -> Floats:
    rng = _rng(kind, seed)
    match kind:
        case Corruption.NOISE:
            return image + NOISE_LEVELS * strength * rng.standard_normal(image.shape, np.float32)
        case Corruption.BLUR:
            sigma = BLUR_PIXELS * strength
            return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
        case Corruption.COLOUR:
            way = rng.standard_normal(3, np.float32)
            return image + COLOUR_LEVELS * np.float32(strength) * way / np.linalg.norm(way)
        case Corruption.DELETION:
            return _delete(image, DELETION_PIXELS * strength, rng)
        case Corruption.CHECKERBOARD:
            sign = 1 - 2 * (np.indices(image.shape[:2]).sum(0) % 2)
            return image + np.float32(CHECKER_LEVELS * strength) * sign[..., None].astype(np.float32)
        case Corruption.BLOCKS:
            return _blocks(image, BLOCK_STEP * strength)


def corrupt(
    images: Pixels, kind: Corruption, strength: float | NDArray[np.floating], seeds: NDArray[np.integer]
) -> Pixels:
    """Images with one kind of damage; where the strength is 0 they are returned as they were."""
    strengths = np.broadcast_to(np.asarray(strength, np.float64), (len(images),))
    damaged = images.copy()
    for k in np.flatnonzero(strengths):
        drawn = _one(images[k].astype(np.float32), kind, float(strengths[k]), int(seeds[k]))
        damaged[k] = np.rint(np.clip(drawn, 0, 255)).astype(np.uint8)
    return damaged
