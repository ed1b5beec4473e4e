"""`halftone summary`: the rows of all metrics as one table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options


def verb(
    metrics: Annotated[list[Path], typer.Argument(help="JSON files of metrics.", show_default=False)],
    output: options.Output,
    timings: Annotated[
        Path | None, typer.Option(help="Folder of Snakemake's benchmark files.", show_default=False)
    ] = None,
) -> None:
    """Put the rows of all metrics files into one CSV, with the time and memory that they took."""
    started = time.time()

    from halftone.report.summary import summarize

    summarize(metrics, output, timings)
    tracking.log(
        tracking.Record(
            "summary",
            "",
            output,
            metrics={"files": len(metrics)},
            files=(output,),
            started=started,
        )
    )
