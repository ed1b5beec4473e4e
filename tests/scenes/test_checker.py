"""The checker reads renders right, refuses wrong scenes, and abstains rather than guess."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from halftone.scenes.checker import check, detect, judge
from halftone.scenes.corruptions import Corruption, corrupt
from halftone.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Colour,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Size,
    Texture,
    all_singles,
    sample_scene,
)
from halftone.scenes.render import Pixels, render

RED_STAR = SceneObject(Size.SMALL, Colour.RED, Shape.STAR)
BLUE_RING = SceneObject(Size.LARGE, Colour.BLUE, Shape.RING)
PAIR = Scene(RED_STAR, Background.GREY, Texture.STRIPED, Relation.ABOVE, BLUE_RING)


def draw(scenes: list[Scene], seed: int = 0) -> Pixels:
    return render(scenes, np.random.default_rng(seed).integers(1 << 40, size=len(scenes)))


def pairs(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, 0.0) for _ in range(count)]


@pytest.fixture(scope="module")
def singles() -> list[Scene]:
    """Every object and every ground, in every fourth combination."""
    return list(all_singles())[::4]


def share_right(images: Pixels, scenes: list[Scene]) -> float:
    return float(np.mean([check(i, s).all_right for i, s in zip(images, scenes, strict=True)]))


def test_reads_every_object_on_every_ground(singles: list[Scene]) -> None:
    assert share_right(draw(singles), singles) >= 0.99


def test_reads_pairs_in_every_relation() -> None:
    scenes = pairs(200, 1)
    assert {s.relation for s in scenes} == set(RELATIONS)
    assert {(s.background, s.texture) for s in scenes} == {(b, t) for b in BACKGROUNDS for t in TEXTURES}
    assert share_right(draw(scenes), scenes) >= 0.99


def test_reads_renders_as_an_autoencoder_returns_them() -> None:
    """A little blur, noise, and a shift of colour."""
    scenes = pairs(100, 2)
    rng = np.random.default_rng(2)
    soft = ndimage.gaussian_filter(draw(scenes).astype(np.float64), (0, 0.8, 0.8, 0))
    soft += rng.normal(0, 6, soft.shape) + rng.normal(0, 8, (len(soft), 1, 1, 3))
    assert share_right(np.clip(np.rint(soft), 0, 255).astype(np.uint8), scenes) >= 0.99


@pytest.mark.parametrize("attribute", ["shape", "colour", "size"])
def test_refuses_one_wrong_attribute(attribute: str) -> None:
    values: tuple[object, ...] = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[attribute]
    rng = np.random.default_rng(3)
    scenes = pairs(150, 3)
    images = draw(scenes)
    refused, objects_wrong = [], []
    for image, scene in zip(images, scenes, strict=True):
        slot = ("first", "second")[rng.integers(2)]
        thing = getattr(scene, slot)
        others = [replace(thing, **{attribute: v}) for v in values if v != getattr(thing, attribute)]
        others = [o for o in others if o not in scene.objects]
        if not others:
            continue
        verdict = check(image, replace(scene, **{slot: others[rng.integers(len(others))]}))
        refused.append(not verdict.all_right)
        objects_wrong.append(not verdict.objects_right)
    assert len(refused) > 100
    assert np.mean(refused) >= 0.99
    if attribute == "size":
        assert not any(objects_wrong)
    else:
        assert np.mean(objects_wrong) >= 0.99


def test_refuses_a_wrong_relation_and_exchanged_places() -> None:
    scenes = pairs(100, 4)
    for image, scene in zip(draw(scenes), scenes, strict=True):
        found = detect(image)
        for relation in RELATIONS:
            if relation != scene.relation:
                verdict = judge(found, replace(scene, relation=relation))
                assert not verdict.all_right
                assert verdict.objects_right
        assert judge(found, scene.canonical()).all_right


def test_refuses_exchanged_colours() -> None:
    wrong = replace(
        PAIR,
        first=replace(RED_STAR, colour=Colour.BLUE),
        second=replace(BLUE_RING, colour=Colour.RED),
    )
    verdict = check(draw([wrong])[0], PAIR)
    assert not verdict.objects_right
    assert not verdict.abstained


def test_counts_objects() -> None:
    alone = Scene(RED_STAR, PAIR.background, PAIR.texture)
    image, crowded = draw([alone, PAIR])
    assert check(image, PAIR).reason == "1 objects instead of 2"
    assert check(crowded, alone).reason == "2 objects instead of 1"
    empty = np.full_like(image, 128)
    assert detect(empty) == []
    assert not check(empty, alone).objects_right


def test_abstains_on_half_an_object_and_on_unknown_colours() -> None:
    scene = Scene(SceneObject(Size.LARGE, Colour.RED, Shape.CIRCLE), Background.GREY, Texture.PLAIN)
    image = draw([scene])[0]
    red = np.linalg.norm(image.astype(float) - (222, 28, 32), axis=-1) < 60
    half = image.copy()
    half[:, : int(np.nonzero(red)[1].mean())] = 128
    assert check(half, scene).abstained
    odd = image.copy()
    odd[red] = (255, 140, 190)  # pink is none of the colours
    verdict = check(odd, scene)
    assert verdict.abstained
    assert not verdict.objects_right


def test_abstains_on_mixed_colours() -> None:
    scene = Scene(SceneObject(Size.LARGE, Colour.RED, Shape.SQUARE), Background.GREY, Texture.PLAIN)
    image = draw([scene])[0]
    rows, columns = np.nonzero(np.linalg.norm(image.astype(float) - (222, 28, 32), axis=-1) < 60)
    patch = rows < rows.min() + 0.3 * (rows.max() - rows.min())
    image[rows[patch], columns[patch]] = (152, 24, 196)
    assert check(image, scene).abstained


def test_a_star_that_lost_its_points_is_no_small_circle() -> None:
    """An autoencoder rounds small stars off; a disc of a radius that is never drawn is unreadable."""
    scene = Scene(SceneObject(Size.SMALL, Colour.BLUE, Shape.STAR), Background.TAN, Texture.PLAIN)
    image = draw([scene])[0]
    soft = np.rint(ndimage.gaussian_filter(image.astype(np.float64), (1.3, 1.3, 0))).astype(np.uint8)
    assert [(f.shape, f.colour) for f in detect(soft)] == [(Shape.STAR, Colour.BLUE)]
    disc = np.full((64, 64, 3), (180, 146, 104), np.uint8)
    rows, columns = np.indices((64, 64)) - 31.5
    disc[rows**2 + columns**2 < 5**2] = (28, 68, 224)
    assert check(disc, scene).abstained


def test_an_abstention_on_size_leaves_the_objects_right() -> None:
    scene = Scene(SceneObject(Size.SMALL, Colour.WHITE, Shape.SQUARE), Background.OLIVE, Texture.PLAIN)
    image = np.full((64, 64, 3), (116, 124, 66), np.uint8)
    image[22:42, 22:42] = 252  # between small and large
    verdict = check(image, scene)
    assert (verdict.objects_right, verdict.all_right, verdict.abstained) == (True, False, True)


def test_falls_with_deletion() -> None:
    scenes = pairs(40, 5)
    images, seeds = draw(scenes), np.arange(40)
    right = [
        share_right(corrupt(images, Corruption.DELETION, s, seeds), scenes) for s in (0.0, 0.4, 0.7, 1.0)
    ]
    assert right[0] >= 0.99
    assert right == sorted(right, reverse=True)
    assert right[-1] < 0.1


def test_detect_names_what_it_found() -> None:
    star, ring = detect(draw([PAIR])[0])
    assert (star.shape, star.colour, star.size) == (Shape.STAR, Colour.RED, Size.SMALL)
    assert (ring.shape, ring.colour, ring.size) == (Shape.RING, Colour.BLUE, Size.LARGE)
    assert star.y < ring.y


def test_is_the_same_on_every_call() -> None:
    image = draw([PAIR])[0]
    assert detect(image) == detect(image.copy())


def test_refuses_other_images() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[64, 64, 3\]"):
        detect(np.zeros((32, 32, 3), np.uint8))
