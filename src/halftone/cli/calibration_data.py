"""`halftone calibration-data`: record the reference trajectory of the full-precision model."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options


def verb(
    model: options.ModelArgument,
    output: options.Output,
    prompts: options.Prompts = None,
    revision: options.Revision = None,
    n_prompts: Annotated[
        int, typer.Option(min=1, max=10_000, help="Prompts used, from the top of the file; or images.")
    ] = options.CALIBRATION.n_prompts,
    steps: options.Steps = 25,
    guidance: options.Guidance = None,
    resolution: options.Resolution = None,
    batch_size: options.BatchSize = options.CALIBRATION.batch_size,
    seed: options.Seed = 0,
    name: options.Name = None,
) -> None:
    """Record the denoiser's inputs at every call, for the calibration prompts, in full precision."""
    started = time.time()
    options.model(model, revision)
    options.resolution(resolution)
    texts = options.calibration(prompts, n_prompts)

    from halftone.source import load_source
    from halftone.steps.record import record

    trajectory, known = record(
        load_source(model, revision),
        texts,
        steps=steps,
        guidance=guidance,
        resolution=resolution,
        seed=seed,
        batch_size=batch_size,
    )
    trajectory.save(output, known)
    params = {
        "steps": steps,
        "guidance": known.guidance,
        "resolution": resolution,
        "n_prompts": n_prompts,
        "seed": seed,
    }
    tracking.log(
        tracking.Record(
            "calibration_data",
            options.name(name, output),
            output,
            params={"model": model, **params, "prompts_sha256": known.prompts_sha256},
            metrics={"calls": trajectory.n_calls},
            started=started,
        )
    )
