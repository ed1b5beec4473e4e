"""Shards: a zip of PNGs for a slice of the prompts, in seed sets A and B, the same bytes for the same images.

`a/00000.png` is the image of prompt 0 with the noise of seed set A; `index.json` says where all of them come
from; `a/latents.npy`, where it was asked for, holds the latents after every call, float16. Members are
stored, not compressed again, and carry no times.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from halftone.errors import UserError
from halftone.files import writing
from halftone.plan import Execution
from halftone.settings import PromptSet

Pixels = NDArray[np.uint8]
_INDEX, _LATENTS = "index.json", "a/latents.npy"
_LARGEST_INDEX = 1 << 24
_LARGEST_PNG = 1 << 28
_LARGEST_LATENTS = 1 << 32
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold


class SeedSet(StrEnum):
    """A: noise of the reference. B: disjoint noise, for unpaired figures and the floor."""

    A = "a"
    B = "b"


class ShardIndex(BaseModel):
    """Where the images of a shard come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    shard: int = Field(ge=0)
    n_shards: int = Field(ge=1)
    first: int = Field(
        ge=0,
        le=1 << 40,
        description="id of the first prompt: its line in the file, or number in its set, from 0",
    )
    count: int = Field(ge=1, le=1 << 20, description="prompts of this shard")
    n_images: int = Field(ge=1, description="images of all shards, per seed set")
    seeds: dict[SeedSet, int]
    height: int = Field(ge=1, le=1 << 14)
    width: int = Field(ge=1, le=1 << 14)
    model: str = Field(description="as the user gave it; of an artefact, the model it was made from")
    model_sha256: str = Field(description="of the full-precision denoiser's weights")
    artefact_sha256: str | None = Field(description="None where the full-precision model was sampled")
    execution: Execution
    recipe: str
    bits: str | None
    prompts_sha256: str = Field(description="of all lines of the prompt file, or of what stands for them")
    image_set: PromptSet | None = Field(None, description="of a model without text: which images these are")
    steps: int
    guidance: float | None
    lanes: int = Field(ge=1, description="images the model was run on at once")
    latent_calls: int = Field(0, ge=0, le=10_000, description="calls whose latents are kept; 0: none")
    scheduler: str
    halftone: str = Field(description="version")
    torch: str = Field(description="version")
    diffusers: str = Field(description="version")

    @property
    def ids(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class Shard:
    """images[seed set][k]: uint8 (height, width, 3) of prompt index.ids[k]."""

    index: ShardIndex
    images: dict[SeedSet, list[Pixels]]
    latents: NDArray[np.float16] | None = None
    """(count, calls, channels, height, width), of seed set A."""

    def image(self, seed_set: SeedSet, prompt: int) -> Pixels:
        return self.images[seed_set][self.index.ids.index(prompt)]


def slice_of(n_images: int, shard: int, n_shards: int) -> range:
    """Prompt ids of shard `shard` of `n_shards`: contiguous, of sizes that differ by one at most."""
    if not 0 <= shard < n_shards:
        raise UserError(f"shard {shard} of {n_shards}: shards count from 0 to {n_shards - 1}")
    if n_shards > n_images:
        raise UserError(f"{n_shards} shards of {n_images} images: use {n_images} shards or fewer")
    return range(shard * n_images // n_shards, (shard + 1) * n_images // n_shards)


def write_shard(
    path: Path | str,
    index: ShardIndex,
    images: Iterable[tuple[SeedSet, int, Pixels]],
    latents: Callable[[], NDArray[np.float16]] | None = None,
) -> None:
    """Write a shard as its images come: (seed set, prompt id, uint8 (height, width, 3)).

    latents: asked for once all images have come, where the index says that there are some.
    The file is whole or absent. Raises ValueError where the images are not those of the index, in its order.
    """
    expected = [(seed_set, k) for seed_set in sorted(index.seeds) for k in index.ids]
    written = 0
    with writing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        _store(archive, _INDEX, _index_bytes(index))
        for seed_set, prompt, image in images:
            if written == len(expected) or (seed_set, prompt) != expected[written]:
                raise ValueError(f"image {seed_set}/{prompt} is not next in the index")
            if image.shape != (index.height, index.width, 3) or image.dtype != np.uint8:
                raise ValueError(f"image {seed_set}/{prompt} is {image.dtype} {image.shape}")
            _store(archive, _member(seed_set, prompt), _png(image))
            written += 1
        if written != len(expected):
            raise ValueError(f"{written} images for an index of {len(expected)}")
        if index.latent_calls and latents is not None:
            stream = io.BytesIO()
            np.save(stream, latents(), allow_pickle=False)
            _store(archive, _LATENTS, stream.getvalue())


def read_shard(path: Path | str) -> Shard:
    """Raises UserError for a file that is missing, damaged, incomplete, or holds anything else."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run halftone sample first") from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as fault:
        raise UserError(f"{path}: damaged ({fault}); remove it and run halftone sample again") from None


def _read(path: Path, archive: zipfile.ZipFile) -> Shard:
    members = {info.filename: info for info in archive.infolist()}
    if len(members) != len(archive.infolist()) or _INDEX not in members:
        raise UserError(f"{path}: not a shard of images; run halftone sample again")
    for info in members.values():
        limit = {_INDEX: _LARGEST_INDEX, _LATENTS: _LARGEST_LATENTS}.get(info.filename, _LARGEST_PNG)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise UserError(f"{path}: {info.filename[:100]!r} is not as halftone stores it; do not trust it")
    content = archive.read(_INDEX)
    try:
        index = ShardIndex.model_validate_json(content)
    except ValidationError as fault:
        error = fault.errors()[0]
        where = ".".join(str(part) for part in error["loc"])
        raise UserError(f"{path}: {_INDEX}: {where}: {error['msg']}; run halftone sample again") from None
    wanted = {_member(seed_set, k) for seed_set in index.seeds for k in index.ids} | {_INDEX}
    wanted |= {_LATENTS} if index.latent_calls else set()
    for problem, names in (("lacks", wanted - set(members)), ("has the unknown", set(members) - wanted)):
        if names:
            raise UserError(f"{path}: {problem} {min(names)[:100]!r}; run halftone sample again")
    images = {
        seed_set: [_pixels(path, archive, _member(seed_set, k), index) for k in index.ids]
        for seed_set in sorted(index.seeds)
    }
    return Shard(index, images, _latents(archive, index) if index.latent_calls else None)


def _latents(archive: zipfile.ZipFile, index: ShardIndex) -> NDArray[np.float16]:
    found = np.load(io.BytesIO(archive.read(_LATENTS)), allow_pickle=False)
    if found.dtype != np.float16 or found.ndim != 5 or found.shape[:2] != (index.count, index.latent_calls):
        raise ValueError(f"{_LATENTS}: {found.dtype} {found.shape}, against the index")
    return found


def _pixels(path: Path, archive: zipfile.ZipFile, name: str, index: ShardIndex) -> Pixels:
    try:
        with Image.open(io.BytesIO(archive.read(name)), formats=["PNG"]) as image:
            if image.size != (index.width, index.height) or image.mode != "RGB":
                raise UserError(
                    f"{path}: {name} is {image.size} {image.mode}, against the index; sample again"
                )
            return np.asarray(image, dtype=np.uint8)
    except (UnidentifiedImageError, SyntaxError) as fault:
        raise ValueError(f"{name}: {fault}") from None


def _store(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, date_time=_EPOCH)
    info.create_system = 3
    info.external_attr = 0o644 << 16
    archive.writestr(info, content)


def _member(seed_set: SeedSet, prompt: int) -> str:
    return f"{seed_set.value}/{prompt:05d}.png"


def _index_bytes(index: ShardIndex) -> bytes:
    fields: dict[str, Any] = index.model_dump(mode="json")
    return (json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _png(image: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, format="PNG")
    return stream.getvalue()
