"""Does a picture show the scene it was asked for? Read off the pixels, without any learned model.

The ground's colour is the median of the picture's frame. What is nearer to one of the object colours
than to the ground is an object; its coverage (0..1 per pixel) is compared with the renderer's own
shapes, placed by centroid and area and refined over small shifts and scales. An object is read only
if the best shape fits well and clearly better than the second best; likewise its colour, its size
and the relation. Where that is not so the checker abstains, and an abstention counts as wrong.

Thresholds are our choice, set on renders and on renders passed through an autoencoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from halftone.scenes.grammar import COLOURS, SHAPES, SIZES, Colour, Relation, Scene, Shape, Size
from halftone.scenes.render import PAINT, RADIUS, SIDE, Pixels, distance

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

SPECK = 16  # pixels: anything smaller is no object
FOREIGN = 80.0  # levels from the ground: what is farther and no object colour is unreadable
MIN_IOU = 0.74  # soft intersection over union of the best shape
MIN_MARGIN = 0.05  # by which the best shape must beat the second best
MAX_COLOUR_RATIO = 0.67  # distance to the nearest object colour over that to the second nearest
SIZE_BAND = 0.5  # pixels about the middle of the two radii within which a size is unsure
RADIUS_SLACK = 0.2  # relative: how far outside the renderer's radii a shape may be
LEEWAY = 0.1  # by which a shape of an impossible radius may fit better than the one that is read
MIN_PURITY = 0.8  # share of an object's plainly coloured pixels that have its colour
MIN_ASPECT = 1.5  # of the offset between two objects, for a relation to be clear
SHIFTS = (-0.5, 0.0, 0.5)  # pixels
SCALES = (0.94, 1.0, 1.06)

_PAINTS = np.array([PAINT[c] for c in COLOURS], np.float32)
_FRAME = np.ones((SIDE, SIDE), bool)
_FRAME[2:-2, 2:-2] = False
_REACH = 20  # pixels: half the window in which shapes are compared
_AROUND = ndimage.generate_binary_structure(2, 2)


@dataclass(frozen=True)
class Found:
    """One thing in a picture. An attribute that could not be read is None, and ``reason`` says why.

    x, y, radius in pixels; ``iou`` and ``margin`` of the best shape.
    """

    shape: Shape | None
    colour: Colour | None
    size: Size | None
    x: float
    y: float
    radius: float
    iou: float
    margin: float
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """``objects_right``: exactly the scene's objects are there, by shape and colour. ``all_right``: and
    every size and the relation. ``abstained``: something was unsure; what it concerns counts as wrong."""

    objects_right: bool
    all_right: bool
    abstained: bool
    reason: str = ""


def _template_moments() -> tuple[Floats, Floats]:
    """Area and centroid (y, relative to the centre) of every shape at radius 1, both by quadrature."""
    at = (np.arange(400, dtype=np.float32) + np.float32(0.5)) / np.float32(200) - np.float32(1)
    x, y = (np.asarray(v, np.float32) for v in np.meshgrid(at, at))
    inside = np.stack([distance(s, x, y, np.ones((), np.float32)) < 0 for s in SHAPES])
    areas = inside.sum((1, 2)) * (4 / 400**2)
    low = (inside * y).sum((1, 2)) / inside.sum((1, 2))
    return areas.astype(np.float32), low.astype(np.float32)


_AREAS, _CENTROIDS = _template_moments()


def _coverage(shape: Shape, x: Floats, y: Floats, radius: Floats) -> Floats:
    return np.clip(np.float32(0.5) - distance(shape, x, y, radius), 0, 1)


def _iou(template: Floats, seen: Floats) -> Floats:
    """Soft intersection over union of [..., h, w] with [h, w]."""
    return np.minimum(template, seen).sum((-2, -1)) / np.maximum(template, seen).sum((-2, -1))


def _fit(
    seen: Floats, shape_at: int, x0: float, y0: float, radius: float
) -> tuple[float, float, float, float]:
    """Best IoU of one shape about a place, and the (x, y, radius) that gives it. seen [h, w]."""
    shape, at = SHAPES[shape_at], np.arange(seen.shape[0], dtype=np.float32) + np.float32(0.5)
    shift: Floats = np.array(SHIFTS, np.float32)
    scale: Floats = np.array(SCALES, np.float32)
    best = (0.0, x0, y0, radius)
    for _ in range(2):
        dx, dy, factor = (v.ravel() for v in np.meshgrid(shift, shift, scale, indexing="ij"))
        cx, cy, r = best[1] + dx, best[2] + dy, best[3] * factor
        drawn = _coverage(
            shape,
            at[None, None, :] - cx[:, None, None],
            at[None, :, None] - cy[:, None, None],
            r[:, None, None],
        )
        scores = _iou(drawn, seen)
        k = int(scores.argmax())
        best = (float(scores[k]), float(cx[k]), float(cy[k]), float(r[k]))
        shift, scale = shift * np.float32(0.5), (scale + np.float32(1)) * np.float32(0.5)
    return best


def _read_shape(seen: Floats) -> tuple[Shape, float, float, float, float, float]:
    """Best shape, x, y, radius, IoU and margin of a coverage map [h, w].

    Only shapes of a radius that the renderer draws can be read: the points of a small star are lost first,
    and what is left of it would pass for a circle that is smaller than any. But where such a shape fits
    clearly better, nothing is readable (the margin is then negative).
    """
    area = float(seen.sum())
    at = np.arange(seen.shape[0], dtype=np.float32) + np.float32(0.5)
    x0, y0 = float(seen.sum(0) @ at) / area, float(seen.sum(1) @ at) / area
    radii = np.sqrt(area / _AREAS)
    rough = np.empty(len(SHAPES), np.float32)
    for k, shape in enumerate(SHAPES):
        y = at[:, None] - (y0 - _CENTROIDS[k] * radii[k])
        rough[k] = _iou(_coverage(shape, at[None, :] - np.float32(x0), y.astype(np.float32), radii[k]), seen)
    small, large = (RADIUS[s] for s in SIZES)
    plausible = (radii > small * (1 - RADIUS_SLACK)) & (radii < large * (1 + RADIUS_SLACK))
    order = [int(k) for k in np.argsort(-rough, kind="stable") if plausible[k]]
    fits = {k: _fit(seen, k, x0, y0 - float(_CENTROIDS[k] * radii[k]), float(radii[k])) for k in order[:2]}
    if not fits:
        return SHAPES[int(rough.argmax())], x0, y0, float(radii[rough.argmax()]), 0.0, 0.0
    first = max(fits, key=lambda k: fits[k][0])
    iou, x, y_found, radius = fits[first]
    second = max((fits[k][0] for k in fits if k != first), default=0.0)
    other = float(rough[~plausible].max(initial=0.0)) - LEEWAY
    return SHAPES[first], x, y_found, radius, iou, iou - second if iou > other else iou - other


def _read_colour(pixels: Floats) -> tuple[int, float]:
    """Index of the object colour nearest to the median of pixels [n, 3]; its distance over the second's."""
    off = np.linalg.norm(_PAINTS - np.median(pixels, axis=0), axis=1)
    gaps = np.sort(off)
    return int(off.argmin()), float(gaps[0] / gaps[1])


