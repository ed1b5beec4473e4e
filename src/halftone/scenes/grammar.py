"""The language of scenes: what a scene is, how it is said, and how what was said is read back.

A scene is one or two objects (size, colour, shape), the relation between two, and a background
(colour, texture). Every scene can be said in ``TRAINED_PHRASINGS`` ways, and in one more,
``UNSEEN_PHRASING``, which is kept for prompts the model was never trained on. ``parse`` inverts
``caption`` exactly and refuses everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import numpy as np


class Shape(StrEnum):
    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    STAR = "star"
    RING = "ring"
    CROSS = "cross"


class Colour(StrEnum):
    RED = "red"
    YELLOW = "yellow"
    GREEN = "green"
    BLUE = "blue"
    PURPLE = "purple"
    WHITE = "white"
    BLACK = "black"


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


class Relation(StrEnum):
    """Where the first object lies, seen from the second."""

    LEFT = "left of"
    RIGHT = "right of"
    ABOVE = "above"
    BELOW = "below"

    @property
    def converse(self) -> Relation:
        return _CONVERSE[self]


class Background(StrEnum):
    GREY = "grey"
    TAN = "tan"
    SLATE = "slate"
    OLIVE = "olive"
    MAUVE = "mauve"


class Texture(StrEnum):
    PLAIN = "plain"
    STRIPED = "striped"
    DOTTED = "dotted"


_CONVERSE = {
    Relation.LEFT: Relation.RIGHT,
    Relation.RIGHT: Relation.LEFT,
    Relation.ABOVE: Relation.BELOW,
    Relation.BELOW: Relation.ABOVE,
}

SHAPES, COLOURS, SIZES = tuple(Shape), tuple(Colour), tuple(Size)
RELATIONS, BACKGROUNDS, TEXTURES = tuple(Relation), tuple(Background), tuple(Texture)


@dataclass(frozen=True, order=True)
class SceneObject:
    size: Size
    colour: Colour
    shape: Shape

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """``relation`` and ``second`` are both set or both None."""

    first: SceneObject
    background: Background
    texture: Texture
    relation: Relation | None = None
    second: SceneObject | None = None

    def __post_init__(self) -> None:
        if (self.relation is None) != (self.second is None):
            raise ValueError("a relation needs two objects, and two objects need a relation")
        if self.first == self.second:
            raise ValueError("the two objects of a scene differ")

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    def canonical(self) -> Scene:
        """The same picture with the objects in a fixed order: 'A below B' and 'B above A' agree."""
        if self.second is None or self.relation is None or self.first < self.second:
            return self
        return Scene(self.second, self.background, self.texture, self.relation.converse, self.first)

    def composition(self) -> str:
        """What the prompt splits hold out. Pairs of objects: the objects and their relation.
        Single objects, of which there are few: the object and its background."""
        scene = self.canonical()
        if scene.second is None:
            return f"{scene.first} on {scene.texture} {scene.background}"
        return f"{scene.first} {scene.relation} {scene.second}"


# {objects}: "a small red star above a large blue ring"; {ground}: "a striped grey background"
TRAINED_PHRASINGS = (
    "{objects} on {ground}",
    "{ground} with {objects}",
    "on {ground} there is {objects}",
)
UNSEEN_PHRASING = "{objects} with {ground}"
PHRASINGS = (*TRAINED_PHRASINGS, UNSEEN_PHRASING)


def caption(scene: Scene, phrasing: int = 0) -> str:
    """``phrasing`` indexes ``PHRASINGS``."""
    objects = f"a {scene.first}"
    if scene.second is not None:
        objects += f" {scene.relation} a {scene.second}"
    ground = f"a {scene.texture} {scene.background} background"
    return PHRASINGS[phrasing].format(objects=objects, ground=ground)


def _one_of(name: str, words: Sequence[str]) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


def _object_pattern(slot: str) -> str:
    parts = (_one_of(f"size{slot}", SIZES), _one_of(f"colour{slot}", COLOURS))
    return " ".join(("a", *parts, _one_of(f"shape{slot}", SHAPES)))


_OBJECTS = f"{_object_pattern('1')}(?: {_one_of('relation', RELATIONS)} {_object_pattern('2')})?"
_GROUND = f"a {_one_of('texture', TEXTURES)} {_one_of('background', BACKGROUNDS)} background"
_PATTERNS = tuple(re.compile(p.format(objects=_OBJECTS, ground=_GROUND)) for p in PHRASINGS)


def parse_phrased(text: str) -> tuple[Scene, int]:
    """The scene a caption describes, and its phrasing. ValueError outside the grammar."""
    for phrasing, pattern in enumerate(_PATTERNS):
        found = pattern.fullmatch(text)
        if found is None:
            continue
        word = found.groupdict()
        second = None
        if word["relation"] is not None:
            second = SceneObject(Size(word["size2"]), Colour(word["colour2"]), Shape(word["shape2"]))
        scene = Scene(
            SceneObject(Size(word["size1"]), Colour(word["colour1"]), Shape(word["shape1"])),
            Background(word["background"]),
            Texture(word["texture"]),
            None if second is None else Relation(word["relation"]),
            second,
        )
        return scene, phrasing
    raise ValueError(f"not a caption of a scene: {text!r}")


def parse(text: str) -> Scene:
    return parse_phrased(text)[0]


def vocabulary() -> tuple[str, ...]:
    """Every word of every caption, sorted."""
    frame = " ".join(PHRASINGS).replace("{objects}", "a").replace("{ground}", "a background")
    groups = (SHAPES, COLOURS, SIZES, RELATIONS, BACKGROUNDS, TEXTURES, (frame,))
    return tuple(sorted({w for group in groups for text in group for w in text.split()}))


def all_objects() -> Iterator[SceneObject]:
    yield from (SceneObject(*parts) for parts in product(SIZES, COLOURS, SHAPES))


def all_grounds() -> Iterator[tuple[Background, Texture]]:
    yield from product(BACKGROUNDS, TEXTURES)


def all_singles() -> Iterator[Scene]:
    """Every scene of one object: 84 objects x 15 grounds."""
    yield from (Scene(o, b, t) for o in all_objects() for b, t in all_grounds())


def sample_object(rng: np.random.Generator) -> SceneObject:
    return SceneObject(
        SIZES[rng.integers(len(SIZES))],
        COLOURS[rng.integers(len(COLOURS))],
        SHAPES[rng.integers(len(SHAPES))],
    )


def sample_scene(rng: np.random.Generator, single: float = 0.5) -> Scene:
    """A scene of one object with probability ``single``, else of two different objects."""
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    first = sample_object(rng)
    if rng.random() < single:
        return Scene(first, background, texture)
    second = sample_object(rng)
    while second == first:
        second = sample_object(rng)
    return Scene(first, background, texture, RELATIONS[rng.integers(len(RELATIONS))], second)
