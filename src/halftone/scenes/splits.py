"""Prompt splits by composition, drawn once.

A composition (see ``Scene.composition``) hashes to a number in [0, 1), and that number alone says
which split it belongs to. Training sees none of the named splits' compositions, and no two splits
share one. The prompts of the unseen split are also worded in a way training never uses.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from halftone.files import sha256, write_json, write_text
from halftone.scenes.grammar import (
    PHRASINGS,
    RELATIONS,
    TRAINED_PHRASINGS,
    Scene,
    all_grounds,
    all_objects,
    all_singles,
    caption,
    sample_scene,
)

TRAIN = "train"
SEED = 20240607
# split -> (upper bound of its hash range, prompts, prompts of one object)
SPLITS: dict[str, tuple[float, int, int]] = {
    "test": (0.12, 1000, 250),
    "validation": (0.15, 256, 64),
    "unseen": (0.21, 256, 64),
    "calibration": (0.23, 64, 16),
}


def split_of(scene: Scene) -> str:
    digest = hashlib.sha256(scene.composition().encode()).digest()
    number = int.from_bytes(digest[:8], "big") / 2**64
    return next((name for name, (bound, _, _) in SPLITS.items() if number < bound), TRAIN)


def sample_training_scene(rng: np.random.Generator, single: float = 0.5) -> Scene:
    """Singles and pairs in the given proportion, held-out compositions left out."""
    want_single = rng.random() < single
    while True:
        scene = sample_scene(rng, 1.0 if want_single else 0.0)
        if split_of(scene) == TRAIN:
            return scene


def _pairs() -> list[Scene]:
    """One scene of every composition of two objects, on the first ground."""
    ground = next(all_grounds())
    pairs = itertools.combinations(sorted(all_objects()), 2)
    return [Scene(a, *ground, relation, b) for a, b in pairs for relation in RELATIONS]


def draw(name: str) -> list[str]:
    """The prompts of one split, the same on every call. Every pair composition is used once."""
    _, total, singles = SPLITS[name]
    rng = np.random.default_rng([SEED, list(SPLITS).index(name)])
    trained = range(len(TRAINED_PHRASINGS))
    phrasings = [len(PHRASINGS) - 1] if name == "unseen" else list(trained)
    alone = [(s, p) for s in all_singles() if split_of(s) == name for p in phrasings]
    prompts = [caption(*alone[k]) for k in rng.permutation(len(alone))[:singles]]
    pairs = [s for s in _pairs() if split_of(s) == name]
    grounds = list(all_grounds())
    for k in rng.permutation(len(pairs))[: total - singles]:
        pair, (background, texture) = pairs[k], grounds[rng.integers(len(grounds))]
        scene = Scene(pair.first, background, texture, pair.relation, pair.second)
        if rng.random() < 0.5:  # the same picture, said from the other object
            assert pair.second is not None
            assert pair.relation is not None
            scene = Scene(pair.second, background, texture, pair.relation.converse, pair.first)
        prompts.append(caption(scene, phrasings[rng.integers(len(phrasings))]))
    if len(set(prompts)) != total:
        raise RuntimeError(f"split {name}: {len(set(prompts))} different prompts instead of {total}")
    return [prompts[k] for k in rng.permutation(total)]


def write(folder: Path) -> None:
    """``{split}.txt``, one caption a line, and ``splits.json`` with their hashes."""
    facts = {}
    for name in SPLITS:
        path = folder / f"{name}.txt"
        prompts = draw(name)
        write_text(path, "\n".join(prompts) + "\n")
        facts[name] = {"file": path.name, "prompts": len(prompts), "sha256": sha256(path)}
    write_json(folder / "splits.json", {"seed": SEED, "splits": facts})


def main(folder: Annotated[Path, typer.Argument(help="where to write")] = Path("data/prompts")) -> None:
    """Draw the prompt splits and write them."""
    write(folder)


if __name__ == "__main__":
    typer.run(main)
