"""Captions say scenes, and are read back exactly."""

import numpy as np
import pytest

from halftone.scenes.grammar import (
    PHRASINGS,
    Background,
    Colour,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Size,
    Texture,
    all_singles,
    caption,
    parse,
    parse_phrased,
    sample_scene,
)

STAR = SceneObject(Size.SMALL, Colour.RED, Shape.STAR)
RING = SceneObject(Size.LARGE, Colour.BLUE, Shape.RING)
SCENE = Scene(STAR, Background.GREY, Texture.STRIPED, Relation.ABOVE, RING)


def test_a_caption_reads_as_english() -> None:
    assert caption(SCENE) == "a small red star above a large blue ring on a striped grey background"


@pytest.mark.parametrize("phrasing", range(len(PHRASINGS)))
def test_every_phrasing_is_read_back_exactly(phrasing: int) -> None:
    rng = np.random.default_rng(phrasing)
    scenes = [*all_singles(), *(sample_scene(rng, single=0.0) for _ in range(2000))]
    for scene in scenes:
        assert parse_phrased(caption(scene, phrasing)) == (scene, phrasing)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red star on a plain grey background",
        "a small red star above a plain grey background",
        "a small red star above a small red star on a plain grey background",
        "a small red star on a plain grey background ",
        "A small red star on a plain grey background",
        "a small pink star on a plain grey background",
    ],
)
def test_text_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a caption|differ"):
        parse(text)


def test_a_picture_said_from_either_object_is_one_composition() -> None:
    other = Scene(RING, Background.GREY, Texture.STRIPED, Relation.BELOW, STAR)
    assert other.canonical() == SCENE.canonical()
    assert other.composition() == SCENE.composition()