def _read_size(radius: float) -> Size | None:
    small, large = (RADIUS[s] for s in SIZES)
    if abs(radius - (small + large) / 2) < SIZE_BAND:
        return None
    return Size.SMALL if radius < (small + large) / 2 else Size.LARGE


def _window(centre: float) -> slice:
    low = min(max(round(centre) - _REACH, 0), SIDE - 2 * _REACH)
    return slice(low, low + 2 * _REACH)


def _read(image: Floats, ground: Floats, region: Mask, core: Mask, nearest: NDArray[np.int64]) -> Found:
    """One object: ``region`` are its pixels, ``core`` those plainly of their ``nearest`` object colour."""
    ys, xs = np.nonzero(region)
    solid = region & core
    solid = solid if solid.sum() >= SPECK // 2 else region
    colour_at, doubt = _read_colour(image[solid])
    pure = float((nearest[solid] == colour_at).mean()) >= MIN_PURITY
    along = _PAINTS[colour_at] - ground
    window = _window(float(ys.mean())), _window(float(xs.mean()))
    share = (image[window] - ground) @ along / float(along @ along)
    # Texture is worth up to 0.15 of an object colour, so coverage is read from 0.2 to 0.8; straight
    # edges keep their area, because the cut is even about one half.
    seen = np.clip((share - 0.2) / 0.6, 0, 1) * ndimage.binary_dilation(region[window], _AROUND)
    if float(seen.sum()) < SPECK / 2:
        return Found(None, None, None, float(xs.mean()), float(ys.mean()), 0.0, 0.0, 0.0, "unknown colour")
    shape, x, y, radius, iou, margin = _read_shape(seen.astype(np.float32))
    place = (x + window[1].start, y + window[0].start, radius, iou, margin)
    readable = iou >= MIN_IOU and margin >= MIN_MARGIN
    size = _read_size(radius) if readable else None
    sure = pure and doubt <= MAX_COLOUR_RATIO
    reason = (
        "unclear shape" if not readable else "unclear colour" if not sure else "" if size else "unclear size"
    )
    return Found(shape if readable else None, COLOURS[colour_at] if sure else None, size, *place, reason)


