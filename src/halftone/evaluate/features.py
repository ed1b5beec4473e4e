"""Feature networks behind FID, KID and the perceptual distance, by the setting `metrics.features`.

`scenes`: the network that ships with the embedded models, offline. `inception`: torch-fidelity's
Inception-v3 (the TensorFlow weights that published FID figures use) and torchmetrics' LPIPS (AlexNet);
both fetch weights once. Images are uint8 [n, h, w, 3].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halftone.errors import UserError
from halftone.files import sha256
from halftone.scenes import feature_net
from halftone.scenes.render import SIDE

Images = NDArray[np.uint8]

BATCH = 64


def channels_first(images: Images) -> Tensor:
    """uint8 [n, h, w, 3] -> uint8 [n, 3, h, w]. ValueError for anything else."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [n, h, w, 3], not {images.dtype} {list(images.shape)}")
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def in_batches(compute: Callable[..., Tensor], *images: Images) -> Tensor:
    """Applies `compute` to batches of uint8 [b, 3, h, w] of every array, and joins the results."""
    count = len(images[0])
    if not count:
        raise ValueError("no images to measure")
    slices = [slice(at, at + BATCH) for at in range(0, count, BATCH)]
    return torch.cat([compute(*(channels_first(part[s]) for part in images)) for s in slices])


class FeatureNetwork(ABC):
    """`name` goes into the column `features`: rows of different names are never compared."""

    name: str

    @abstractmethod
    def features(self, images: Images) -> Tensor:
        """float32 [n, d]."""

    @abstractmethod
    def perceptual(self, images: Images, reference: Images) -> Tensor:
        """Distance of each image to the one it is paired with: float32 [n]."""

    def logits(self, images: Images) -> Tensor | None:
        """Class scores [n, classes] for the Inception score, where the network has them."""
        return None


class ScenesFeatures(FeatureNetwork):
    """The scenes feature network; its perceptual distance is `feature_lpips`.

    It was made for 64x64: the 32x32 images of the unconditional model are doubled, every pixel four times.
    """

    def __init__(self, folder: Path = feature_net.FOLDER) -> None:
        self._network = feature_net.load(folder)
        self.name = f"scenes-{sha256(folder / feature_net.WEIGHTS)[:8]}"

    def features(self, images: Images) -> Tensor:
        return in_batches(lambda batch: self._network(_at_size(batch)), images)

    def perceptual(self, images: Images, reference: Images) -> Tensor:
        def maps(batch: Tensor) -> list[Tensor]:
            return self._network.maps(_at_size(batch))

        return in_batches(lambda a, b: feature_lpips(maps(a), maps(b)), images, reference)


def _at_size(batch: Tensor) -> Tensor:
    """uint8 [b, 3, h, w]: half the size that the network was made for becomes that size."""
    if batch.shape[2:] == (SIDE // 2, SIDE // 2):
        return batch.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return batch


def feature_lpips(maps: list[Tensor], reference: list[Tensor]) -> Tensor:
    """LPIPS without learned weights on any network's feature maps [b, c, h, w]: [b].

    At each layer the squared difference of unit-length feature vectors, averaged over places and layers.
    Equal weights are our choice: there are no human judgements of scenes to fit them to.
    """
    layers = []
    for ours, theirs in zip(maps, reference, strict=True):
        a, b = (m / m.square().sum(1, keepdim=True).add(1e-10).sqrt() for m in (ours, theirs))
        layers.append((a - b).square().sum(1).mean((1, 2)))
    return torch.stack(layers).mean(0)


class InceptionFeatures(FeatureNetwork):
    """2048 pool features and the logits of Inception-v3, as torch-fidelity computes them."""

    name = "inception-v3-compat"

    def __init__(self) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self._network: Any = _fetch(
            lambda: FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]),
            "Inception-v3 weights (weights-inception-2015-12-05-6726825d.pth of torch-fidelity)",
        )
        self._perceptual: Any = None

    def features(self, images: Images) -> Tensor:
        return in_batches(lambda batch: self._network(batch)[0], images)

    def logits(self, images: Images) -> Tensor:
        return in_batches(lambda batch: self._network(batch)[1], images)

    def perceptual(self, images: Images, reference: Images) -> Tensor:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        if self._perceptual is None:
            self._perceptual = _fetch(
                lambda: LearnedPerceptualImagePatchSimilarity("alex"),
                "AlexNet weights (torchvision), for LPIPS",
            )
        network = self._perceptual.net
        return in_batches(lambda a, b: network(a / 127.5 - 1, b / 127.5 - 1).flatten(), images, reference)


def _fetch(build: Callable[[], Any], what: str) -> Any:
    """Builds a network whose weights the library downloads once. UserError when they cannot be had."""
    try:
        return build()
    except (OSError, RuntimeError) as fault:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"metrics.features: inception: cannot load {what}: {fault}; connect once, "
            f"or put the file into {folder}, or set metrics.features: scenes"
        ) from None


def open_network(setting: str) -> FeatureNetwork:
    """The network of `metrics.features`. UserError when its weights cannot be had."""
    match setting:
        case "scenes":
            return ScenesFeatures()
        case "inception":
            return InceptionFeatures()
        case _:
            raise UserError(f"metrics.features: {setting!r} is unknown; choose scenes or inception")
