"""`halftone sample`: images from an artefact, or from the full-precision model."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options
from halftone.errors import UserError
from halftone.plan import Execution
from halftone.settings import PromptSet


def verb(
    source: Annotated[str, typer.Argument(help="Artefact, or a full-precision model.", show_default=False)],
    output: options.Output,
    prompts: options.Prompts = None,
    n_images: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Images per seed set, one a prompt. (Default: all prompts.)"),
    ] = None,
    image_set: options.ImageSet = None,
    shard: Annotated[
        str, typer.Option(help="Which slice of them: 0-of-2 and 1-of-2 are both halves.")
    ] = "0-of-1",
    seed_a: Annotated[
        int, typer.Option(min=0, help="Seed set A: the reference noise.")
    ] = options.SAMPLING.seed_a,
    seed_b: Annotated[int, typer.Option(min=0, help="Seed set B: disjoint noise.")] = options.SAMPLING.seed_b,
    paired: Annotated[
        bool, typer.Option("--paired", help="Seed set A only, with the latents of every call.")
    ] = False,
    revision: options.Revision = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Inference steps. (Default: the artefact's.)")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=50, help="Guidance scale. (Default: the artefact's.)")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, max=4096, help="Pixels, a multiple of 8. (Default: the artefact's.)")
    ] = None,
    execution: Annotated[
        Execution, typer.Option(help="Of an artefact: simulated in float, or integer on the CPU.")
    ] = Execution.SIMULATED,
    name: options.Name = None,
) -> None:
    """Sample images for the prompts in both seed sets, into a zip of PNGs.

    A model without text draws numbered images of --image-set.

    An image depends on its prompt, its place in the file and its seed alone, not on how the rest is divided.
    """
    started = time.time()
    options.model(source, revision)
    options.resolution(resolution)
    place, n_shards = _shard(shard)
    if seed_a == seed_b and not paired:
        raise UserError(f"--seed-a and --seed-b are both {seed_a}; they must differ")
    if execution is Execution.FLOAT:
        raise UserError("--execution float: is that of a full-precision model; give the model itself")
    count = images(prompts, n_images)
    if prompts is not None and image_set is not None:
        raise UserError("--image-set is for a model without text; leave it or --prompts out")

    from halftone import device
    from halftone.sampling import load_subject, sample_shard

    subject = load_subject(
        source,
        revision=revision,
        steps=steps,
        guidance=guidance,
        resolution=resolution,
        device="cpu" if execution is Execution.INTEGER else device.best(),
        execution=execution,
    )
    if execution is not subject.execution is Execution.SIMULATED:
        print("some modules have no integer kernel and are simulated; halftone info lists them")
    index = sample_shard(
        output,
        subject,
        prompts,
        n_images=count,
        shard=place,
        n_shards=n_shards,
        seed_a=seed_a,
        seed_b=seed_b,
        paired=paired,
        image_set=image_set or PromptSet.VALIDATION,
    )
    drawn = len(index.seeds) * index.count
    tracking.log(
        tracking.Record(
            "sample",
            options.name(name, output),
            output,
            params={
                "source": source,
                "shard": shard,
                **index.model_dump(include={"steps", "guidance", "recipe", "bits", "execution"}),
            },
            metrics={
                "images": drawn,
                "images_per_second": drawn / (time.time() - started),
            },
            started=started,
        )
    )


def images(prompts: Path | None, n_images: int | None) -> int:
    """How many images per seed set. Raises UserError where neither prompts nor a number say so."""
    if prompts is not None:
        return len(options.prompts(prompts, n_images))
    if n_images is None:
        raise UserError("give --prompts FILE; or, for a model without text, how many images: --n-images")
    return n_images


def _shard(text: str) -> tuple[int, int]:
    """`1-of-4` -> (1, 4)."""
    match = re.fullmatch(r"(\d+)-of-(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text}: write it as 0-of-4, counting from 0 to 3")
    return int(match[1]), int(match[2])
