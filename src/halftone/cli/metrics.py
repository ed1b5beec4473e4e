"""`halftone metrics`: the figures of one row."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options


def verb(
    images: options.RowImages,
    reference: options.ReferenceImages,
    output: options.Output,
    prompts: options.Prompts = None,
    artefact: Annotated[
        Path | None,
        typer.Option(help="That the images were sampled from; none for full precision.", show_default=False),
    ] = None,
    features: Annotated[
        str, typer.Option(help="Feature network of FID and KID: scenes or inception.")
    ] = options.METRICS.features,
    clip: Annotated[
        str, typer.Option(help="`scenes`, or an open_clip model as ARCHITECTURE/WEIGHTS.")
    ] = options.METRICS.clip,
    bootstrap: Annotated[
        int, typer.Option(min=100, max=100_000, help="Resamples of paired intervals.")
    ] = options.METRICS.bootstrap,
    real_images: options.RealImages = None,
    seed: options.Seed = 0,
    model: Annotated[str, typer.Option(help="Id of the model, for the table.")] = "model",
    tier: Annotated[str, typer.Option(help="Rows of different tiers are never compared.")] = "own",
    name: options.Name = None,
) -> None:
    """Measure images against those of full precision, with intervals; per-image data goes beside the JSON."""
    started = time.time()
    settings = options.metrics(features, clip, bootstrap)
    if prompts is not None:
        options.prompts(prompts, None)
    for path in [*images, *reference]:
        options.existing(path, "sample")
    if artefact is not None:
        options.existing(artefact, "export")

    from halftone.evaluate.scenario import measure_files

    found = measure_files(
        images,
        reference,
        prompts,
        output,
        settings=settings,
        seed=seed,
        model=model,
        tier=tier,
        name=options.name(name, output),
        artefact=artefact,
        real_images=real_images,
    )
    row = found.rows[0]
    labels = ("model", "recipe", "protocol", "tier", "execution", "weight_bits", "act_bits", "features")
    figures = {
        key: value for key, value in row.items() if isinstance(value, int | float) and key not in labels
    }
    tracking.log(
        tracking.Record(
            "metrics",
            options.name(name, output),
            output,
            params={key: row.get(key) for key in (*labels, "prompts_sha256", "artefact_sha256")},
            metrics=figures,
            files=(output,),
            started=started,
        )
    )
