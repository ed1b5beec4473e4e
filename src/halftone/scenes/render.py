"""From scenes to pixels: anti-aliased signed-distance rendering of whole batches.

The picture of ``(scene, seed)`` is always the same. Objects stand at canonical places with a small
jitter: one object near the centre, two objects ``OFFSET`` pixels off the centre along the axis of
their relation. Two objects never touch. Pictures are never mirrored, since left and right matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from halftone.scenes.grammar import SHAPES, Background, Colour, Relation, Scene, Shape, Size, Texture

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

SIDE = 64  # pixels
OFFSET = 15.0  # pixels from the centre to each of two objects
JITTER_ALONE = 4.0  # pixels, either way, on both axes
JITTER_ALONG, JITTER_ACROSS = 1.25, 4.0  # pixels, either way, seen along the relation axis
JITTER_RADIUS = 0.02  # relative, either way

RADIUS = {Size.SMALL: 8.0, Size.LARGE: 13.0}
PAINT: dict[Colour, tuple[int, int, int]] = {
    Colour.RED: (222, 28, 32),
    Colour.YELLOW: (250, 218, 20),
    Colour.GREEN: (16, 158, 52),
    Colour.BLUE: (28, 68, 224),
    Colour.PURPLE: (152, 24, 196),
    Colour.WHITE: (252, 252, 252),
    Colour.BLACK: (8, 8, 8),
}
GROUND: dict[Background, tuple[int, int, int]] = {
    Background.GREY: (128, 128, 128),
    Background.TAN: (180, 146, 104),
    Background.SLATE: (92, 112, 140),
    Background.OLIVE: (116, 124, 66),
    Background.MAUVE: (158, 112, 142),
}
TEXTURE_DEPTH = 16.0  # levels between a texture's marks and its ground
_AXIS = {  # unit vector (x right, y down) from the centre to the first object
    Relation.LEFT: (-1.0, 0.0),
    Relation.RIGHT: (1.0, 0.0),
    Relation.ABOVE: (0.0, -1.0),
    Relation.BELOW: (0.0, 1.0),
}


def noise(seeds: NDArray[np.int64], count: int) -> Floats:
    """[n] seeds -> [n, count] uniform in [-1, 1): splitmix64 of (seed, column)."""
    with np.errstate(over="ignore"):
        columns: NDArray[np.uint64] = np.arange(count, dtype=np.uint64)
        z = (seeds.astype(np.uint64)[:, None] * np.uint64(count) + columns).astype(np.uint64)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23)) - np.float32(1)


def _star(x: Floats, y: Floats, r: Floats) -> Floats:
    """Five-pointed star of outer radius r, one point up (signed distance by reflections)."""
    k1x, k1y = np.float32(np.cos(np.pi / 5)), np.float32(-np.sin(np.pi / 5))
    x = np.abs(x)
    y = -y
    d = np.float32(2) * np.maximum(k1x * x + k1y * y, np.float32(0))
    x, y = x - d * k1x, y - d * k1y
    d = np.float32(2) * np.maximum(-k1x * x + k1y * y, np.float32(0))
    x, y = x + d * k1x, y - d * k1y
    x = np.abs(x)
    y = y - r
    inner = np.float32(0.46)
    bx, by = inner * -k1y, inner * k1x - np.float32(1)
    h = np.clip((x * bx + y * by) / (bx * bx + by * by), 0, r)
    edge = np.sqrt((x - bx * h) ** 2 + (y - by * h) ** 2)
    return np.where(y * bx - x * by < 0, -edge, edge)


def _box(x: Floats, y: Floats, half_x: Floats, half_y: Floats) -> Floats:
    return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


def _triangle(x: Floats, y: Floats, r: Floats) -> Floats:
    """Apex up at -r, base down at 0.8 r, half width r."""
    nx, ny = np.float32(1.8 / np.hypot(1.8, 1.0)), np.float32(-1.0 / np.hypot(1.8, 1.0))
    return np.maximum(np.abs(x) * nx + (y + r) * ny, y - np.float32(0.8) * r)


def distance(shape: Shape, x: Floats, y: Floats, r: Floats) -> Floats:
    """Signed distance (pixels, negative inside) of points x, y seen from the object's centre.

    Exact near straight edges, which is all that anti-aliasing needs. x, y broadcast with r.
    Every shape lies within |x| <= r and |y| <= r.
    """
    match shape:
        case Shape.CIRCLE:
            return np.sqrt(x * x + y * y) - np.float32(0.95) * r
        case Shape.SQUARE:
            return _box(x, y, np.float32(0.95) * r, np.float32(0.95) * r)
        case Shape.TRIANGLE:
            return _triangle(x, y, r)
        case Shape.STAR:
            return _star(x, y, r)
        case Shape.RING:
            return np.abs(np.sqrt(x * x + y * y) - np.float32(0.75) * r) - np.float32(0.23) * r
        case Shape.CROSS:
            long, short = np.float32(0.98) * r, np.float32(0.3) * r
            return np.minimum(_box(x, y, long, short), _box(x, y, short, long))


def _texture_masks() -> dict[Texture, Floats]:
    """[SIDE, SIDE] coverage of each texture's marks, centred on zero, in levels."""
    at = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)
    y, x = at[:, None], at[None, :]
    plain = np.zeros((SIDE, SIDE), np.float32)
    stripes = np.broadcast_to(np.where((y // 4) % 2 < 1, 0.5, -0.5), (SIDE, SIDE))
    spacing = 8.0
    dx, dy = x % spacing - spacing / 2, y % spacing - spacing / 2
    dots = np.clip(2.6 - np.sqrt(dx * dx + dy * dy), -0.5, 0.5)
    return {
        Texture.PLAIN: plain,
        Texture.STRIPED: np.asarray(stripes * TEXTURE_DEPTH, np.float32),
        Texture.DOTTED: np.asarray((dots + 0.17) * TEXTURE_DEPTH, np.float32),
    }


_MARKS = _texture_masks()


def ground_image(background: Background, texture: Texture) -> Floats:
    """[SIDE, SIDE, 3] in levels 0..255."""
    return np.asarray(GROUND[background], np.float32) + _MARKS[texture][..., None]


def _placements(scene: Scene, jitter: Floats) -> list[tuple[float, float, float]]:
    """(centre x, centre y, radius) of each object, in pixels; jitter [6] in [-1, 1)."""
    middle, j = SIDE / 2, [float(v) for v in jitter]
    if scene.relation is None:
        radius = RADIUS[scene.first.size] * (1 + JITTER_RADIUS * j[2])
        return [(middle + JITTER_ALONE * j[0], middle + JITTER_ALONE * j[1], radius)]
    ax, ay = _AXIS[scene.relation]
    places = []
    for sign, obj, (along, across, size) in zip((1, -1), scene.objects, (j[:3], j[3:]), strict=True):
        far, side = OFFSET * sign + JITTER_ALONG * along, JITTER_ACROSS * across
        x, y = middle + ax * far + ay * side, middle + ay * far + ax * side
        places.append((x, y, RADIUS[obj.size] * (1 + JITTER_RADIUS * size)))
    return places


def render(scenes: Sequence[Scene], seeds: Sequence[int] | NDArray[np.int64]) -> Pixels:
    """n scenes and n seeds -> [n, SIDE, SIDE, 3], uint8."""
    jitter = noise(np.asarray(seeds, np.int64), 6)
    image = np.stack([ground_image(s.background, s.texture) for s in scenes])
    jobs: dict[Shape, list[tuple[int, float, float, float, Colour]]] = {s: [] for s in SHAPES}
    for row, scene in enumerate(scenes):
        for obj, place in zip(scene.objects, _placements(scene, jitter[row]), strict=True):
            jobs[obj.shape].append((row, *place, obj.colour))
    for shape, todo in jobs.items():
        if todo:
            _paint(image, shape, todo)
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def _paint(image: Floats, shape: Shape, todo: list[tuple[int, float, float, float, Colour]]) -> None:
    """Draws every object of one shape, each within its own window of the picture, in place."""
    reach = int(np.ceil(max(RADIUS.values()) * (1 + JITTER_RADIUS))) + 2
    window = np.arange(2 * reach)
    rows = np.array([t[0] for t in todo])
    x0, y0, radius = (np.array([t[k] for t in todo], np.float32) for k in (1, 2, 3))
    paint = np.array([PAINT[t[4]] for t in todo], np.float32)
    left = np.clip(np.floor(x0).astype(np.int64) - reach, 0, SIDE - 2 * reach)
    top = np.clip(np.floor(y0).astype(np.int64) - reach, 0, SIDE - 2 * reach)
    columns, lines = left[:, None] + window, top[:, None] + window
    x = (columns + np.float32(0.5) - x0[:, None]).astype(np.float32)[:, None, :]
    y = (lines + np.float32(0.5) - y0[:, None]).astype(np.float32)[:, :, None]
    inside = np.clip(np.float32(0.5) - distance(shape, x, y, radius[:, None, None]), 0, 1)
    # Objects of one picture may be of one shape, so windows are blended one after another.
    for k in range(len(todo)):
        patch = image[rows[k], top[k] : top[k] + 2 * reach, left[k] : left[k] + 2 * reach]
        patch += inside[k][..., None] * (paint[k] - patch)


def grid(images: Pixels, columns: int, gap: int = 2) -> Pixels:
    """[n, h, w, 3] -> one picture of rows of ``columns``, on white."""
    n, h, w, _ = images.shape
    lines = -(-n // columns)
    sheet = np.full((lines * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for k in range(n):
        y, x = gap + (k // columns) * (h + gap), gap + (k % columns) * (w + gap)
        sheet[y : y + h, x : x + w] = images[k]
    return sheet
