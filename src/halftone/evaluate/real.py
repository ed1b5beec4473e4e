"""Real images, which `fid_to_real` compares a model's with: renders, or the user's own.

Captions of scenes stand for their renders. A model without text says by `real_images` what its images are
like: `scenes` (renders of one object at 32x32), or a folder or zip of images.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from halftone.errors import UserError
from halftone.evaluate.features import Images
from halftone.scenes import uncond
from halftone.scenes.grammar import Scene
from halftone.scenes.render import render
from halftone.settings import RENDERS, PromptSet
from halftone.unconditional import first_id

SEED = 1 << 41  # of renders that stand for real images: outside every seed of training
_KINDS = (".png", ".jpg", ".jpeg", ".webp")
_LARGEST = 1 << 28  # bytes of one image


def renders(scenes: Sequence[Scene]) -> Images:
    """Renders of the prompts' scenes."""
    return render(scenes, np.arange(len(scenes), dtype=np.int64) + SEED)


def read_real(setting: str | None, like: Images, image_set: PromptSet | None) -> Images | None:
    """As many real images as there are in `like` [n, h, w, 3], of its size; None where none are named.

    image_set: of a model without text; every set gets renders of its own. Raises UserError for too few, or of
    another size: how they are cut and scaled to it changes the distance, and is not ours to choose.
    """
    count, height, width = like.shape[:3]
    if setting is None:
        return None
    if setting == RENDERS:
        if image_set is None:
            raise UserError(f"real_images {RENDERS}: for a model without text; captions have their renders")
        if (height, width) != (uncond.SIDE, uncond.SIDE):
            raise UserError(
                f"real_images {RENDERS}: renders are {uncond.SIDE}x{uncond.SIDE}, the images "
                f"{width}x{height}; name a folder or zip of images"
            )
        return uncond.pictures(count, np.random.default_rng([SEED, first_id(image_set)]))
    found = np.empty((count, height, width, 3), np.uint8)
    read = 0
    for name, image in _images(Path(setting)):
        if read == count:
            break
        if image.shape != like.shape[1:]:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise UserError(f"{setting}: {name} is {size}, the model's images {width}x{height}; resize it")
        found[read] = image
        read += 1
    if read < count:
        raise UserError(f"{setting}: holds {read} images, as many as the model's are needed: {count}")
    return found


def _images(path: Path) -> Iterator[tuple[str, Images]]:
    """Name and pixels (h, w, 3) of the images in a folder or zip, by name."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in _KINDS):
            with file.open("rb") as stream:
                yield file.name, _pixels(stream, f"{file}")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if n.lower().endswith(_KINDS)):
                if archive.getinfo(name).file_size > _LARGEST:
                    raise UserError(f"{path}: {name[:100]!r} is larger than an image")
                yield name, _pixels(io.BytesIO(archive.read(name)), f"{path}: {name[:100]}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such folder or zip of real images; correct real_images") from None
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as fault:
        raise UserError(f"{path}: not a folder or zip of images ({fault})") from None


def _pixels(stream: BinaryIO | io.BytesIO, where: str) -> Images:
    try:
        with Image.open(stream) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise UserError(f"{where}: not an image ({fault}); remove it") from None
