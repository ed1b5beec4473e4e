"""The images of a row, read from its shards, and whether two rows' images belong side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halftone.errors import UserError
from halftone.evaluate.features import Images
from halftone.shards import SeedSet, ShardIndex, read_shard

# what the images of a row and of full precision must have in common
_SHARED = (
    *("n_images", "seeds", "height", "width", "model_sha256"),
    *("prompts_sha256", "steps", "guidance", "scheduler"),
)
_PER_SHARD = ("shard", "first", "count")


@dataclass(frozen=True)
class ImageSet:
    """Images of both seed sets, uint8 [n, h, w, 3], row k for prompt k; paired sets have no B, but the
    latents of A after every call, float16 [n, calls, c, h, w]."""

    a: Images
    b: Images | None
    latents: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        if self.b is not None and self.a.shape != self.b.shape:
            raise ValueError(f"seed sets differ in shape: {list(self.a.shape)} and {list(self.b.shape)}")


def read_images(paths: Sequence[Path]) -> tuple[ImageSet, ShardIndex]:
    """All shards of one row, given in any order; the index is that of the first shard.

    Raises UserError for shards that are missing, damaged, or not of one row.
    """
    if not paths:
        raise UserError("no shards of images given; name the files that halftone sample wrote")
    named = sorted(((read_shard(path), path) for path in paths), key=lambda pair: pair[0].index.first)
    first, where = named[0][0].index, named[0][1]
    for k, (shard, path) in enumerate(named):
        own, base = (i.model_dump(exclude=set(_PER_SHARD)) for i in (shard.index, first))
        if different := [name for name in own if own[name] != base[name]]:
            raise UserError(f"{path}: {different[0]} differs from {where}; give the shards of one row")
        if shard.index.shard != k:
            raise UserError(f"{path}: is shard {shard.index.shard}, {k} is missing; give every shard once")
    if len(named) != first.n_shards:
        raise UserError(f"{where}: {len(named)} shards of {first.n_shards}; give all of them")
    if SeedSet.A not in first.seeds:
        raise UserError(f"{where}: has no images of seed set a; sample it again")
    a, b = (
        np.stack([i for shard, _ in named for i in shard.images[s]]) if s in first.seeds else None
        for s in SeedSet
    )
    assert a is not None
    latents = [shard.latents for shard, _ in named if shard.latents is not None]
    return ImageSet(a, b, np.concatenate(latents) if latents else None), first


def check_belong(index: ShardIndex, reference: ShardIndex, prompts_sha256: str) -> None:
    """Refuses to compare images of different prompts, noise, schedule or model. Raises UserError."""
    if reference.artefact_sha256 is not None:
        raise UserError(f"the reference is recipe {reference.recipe}; give the images of full precision")
    for name in _SHARED:
        ours, theirs = getattr(index, name), getattr(reference, name)
        if ours != theirs:
            raise UserError(
                f"{name} is {ours} for the images and {theirs} for full precision; sample both alike"
            )
    if index.prompts_sha256 != prompts_sha256:
        raise UserError("the images were sampled for other prompts than those given; sample them again")
