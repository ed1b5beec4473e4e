"""How far pictures of an unconditional model are from renders: distances, readability, and a blind list.

``python -m halftone.scenes.realism MODEL``. Both sides are 32x32; the feature network and the checker, which
were made for 64x64, see them doubled, nearest. The floor is the distance of as many
other renders to the same reference, computed in the same way. ``blind.png`` is for a reader who guesses
which pictures are renders; ``blind-key.json`` says which ones are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from halftone.evaluate import distances
from halftone.evaluate.features import open_network
from halftone.evaluate.statistics import Estimate, bootstrap, group_jackknife, prompt_groups
from halftone.files import sha256, write_json, writing
from halftone.progress import track
from halftone.scenes import uncond
from halftone.scenes.checker import detect
from halftone.scenes.render import Pixels, grid

BLIND = 100  # pictures on the blind list, half of them generated
BLIND_COLUMNS, BLIND_SCALE, CAPTION = 10, 4, 14  # pictures a row, enlargement, pixels for the number
RESAMPLES = 1000


def rounded(estimate: Estimate) -> dict[str, float]:
    return {name: round(value, 6) for name, value in asdict(estimate).items()}


def distance_figures(generated: Tensor, renders: Tensor, reference: Tensor, seed: int) -> dict[str, Any]:
    """Fréchet and kernel distance to the reference, of generated pictures and of renders, and the excess
    of the former over the latter; all features [n, d]. Intervals by a jackknife over groups of images,
    dropped from every side at once."""
    labels = prompt_groups(len(reference), seed)
    found: dict[str, Any] = {}
    for name, distance in (("frechet", distances.frechet), ("kernel", distances.kernel)):

        def value(features: Tensor, kept: NDArray[np.bool_], distance: Any = distance) -> float:
            mask = torch.from_numpy(kept)
            return float(distance(features[mask], reference[mask]))

        def excess(kept: NDArray[np.bool_], value: Any = value) -> float:
            return float(value(generated, kept) - value(renders, kept))

        for key, features in (("to_real", generated), ("floor", renders)):
            estimate = group_jackknife(lambda kept, f=features, v=value: v(f, kept), labels)  # type: ignore[misc]
            found[f"{name}_{key}"] = rounded(estimate)
        found[f"{name}_excess"] = rounded(group_jackknife(excess, labels))
    return found


def readings(pictures: Pixels, title: str, seed: int) -> dict[str, Any]:
    """What the checker makes of 32x32 pictures: the share that show one object and nothing else, of a
    readable shape, colour and size; how often each shape and colour was read; and what was unreadable."""
    right = np.zeros(len(pictures))
    shapes: Counter[str] = Counter()
    colours: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for k, picture in enumerate(track(uncond.double(pictures), title)):
        found = detect(picture)
        doubts = [thing.reason for thing in found if thing.reason]
        right[k] = len(found) == 1 and not doubts
        if right[k]:
            shapes[str(found[0].shape)] += 1
            colours[str(found[0].colour)] += 1
        else:
            reasons[doubts[0] if doubts else f"{len(found)} objects"] += 1
    return {
        "readable": rounded(bootstrap(right, resamples=RESAMPLES, seed=seed)),
        "shapes": dict(shapes),
        "colours": dict(colours),
        "unreadable": dict(reasons),
    }


def blind_list(generated: Pixels, renders: Pixels, seed: int) -> tuple[Pixels, list[bool]]:
    """Equally many of both in a seeded random order, [n, 32, 32, 3], and which of them are renders."""
    rng = np.random.default_rng([seed, BLIND])
    half = min(BLIND // 2, len(generated), len(renders))
    chosen = [side[rng.permutation(len(side))[:half]] for side in (renders, generated)]
    order = rng.permutation(2 * half)
    return np.concatenate(chosen)[order], [bool(k < half) for k in order]


def write_blind_sheet(pictures: Pixels, path: Path) -> None:
    """A PNG of enlarged pictures in rows, each with its number (from 1) above it."""
    from PIL import Image, ImageDraw

    large = pictures.repeat(BLIND_SCALE, axis=1).repeat(BLIND_SCALE, axis=2)
    headed = np.pad(large, ((0, 0), (CAPTION, 0), (0, 0), (0, 0)), constant_values=255)
    sheet = Image.fromarray(grid(headed, BLIND_COLUMNS, gap=4))
    pen = ImageDraw.Draw(sheet)
    height, width = headed.shape[1] + 4, headed.shape[2] + 4
    for k in range(len(pictures)):
        place = 6 + (k % BLIND_COLUMNS) * width, 4 + (k // BLIND_COLUMNS) * height
        pen.text(place, str(k + 1), fill=(0, 0, 0))
    with writing(path) as temporary:
        sheet.save(temporary, format="PNG")


def measure(folder: Path, images: int, seed: int, out: Path) -> dict[str, Any]:
    """Samples, measures, and writes ``figures.json``, ``samples.png`` and the blind list into ``out``."""
    renders, reference = (uncond.pictures(images, np.random.default_rng([seed, k])) for k in (1, 2))
    generated = uncond.sample(uncond.load(folder), images, seed)
    network = open_network("scenes")
    features = [network.features(p) for p in (generated, renders, reference)]
    figures: dict[str, Any] = {
        "images": images,
        "seed": seed,
        "steps": uncond.STEPS,
        "features": network.name,
        "model": sha256(folder),
        **distance_figures(features[0], features[1], features[2], seed),
        "generated": readings(generated, "reading generated pictures", seed),
        "renders": readings(renders, "reading renders", seed),
    }
    write_json(out / "figures.json", figures)
    blind, key = blind_list(generated, renders, seed)
    write_blind_sheet(blind, out / "blind.png")
    write_json(out / "blind-key.json", {"renders": [k + 1 for k, real in enumerate(key) if real]})
    write_blind_sheet(generated[:BLIND], out / "samples.png")
    return figures


def main(
    folder: Annotated[Path, typer.Argument(help="diffusers folder of an unconditional model")],
    images: Annotated[int, typer.Option(help="pictures on each side", min=40)] = 1000,
    out: Annotated[Path, typer.Option(help="where figures and sheets go")] = Path("build/realism"),
    seed: Annotated[int, typer.Option(min=0)] = 5,
    threads: Annotated[int, typer.Option(help="torch threads", min=1)] = 1,
) -> None:
    """Measure an unconditional model against renders."""
    torch.set_num_threads(threads)
    for name, value in measure(folder, images, seed, out).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
