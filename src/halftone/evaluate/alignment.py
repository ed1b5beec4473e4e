"""Does an image show what its prompt says? By CLIP, and on scenes exactly, by the checker.

`metrics.clip: scenes` is the small CLIP that ships with the embedded models; `ARCHITECTURE/WEIGHTS` names
any model of open_clip (`ViT-g-14/laion2b_s34b_b88k`). Both go through open_clip's own loading code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from halftone.errors import UserError
from halftone.evaluate.features import BATCH, Images
from halftone.files import sha256
from halftone.scenes import checker, metric_clip
from halftone.scenes.grammar import Scene, parse
from halftone.scenes.render import SIDE

Flags = NDArray[np.uint8]


class Clip:
    """A CLIP with its own preprocessing and tokenizer. `name` tells its scores from those of others."""

    def __init__(self, name: str, model: Any, preprocess: Any, tokenizer: Any) -> None:
        self.name, self._model, self._preprocess, self._tokenizer = name, model.eval(), preprocess, tokenizer

    @torch.inference_mode()
    def cosines(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Cosine of each image [n, h, w, 3] with its own prompt: float32 [n]."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        found = []
        for at in range(0, len(prompts), BATCH):
            pixels = torch.stack([self._preprocess(Image.fromarray(i)) for i in images[at : at + BATCH]])
            tokens = self._tokenizer(list(prompts[at : at + BATCH]))
            image = self._model.encode_image(pixels, normalize=True)
            text = self._model.encode_text(tokens, normalize=True)
            found.append((image * text).sum(-1))
        return torch.cat(found)


def clip_scores(cosines: Tensor) -> Tensor:
    """torchmetrics' scale: 100 x cosine, never below 0. (open_clip's users report the cosine itself.)"""
    return (100 * cosines).clamp(min=0)


def open_clip_model(setting: str) -> Clip:
    """The CLIP of `metrics.clip`. UserError when it is unknown or its weights cannot be had."""
    if setting == "scenes":
        folder = metric_clip.FOLDER
        if not (folder / metric_clip.WEIGHTS).exists():
            raise UserError(f"{folder}: holds no CLIP; run: python -m halftone.scenes.metric_clip {folder}")
        name = f"scenes-{sha256(folder / metric_clip.WEIGHTS)[:8]}"
        return _load(f"local-dir:{folder}", None, name, setting)
    architecture, _, weights = setting.partition("/")
    if architecture not in open_clip.list_models() or not weights:
        raise UserError(
            f"metrics.clip: {setting!r} is no open_clip model; write scenes, or ARCHITECTURE/WEIGHTS "
            "such as ViT-g-14/laion2b_s34b_b88k"
        )
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in known and not Path(weights).is_file():
        raise UserError(
            f"metrics.clip: {architecture} has no weights {weights!r}; choose one of {', '.join(known)}, "
            "or name a file"
        )
    return _load(architecture, weights, setting, setting)


def _load(model_name: str, weights: str | None, name: str, setting: str) -> Clip:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # open_clip logs to the root logger
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            model_name, pretrained=weights, require_pretrained=True
        )
        return Clip(name, model, preprocess, open_clip.get_tokenizer(model_name))
    except (OSError, RuntimeError, ValueError) as fault:
        raise UserError(
            f"metrics.clip: {setting}: cannot load the model: {fault}; connect once so that it is fetched, "
            "give a weights file as ARCHITECTURE/FILE, or set metrics.clip: scenes"
        ) from None
    finally:
        root.setLevel(level)


@dataclass(frozen=True)
class Checked:
    """The checker's verdict on each image, 0 or 1: [n]."""

    objects: Flags
    everything: Flags
    abstained: Flags


def scenes_of(images: Images, prompts: Sequence[str]) -> list[Scene] | None:
    """The scenes that the prompts ask for; None where one is no caption, or images are not 64x64."""
    if images.shape[1:3] != (SIDE, SIDE):
        return None
    try:
        return [parse(prompt) for prompt in prompts]
    except ValueError:
        return None


def check(images: Images, scenes: Sequence[Scene]) -> Checked:
    """Checks every image against its scene."""
    verdicts = [checker.check(image, scene) for image, scene in zip(images, scenes, strict=True)]
    rows = [(v.objects_right, v.all_right, v.abstained) for v in verdicts]
    objects, everything, abstained = np.array(rows, np.uint8).reshape(-1, 3).T
    return Checked(objects.copy(), everything.copy(), abstained.copy())
