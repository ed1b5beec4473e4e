"""`halftone proxy`: is what the published methods address present in this model?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options
from halftone.settings import PromptSet

_RECORDED = "With --trajectory, that of the recording."


def verb(
    model: options.ModelArgument,
    output: options.Output,
    prompts: options.Prompts = None,
    trajectory: Annotated[
        Path | None,
        typer.Option(
            help="Of calibration-data, with the same prompts; recorded anew without.", show_default=False
        ),
    ] = None,
    revision: options.Revision = None,
    n_prompts: Annotated[
        int,
        typer.Option(
            "--n-prompts",
            "-n",
            min=1,
            max=10_000,
            help=f"Prompts used, from the top of the file. {_RECORDED}",
        ),
    ] = options.CALIBRATION.n_prompts,
    steps: options.Steps = 25,
    guidance: options.Guidance = None,
    resolution: options.Resolution = None,
    bits: options.BitsOption = "w8a8",
    batch_size: options.BatchSize = options.CALIBRATION.batch_size,
    seed: options.Seed = 0,
    name: options.Name = None,
) -> None:
    """Say which published methods can be judged on this model: range drift, outliers, attention, error
    growth.

    Writes card.md, card.json and a plot of each phenomenon. A --trajectory brings its number of prompts,
    steps, guidance, resolution and seed.
    """
    started = time.time()
    options.model(model, revision)
    options.resolution(resolution)
    options.bits(bits)
    count = None if trajectory is not None else n_prompts
    texts = n_prompts if prompts is None else options.prompts(prompts, count)
    if trajectory is not None:
        options.existing(trajectory, "calibration-data")

    from halftone.proxy.card import make_card
    from halftone.source import load_source
    from halftone.steps.record import record
    from halftone.trajectory import Trajectory
    from halftone.unconditional import check_text, numbered

    source = load_source(model, revision)
    if trajectory is not None:
        found, known = Trajectory.load(trajectory)
    else:
        found, known = record(
            source,
            texts,
            steps=steps,
            guidance=guidance,
            resolution=resolution,
            seed=seed,
            batch_size=batch_size,
        )
    check_text(source.pipeline, prompts is not None)
    asked = numbered(PromptSet.CALIBRATION, known.n_prompts) if isinstance(texts, int) else texts
    asked = asked[: known.n_prompts]
    label = options.name(name, output)
    card = make_card(source, found, known, asked, name=label, bits=bits, batch_size=batch_size)
    files = card.save(output)
    for finding in card.findings:
        print(f"{finding.title:42} {finding.verdict:15} {', '.join(finding.methods)}: {finding.consequence}")
    tracking.log(
        tracking.Record(
            "proxy",
            label,
            output,
            params={
                "model": model,
                "model_sha256": known.model_sha256,
                "steps": known.steps,
                "guidance": known.guidance,
                "n_prompts": known.n_prompts,
                "bits": bits,
                **{finding.key: finding.verdict for finding in card.findings},
            },
            metrics=card.figures(),
            files=tuple(files),
            started=started,
        )
    )