def _regions(labels: NDArray[np.int32], count: int, nearest: NDArray[np.int64], core: Mask) -> list[Mask]:
    """The objects' pixels: connected regions, cut where two colours touch."""
    regions = []
    for k in range(1, count + 1):
        region = labels == k
        if region.sum() < SPECK:
            continue
        tally = np.bincount(nearest[region & core], minlength=len(COLOURS))
        colours = np.flatnonzero(tally >= max(SPECK, 0.15 * tally.sum()))
        if len(colours) < 2:
            regions.append(region)
            continue
        for colour in colours:
            pieces, found = ndimage.label(region & (nearest == colour), _AROUND)
            regions += [p for p in (pieces == j for j in range(1, found + 1)) if p.sum() >= SPECK]
    return regions


def detect(image: Pixels) -> list[Found]:
    """Everything in a picture [64, 64, 3], in reading order of its centres; unreadable things included."""
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"the checker reads uint8 [{SIDE}, {SIDE}, 3], not {image.dtype} {list(image.shape)}"
        )
    levels = image.astype(np.float32)
    ground = np.median(levels[_FRAME], axis=0).astype(np.float32)
    to_ground = np.linalg.norm(levels - ground, axis=-1)
    # |p - c|^2 of every pixel and object colour, by one matrix product
    flat = levels.reshape(-1, 3)
    squares = (flat**2).sum(1)[:, None] - 2 * flat @ _PAINTS.T + (_PAINTS**2).sum(1)
    nearest = squares.argmin(1).reshape(SIDE, SIDE)
    to_paint = np.sqrt(np.maximum(squares.min(1), 0)).reshape(SIDE, SIDE)
    objects = to_paint < to_ground
    core = to_paint < 0.5 * to_ground
    labels, count = ndimage.label(objects)
    found = [
        _read(levels, ground, region, core, nearest) for region in _regions(labels, count, nearest, core)
    ]
    foreign = (to_ground > FOREIGN) & ~ndimage.binary_dilation(objects, _AROUND)
    if foreign.any():
        labels, count = ndimage.label(foreign, _AROUND)
        for k in range(1, count + 1):
            ys, xs = np.nonzero(labels == k)
            if len(ys) >= SPECK:
                centre = float(xs.mean()), float(ys.mean())
                found.append(Found(None, None, None, *centre, 0.0, 0.0, 0.0, "unknown colour"))
    return sorted(found, key=lambda f: (f.y, f.x))


def _relation(first: Found, second: Found) -> Relation | None:
    """Where the first lies, seen from the second; None when neither axis is clear."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= MIN_ASPECT * abs(dy):
        return Relation.LEFT if dx < 0 else Relation.RIGHT
    if abs(dy) >= MIN_ASPECT * abs(dx):
        return Relation.ABOVE if dy < 0 else Relation.BELOW
    return None


def check(image: Pixels, scene: Scene) -> Verdict:
    """Compares a picture with the scene it was asked for. ValueError unless it is uint8 [64, 64, 3]."""
    return judge(detect(image), scene)


def judge(found: list[Found], scene: Scene) -> Verdict:
    """The verdict on what ``detect`` found."""
    for thing in found:
        if thing.shape is None or thing.colour is None:
            return Verdict(False, False, True, thing.reason)
    if len(found) != len(scene.objects):
        return Verdict(False, False, False, f"{len(found)} objects instead of {len(scene.objects)}")
    orders = [
        order
        for order in permutations(found)
        if all((f.shape, f.colour) == (o.shape, o.colour) for f, o in zip(order, scene.objects, strict=True))
    ]
    if not orders:
        seen = " and ".join(f"{f.colour} {f.shape}" for f in found)
        return Verdict(False, False, False, f"shows {seen}")
    if any(f.size is None for f in found):
        return Verdict(True, False, True, "unclear size")
    orders = [
        order for order in orders if all(f.size == o.size for f, o in zip(order, scene.objects, strict=True))
    ]
    if not orders:
        return Verdict(True, False, False, "wrong size")
    if scene.relation is None:
        return Verdict(True, True, False)
    relations = [_relation(*order) for order in orders]
    if None in relations:
        return Verdict(True, False, True, "unclear relation")
    if scene.relation not in relations:
        return Verdict(True, False, False, f"the first is {relations[0]} the second")
    return Verdict(True, True, False)
