"""`halftone export`: pack a calibration into an artefact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options
from halftone.settings import Components


def verb(
    model: options.ModelArgument,
    calibration: Annotated[Path, typer.Option(help="State file of calibrate.", show_default=False)],
    plan: Annotated[Path, typer.Option(help="plan.json of analyze.", show_default=False)],
    output: options.Output,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Reference trajectory, of calibration-data: with it, parity.json is measured and kept.",
            show_default=False,
        ),
    ] = None,
    revision: options.Revision = None,
    components: options.ComponentsOption = Components.COPY,
    name: options.Name = None,
) -> None:
    """Write the artefact: integer weights packed at their bits, parameters, plan, provenance, hashes."""
    started = time.time()
    options.model(model, revision)
    options.existing(calibration, "calibrate")
    options.existing(plan, "analyze")

    if data is not None:
        options.existing(data, "calibration-data")

    from halftone.artefact import artefact_sha256, write
    from halftone.source import load_source
    from halftone.trajectory import Trajectory

    trajectory = None if data is None else Trajectory.load(data)[0]
    manifest = write(output, calibration, plan, load_source(model, revision), components, trajectory)
    tracking.log(
        tracking.Record(
            "export",
            options.name(name, output),
            output,
            params={"model": model, "artefact_sha256": artefact_sha256(output)},
            metrics={"size_mib": manifest.size / 2**20},
            files=(output / "manifest.json",),
            started=started,
        )
    )
