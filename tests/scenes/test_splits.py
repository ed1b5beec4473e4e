"""The prompt splits are what the committed files say, and share no composition."""

import json
from pathlib import Path

import numpy as np
import pytest

from halftone.files import sha256
from halftone.scenes.grammar import PHRASINGS, parse, parse_phrased
from halftone.scenes.splits import SPLITS, TRAIN, draw, sample_training_scene, split_of, write

COMMITTED = Path(__file__).parents[2] / "data" / "prompts"


def test_splits_are_redrawn_to_the_byte(tmp_path: Path) -> None:
    write(tmp_path)
    for name in (*(f"{s}.txt" for s in SPLITS), "splits.json"):
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes(), name


def test_hashes_match_the_files() -> None:
    facts = json.loads((COMMITTED / "splits.json").read_text())["splits"]
    assert set(facts) == set(SPLITS)
    for name, fact in facts.items():
        path = COMMITTED / fact["file"]
        assert sha256(path) == fact["sha256"]
        assert len(path.read_text(encoding="utf-8").splitlines()) == fact["prompts"] == SPLITS[name][1]


@pytest.mark.parametrize("name", list(SPLITS))
def test_a_split_has_its_own_compositions(name: str) -> None:
    prompts = draw(name)
    assert len(set(prompts)) == len(prompts)
    assert {split_of(parse(p)) for p in prompts} == {name}


def test_only_the_unseen_split_uses_the_unseen_phrasing() -> None:
    unseen = len(PHRASINGS) - 1
    for name in SPLITS:
        phrasings = {parse_phrased(p)[1] for p in draw(name)}
        assert phrasings == {unseen} if name == "unseen" else unseen not in phrasings


def test_training_scenes_are_held_out_of_every_split() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_training_scene(rng) for _ in range(2000)]
    assert {split_of(s) for s in scenes} == {TRAIN}
    assert 0.45 < np.mean([s.second is None for s in scenes]) < 0.55
