from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from halftone.errors import UserError
from halftone.plan import Execution
from halftone.shards import Pixels, SeedSet, ShardIndex, read_shard, slice_of, write_shard

INDEX = ShardIndex(
    shard=1,
    n_shards=2,
    first=2,
    count=2,
    n_images=4,
    seeds={SeedSet.A: 1, SeedSet.B: 2},
    height=6,
    width=5,
    model="models/tiny",
    model_sha256="0" * 64,
    artefact_sha256=None,
    execution=Execution.FLOAT,
    recipe="fp",
    bits=None,
    prompts_sha256="1" * 64,
    steps=4,
    guidance=6.0,
    lanes=8,
    scheduler="PNDMScheduler",
    halftone="0",
    torch="0",
    diffusers="0",
)


def picture(seed_set: SeedSet, prompt: int) -> Pixels:
    rng = np.random.default_rng([ord(seed_set.value), prompt])
    return rng.integers(256, size=(6, 5, 3), dtype=np.uint8)


def pictures() -> list[tuple[SeedSet, int, Pixels]]:
    return [(s, k, picture(s, k)) for s in (SeedSet.A, SeedSet.B) for k in INDEX.ids]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_shard(tmp_path / "1-of-2.zip", INDEX, pictures())
    return tmp_path / "1-of-2.zip"


def test_round_trip_and_same_bytes(path: Path, tmp_path: Path) -> None:
    found = read_shard(path)
    assert found.index == INDEX
    for seed_set, prompt, image in pictures():
        assert np.array_equal(found.image(seed_set, prompt), image)
    write_shard(tmp_path / "again.zip", INDEX, pictures())
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()


def test_any_tool_can_read_it(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [
            "index.json",
            "a/00002.png",
            "a/00003.png",
            "b/00002.png",
            "b/00003.png",
        ]
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        with Image.open(archive.open("b/00003.png")) as image:
            assert np.array_equal(np.asarray(image), picture(SeedSet.B, 3))
        assert json.loads(archive.read("index.json"))["seeds"] == {"a": 1, "b": 2}


def test_slices_are_contiguous_and_cover_all() -> None:
    for n_images, n_shards in ((1, 1), (10, 3), (256, 4), (7, 7)):
        ids = [k for shard in range(n_shards) for k in slice_of(n_images, shard, n_shards)]
        assert ids == list(range(n_images))
    for n_images, shard, n_shards in ((4, 2, 2), (4, -1, 2), (2, 0, 3), (4, 0, 0)):
        with pytest.raises(UserError, match="shard"):
            slice_of(n_images, shard, n_shards)


@pytest.mark.parametrize(
    "images",
    [
        pictures()[:-1],
        pictures() + pictures()[:1],
        pictures()[::-1],
        [(s, k, i[:5]) for s, k, i in pictures()],
        [(s, k, i.astype(np.float32)) for s, k, i in pictures()],
    ],
)
def test_an_incomplete_shard_is_not_written(tmp_path: Path, images: list[Any]) -> None:
    with pytest.raises(ValueError, match="image"):
        write_shard(tmp_path / "out.zip", INDEX, images)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_noticed_or_changes_nothing(path: Path) -> None:
    content, sound = path.read_bytes(), read_shard(path)
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read_shard(path)
        except UserError:
            refused += 1
            continue
        assert found.index == sound.index, place  # times and flags of members mean nothing
        assert all(np.array_equal(found.image(s, k), i) for s, k, i in pictures()), place
    assert refused > 0.8 * len(content)


def test_truncated_files(path: Path) -> None:
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="run halftone sample again"):
            read_shard(path)
    path.unlink()
    with pytest.raises(UserError, match="run halftone sample first"):
        read_shard(path)


def _png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, format="PNG")
    return stream.getvalue()


def _index(**changes: Any) -> bytes:
    return json.dumps({**INDEX.model_dump(mode="json"), **changes}).encode()


def _members(**changes: bytes | None) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        for name, content in changes.items():
            if content is None:
                del members[name]
            else:
                members[name] = content

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_members(**{"a/00002.png": None}), "lacks 'a/00002.png'"),
        (_members(**{"index.json": None}), "not a shard"),
        (_members(**{"a/00004.png": b"x"}), "has the unknown 'a/00004.png'"),
        (_members(**{"../outside.png": b"x"}), "has the unknown"),
        (_members(**{"a/00002.png": b"x"}), "damaged"),
        (_members(**{"a/00002.png": _png((5, 7))}), r"is \(5, 7\) RGB"),
        (_members(**{"a/00002.png": _png((5, 6), "L")}), r"is \(5, 6\) L"),
        (_members(**{"a/00002.png": _png((9000, 9000))}), "against the index"),
        (_members(**{"index.json": b"{}"}), "index.json: shard: Field required"),
        (_members(**{"index.json": _index(extra=1)}), "extra"),
        (_members(**{"index.json": _index(count=3)}), "lacks 'a/00004.png'"),
        (_members(**{"index.json": _index(count=10**9)}), "index.json"),
        (_members(**{"index.json": b"[" * 100_000}), "index.json"),
    ],
)
def test_hostile_contents(path: Path, change: Callable[[dict[str, bytes]], None], said: str) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=said):
        read_shard(path)


def test_compressed_members_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="not as halftone stores it"):
        read_shard(path)
