"""A preference study: blind pairs of two rows' images, and what the choices say.

Both images of a pair have one prompt and one noise. Order and sides are drawn from a seed, and the page names
neither row, so that who looks cannot know which is which. The share of preferences has a Wilson interval
(Wilson 1927); pairs without a difference count for neither.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from halftone.errors import UserError
from halftone.files import read_json, write_text
from halftone.prompts import prompts_sha256
from halftone.report.pictures import png, uri
from halftone.shards import SeedSet, Shard

_Z = 1.959964  # of 95 %


class Chosen(StrEnum):
    LEFT = "left"
    RIGHT = "right"
    NEITHER = "neither"


class Choices(BaseModel):
    """The file that the page hands out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str = Field(description="digest of both rows' images and of the draw")
    seed: int
    pairs: tuple[int, ...] = Field(description="prompt ids, in the order they were drawn in")
    choices: dict[int, Chosen] = Field(description="by prompt id")


@dataclass(frozen=True)
class Pair:
    prompt: int
    first_is_left: bool


def draw(ids: Sequence[int], seed: int) -> list[Pair]:
    """All pairs in a random order; the first row lies left in half of them (one more or less)."""
    generator = random.Random(f"preference {seed}")
    order = sorted(ids)
    generator.shuffle(order)
    sides = [place % 2 == 0 for place in range(len(order))]
    generator.shuffle(sides)
    return [Pair(*pair) for pair in zip(order, sides, strict=True)]


@dataclass(frozen=True)
class Share:
    """How often the first row was preferred, among pairs where one was, with the ends of its interval."""

    first: int
    second: int
    neither: int
    value: float
    lo: float
    hi: float

    def __str__(self) -> str:
        decided = self.first + self.second
        found = f"the first row is preferred in {self.first} of {decided} pairs: {self.value:.0%}"
        said = "no preference is shown" if self.lo <= 0.5 <= self.hi else "a preference is shown"
        return f"{found} ({self.lo:.0%} to {self.hi:.0%}); {self.neither} without a difference; {said}"


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval); 0 to 1 without any."""
    if count == 0:
        return 0.0, 1.0
    share, room = successes / count, _Z**2 / count
    middle = (share + room / 2) / (1 + room)
    half = _Z / (1 + room) * math.sqrt(share * (1 - share) / count + room / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def page(
    first: Shard, second: Shard, output: Path, *, prompts: Sequence[str] = (), pairs: int = 50, seed: int = 0
) -> int:
    """Write the page, one self-contained file; returns the number of its pairs.

    prompts: shown above each pair, if given; those the images were drawn for. Raises UserError for images
    that are not of the same prompts and noise.
    """
    _check(first, second, prompts)
    ids = range(first.index.first, first.index.first + first.index.count)
    chosen = draw(random.Random(f"pairs {seed}").sample(ids, min(pairs, len(ids))), seed)
    shown = []
    for pair in chosen:
        images = [shard.image(SeedSet.A, pair.prompt) for shard in (first, second)]
        sides = images if pair.first_is_left else images[::-1]
        left, right = (uri(png(Image.fromarray(image)), "image/png") for image in sides)
        text = prompts[pair.prompt] if prompts else ""
        shown.append({"id": pair.prompt, "left": left, "right": right, "prompt": text})
    study = hashlib.sha256(
        f"{_identity(first)} {_identity(second)} {seed} {[pair.prompt for pair in chosen]}".encode()
    ).hexdigest()[:16]
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("halftone", "report"), autoescape=True)
    template = environment.get_template("preference.html.j2")
    write_text(output, template.render(study=study, seed=seed, pairs=shown))
    return len(shown)


def evaluate(files: Sequence[Path]) -> Share:
    """The preference in the files of one study, of one person each.

    Raises UserError for a file that is none, for files of different studies, and for a pair that was not
    in the study.
    """
    found = [_choices(path) for path in files]
    if len({one.study for one in found}) > 1:
        raise UserError("the files come from different studies; give those of one page")
    counts = {True: 0, False: 0}
    neither = 0
    for path, one in zip(files, found, strict=True):
        left = {pair.prompt: pair.first_is_left for pair in draw(one.pairs, one.seed)}
        for prompt, chosen in one.choices.items():
            if prompt not in left:
                raise UserError(f"{path}: pair {prompt} is not in the study; give the file the page made")
            if chosen is Chosen.NEITHER:
                neither += 1
            else:
                counts[left[prompt] == (chosen is Chosen.LEFT)] += 1
    decided = sum(counts.values())
    lo, hi = wilson(counts[True], decided)
    value = counts[True] / decided if decided else 0.5
    return Share(counts[True], counts[False], neither, value, lo, hi)


def _choices(path: Path) -> Choices:
    try:
        return Choices.model_validate(read_json(path))
    except ValidationError:
        raise UserError(f"{path}: not the choices of a preference page; give the file it made") from None


def _check(first: Shard, second: Shard, prompts: Sequence[str]) -> None:
    one, other = first.index, second.index
    for what, a, b in (
        ("prompts", one.prompts_sha256, other.prompts_sha256),
        ("images", (one.first, one.count), (other.first, other.count)),
        ("noise", one.seeds.get(SeedSet.A), other.seeds.get(SeedSet.A)),
        ("size", (one.height, one.width), (other.height, other.width)),
    ):
        if a != b:
            raise UserError(f"the two files differ in {what} ({a} and {b}): sample both alike")
    if prompts and prompts_sha256(prompts) != one.prompts_sha256:
        raise UserError("the prompts are not those that the images were drawn for; give their file")


def _identity(shard: Shard) -> str:
    index = shard.index
    return f"{index.model_sha256} {index.artefact_sha256} {index.execution}"
