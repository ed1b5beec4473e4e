"""Rows are read from all of their shards, and compared only where they belong side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halftone.errors import UserError
from halftone.evaluate.images import check_belong, read_images
from halftone.plan import Execution
from halftone.shards import SeedSet, ShardIndex, slice_of, write_shard


def index(shard: int = 0, n_shards: int = 1, **changes: Any) -> ShardIndex:
    ids = slice_of(5, shard, n_shards)
    facts: dict[str, Any] = {
        "shard": shard,
        "n_shards": n_shards,
        "first": ids.start,
        "count": len(ids),
        "n_images": 5,
        "seeds": {SeedSet.A: 1, SeedSet.B: 2},
        "height": 8,
        "width": 8,
        "model": "m",
        "model_sha256": "1" * 64,
        "artefact_sha256": None,
        "execution": Execution.FLOAT,
        "recipe": "fp",
        "bits": None,
        "prompts_sha256": "2" * 64,
        "steps": 25,
        "guidance": 6.0,
        "lanes": 8,
        "scheduler": "PNDMScheduler",
        "halftone": "0",
        "torch": "0",
        "diffusers": "0",
    }
    return ShardIndex(**{**facts, **changes})


def store(path: Path, described: ShardIndex) -> Path:
    """Image of prompt k: level 10 k in seed set A, 10 k + 1 in B."""
    images = (
        (s, k, np.full((8, 8, 3), 10 * k + (s is SeedSet.B), np.uint8))
        for s in sorted(described.seeds)
        for k in described.ids
    )
    write_shard(path, described, images)
    return path


def test_shards_are_joined_in_the_order_of_prompts(tmp_path: Path) -> None:
    paths = [store(tmp_path / f"{k}.zip", index(k, 2)) for k in (1, 0)]
    images, first = read_images(paths)
    assert images.a[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]
    assert images.b is not None
    assert images.b[:, 0, 0, 0].tolist() == [1, 11, 21, 31, 41]
    assert first.shard == 0


def test_shards_that_make_no_row_are_refused(tmp_path: Path) -> None:
    whole = [store(tmp_path / f"{k}.zip", index(k, 2)) for k in (0, 1)]
    with pytest.raises(UserError, match="1 shards of 2"):
        read_images(whole[:1])
    with pytest.raises(UserError, match="is shard 1, 0 is missing"):
        read_images(whole[1:])
    with pytest.raises(UserError, match="every shard once"):
        read_images([whole[0], whole[0]])
    other = store(tmp_path / "other.zip", index(1, 2, recipe="minmax"))
    with pytest.raises(UserError, match="recipe differs"):
        read_images([whole[0], other])
    with pytest.raises(UserError, match="no shards"):
        read_images([])
    other_noise = store(tmp_path / "alone.zip", index(seeds={SeedSet.B: 1}))
    with pytest.raises(UserError, match="no images of seed set a"):
        read_images([other_noise])


def test_a_paired_row_has_no_other_noise(tmp_path: Path) -> None:
    images, _ = read_images([store(tmp_path / "alone.zip", index(seeds={SeedSet.A: 1}))])
    assert images.b is None
    assert images.latents is None


def test_rows_that_do_not_compare_are_refused() -> None:
    check_belong(index(recipe="minmax", artefact_sha256="3" * 64), index(), "2" * 64)
    for changes in ({"steps": 10}, {"model_sha256": "4" * 64}, {"seeds": {SeedSet.A: 3, SeedSet.B: 4}}):
        with pytest.raises(UserError, match=f"{next(iter(changes))} is .* sample both alike"):
            check_belong(index(**changes), index(), "2" * 64)
    with pytest.raises(UserError, match="images of full precision"):
        check_belong(index(), index(recipe="minmax", artefact_sha256="3" * 64), "2" * 64)
    with pytest.raises(UserError, match="other prompts"):
        check_belong(index(), index(), "5" * 64)
