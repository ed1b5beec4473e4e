"""The verb behind `halftone metrics`, on shards and with the shipped networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halftone.errors import UserError
from halftone.evaluate.scenario import measure_files
from halftone.files import read_json, write_text
from halftone.plan import Execution
from halftone.prompts import prompts_sha256
from halftone.report.summary import read_rows
from halftone.scenes.grammar import caption, sample_scene
from halftone.scenes.render import render
from halftone.settings import Metrics
from halftone.shards import SeedSet, ShardIndex, write_shard

COUNT = 6
SETTINGS = Metrics(features="scenes", clip="scenes", bootstrap=100)
RNG = np.random.default_rng(3)
SCENES = [sample_scene(RNG, 0.5) for _ in range(COUNT)]
PROMPTS = [caption(scene) for scene in SCENES]


def shard(path: Path, **changes: Any) -> Path:
    """Renders of the first prompts of a file that holds one more."""
    facts: dict[str, Any] = {
        **{"shard": 0, "n_shards": 1, "first": 0, "count": COUNT, "n_images": COUNT, "lanes": 8},
        **{"seeds": {SeedSet.A: 1, SeedSet.B: 2}, "height": 64, "width": 64, "bits": None, "recipe": "fp"},
        **{"model": "m", "model_sha256": "1" * 64, "artefact_sha256": None, "execution": Execution.FLOAT},
        **{"prompts_sha256": prompts_sha256([*PROMPTS, "one more"]), "steps": 25, "guidance": 6.0},
        **{"scheduler": "PNDM", "halftone": "0", "torch": "0", "diffusers": "0"},
    }
    index = ShardIndex(**{**facts, **changes})
    drawn = {s: render(SCENES, np.arange(COUNT) + 100 * k) for k, s in enumerate(SeedSet)}
    write_shard(path, index, ((s, k, drawn[s][k]) for s in SeedSet for k in index.ids))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    write_text(tmp_path / "prompts.txt", "".join(f"{p}\n" for p in [*PROMPTS, "one more"]))
    return tmp_path / "prompts.txt"


def measure(prompts: Path, shards: list[Path], reference: list[Path], output: Path, **more: Any) -> None:
    names = {"seed": 0, "model": "m", "tier": "t", "name": "m_fp_t", **more}
    measure_files(shards, reference, prompts, output, settings=SETTINGS, **names)


def test_full_precision_from_shards_to_rows(prompts: Path, tmp_path: Path) -> None:
    images = [shard(tmp_path / "fp.zip")]
    for name in ("one", "two"):
        measure(prompts, images, images, tmp_path / name / "m_fp_t.json")
    for kind in ("json", "safetensors"):
        assert (tmp_path / f"one/m_fp_t.{kind}").read_bytes() == (
            tmp_path / f"two/m_fp_t.{kind}"
        ).read_bytes()
    own, floor = read_rows(tmp_path / "one/m_fp_t.json")
    assert (own["recipe"], floor["recipe"], own["execution"]) == ("fp", "fp-floor", "float")
    assert (own["n_images"], own["alignment"], own["abstain_rate"]) == (COUNT, 1, 0)
    assert own["features"].startswith("scenes-")
    assert own["fid_to_fp"] is None
    assert floor["kid_to_fp"] is not None
    known = read_json(tmp_path / "one/m_fp_t.json")
    assert known["clip"].startswith("scenes-")
    assert known["provenance"]["images"]["n_images"] == COUNT
    assert str(tmp_path) not in (tmp_path / "one/m_fp_t.json").read_text()


def test_images_of_an_artefact_need_the_artefact(prompts: Path, tmp_path: Path) -> None:
    own = shard(tmp_path / "q.zip", recipe="minmax", artefact_sha256="2" * 64, execution=Execution.SIMULATED)
    base = shard(tmp_path / "fp.zip")
    with pytest.raises(UserError, match="give its folder"):
        measure(prompts, [own], [base], tmp_path / "q.json")
    assert not (tmp_path / "q.json").exists()


def test_other_prompts_are_refused(prompts: Path, tmp_path: Path) -> None:
    images = [shard(tmp_path / "fp.zip")]
    write_text(prompts, "a cat\n" * 1)
    with pytest.raises(UserError, match="sampled for other prompts"):
        measure(prompts, images, images, tmp_path / "fp.json")
