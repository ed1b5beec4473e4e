"""Two zips of images of the same prompts, compared image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halftone.cli import main
from halftone.compare_images import compare_images
from halftone.errors import UserError
from halftone.evaluate.features import open_network
from halftone.evaluate.paired import MOST_PSNR
from halftone.files import write_text
from halftone.plan import Execution
from halftone.prompts import prompts_sha256
from halftone.scenes.grammar import caption, sample_scene
from halftone.scenes.render import render
from halftone.shards import SeedSet, ShardIndex, write_shard

COUNT = 8
RNG = np.random.default_rng(3)
SCENES = [sample_scene(RNG, 0.5) for _ in range(COUNT)]
PROMPTS = [caption(scene) for scene in SCENES]
DRAWN = render(SCENES, np.arange(COUNT))
QUANTIZED = {"artefact_sha256": "2" * 64, "recipe": "minmax", "bits": "w4a8"}


def zipped(path: Path, images: Any, **changes: Any) -> Path:
    facts: dict[str, Any] = {
        **{"shard": 0, "n_shards": 1, "first": 0, "count": COUNT, "n_images": COUNT, "lanes": 8},
        **{"seeds": {SeedSet.A: 1}, "height": 64, "width": 64, "bits": None, "recipe": "fp"},
        **{"model": "m", "model_sha256": "1" * 64, "artefact_sha256": None, "execution": Execution.FLOAT},
        **{"prompts_sha256": prompts_sha256(PROMPTS), "steps": 25, "guidance": 6.0},
        **{"scheduler": "PNDM", "halftone": "0", "torch": "0", "diffusers": "0"},
    }
    index = ShardIndex(**{**facts, **changes})
    write_shard(path, index, ((SeedSet.A, k, images[k]) for k in index.ids))
    return path


def noisy(reach: int) -> Any:
    noise = np.random.default_rng(reach).integers(-reach, reach + 1, DRAWN.shape)
    return np.clip(DRAWN.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Prompts, full precision, the images of simulated and integer execution, and broken ones."""
    write_text(tmp_path / "prompts.txt", "".join(f"{p}\n" for p in PROMPTS))
    integer = noisy(20)
    integer[0] ^= 1  # one image that is not the same
    simulated = {**QUANTIZED, "execution": Execution.SIMULATED}
    other = {**QUANTIZED, "execution": Execution.INTEGER}
    return {
        "prompts": tmp_path / "prompts.txt",
        "full": zipped(tmp_path / "fp.zip", DRAWN),
        "simulated": zipped(tmp_path / "simulated.zip", noisy(20), **simulated),
        "integer": zipped(tmp_path / "integer.zip", integer, **other),
        "broken": zipped(tmp_path / "broken.zip", np.zeros_like(DRAWN), **other),
        "elsewhere": zipped(tmp_path / "elsewhere.zip", integer, **{**other, "steps": 9}),
    }


def test_what_is_alike_is_not_distinguishable(files: dict[str, Path]) -> None:
    network = open_network("scenes")
    found = compare_images(files["simulated"], files["integer"], files["full"], files["prompts"], network)
    assert (found.count, found.identical) == (COUNT, COUNT - 1)
    assert found.distinguishable == ()
    assert found.psnr_median == MOST_PSNR
    assert 48 < found.psnr_rare < 90  # all of one image is one level off: 48.1 dB
    assert [change.name for change in found.changes] == ["alignment", "lpips"]


def test_what_is_worse_is_seen(files: dict[str, Path]) -> None:
    network = open_network("scenes")
    found = compare_images(files["simulated"], files["broken"], files["full"], files["prompts"], network)
    assert found.distinguishable == ("alignment", "lpips")
    assert found.identical == 0
    assert found.psnr_median < 20
    with pytest.raises(UserError, match="steps is 9"):
        compare_images(files["simulated"], files["elsewhere"], files["full"], files["prompts"], network)


def test_the_verb_says_so(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    zips = [str(files["simulated"]), str(files["integer"])]
    assert main(["compare", *zips, "--full", str(files["full"]), "--prompts", str(files["prompts"])]) == 0
    said = capsys.readouterr().out
    assert "7 of 8 images identical" in said
    assert "not distinguishable in alignment, lpips" in said
    assert main(["compare", *zips]) == 2
    assert "two zips need --full" in capsys.readouterr().err
