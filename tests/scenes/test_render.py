"""Pictures are crisp, in their places, and the same every time."""

import numpy as np
import pytest

from halftone.scenes.grammar import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Background,
    Colour,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Size,
    Texture,
    sample_scene,
)
from halftone.scenes.render import PAINT, SIDE, noise, render


def _covered(picture: np.ndarray, colour: Colour) -> np.ndarray:
    """[SIDE, SIDE] bool: pixels of exactly this paint."""
    return (picture == np.asarray(PAINT[colour], np.uint8)).all(axis=-1)


def test_a_picture_depends_on_its_scene_and_seed_alone() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(64)]
    seeds = rng.integers(1 << 40, size=64)
    together = render(scenes, seeds)
    assert together.shape == (64, SIDE, SIDE, 3)
    assert together.dtype == np.uint8
    for k in (0, 17, 63):
        np.testing.assert_array_equal(together[k], render([scenes[k]], [seeds[k]])[0])
    assert (together != render(scenes, seeds + 1)).any(axis=(1, 2, 3)).all()


def test_noise_is_spread_evenly() -> None:
    values = noise(np.arange(20000), 6)
    assert values.min() >= -1
    assert values.max() < 1
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(values.std(axis=0), 3**-0.5, atol=0.01)


@pytest.mark.parametrize("relation", RELATIONS)
def test_objects_stand_as_their_relation_says_and_never_touch(relation: Relation) -> None:
    for shape in SHAPES:
        first, second = (SceneObject(Size.LARGE, c, shape) for c in (Colour.RED, Colour.BLUE))
        scene = Scene(first, Background.GREY, Texture.PLAIN, relation, second)
        for picture in render([scene] * 50, list(range(50))):
            (y1, x1), (y2, x2) = (np.nonzero(_covered(picture, c)) for c in (Colour.RED, Colour.BLUE))
            apart = {
                Relation.LEFT: x2.min() - x1.max(),
                Relation.RIGHT: x1.min() - x2.max(),
                Relation.ABOVE: y2.min() - y1.max(),
                Relation.BELOW: y1.min() - y2.max(),
            }
            assert apart[relation] > 1


def test_shapes_differ_in_area_or_outline_at_the_small_size() -> None:
    scenes = [Scene(SceneObject(Size.SMALL, Colour.WHITE, s), Background.GREY, Texture.PLAIN) for s in SHAPES]
    masks = [_covered(p, Colour.WHITE) for p in render(scenes, [5] * len(scenes))]
    for a in range(len(masks)):
        for b in range(a):
            overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
            assert overlap < 0.8, (SHAPES[a], SHAPES[b])


def test_sizes_do_not_overlap_in_area() -> None:
    for shape in Shape:
        small, large = (
            Scene(SceneObject(s, Colour.WHITE, shape), Background.GREY, Texture.PLAIN) for s in Size
        )
        areas = [
            [_covered(p, Colour.WHITE).sum() for p in render([scene] * 30, list(range(30)))]
            for scene in (small, large)
        ]
        assert 1.6 * max(areas[0]) < min(areas[1])


def test_colours_are_well_separated() -> None:
    paints = np.array([PAINT[c] for c in COLOURS], float)
    gaps = np.linalg.norm(paints[:, None] - paints, axis=-1) + 1e9 * np.eye(len(paints))
    assert gaps.min() > 90
