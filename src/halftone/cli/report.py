"""`halftone report`: one page with tables, grids of images, plots and provenance."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options


def verb(
    summary: Annotated[Path, typer.Option(help="CSV of summary.", show_default=False)],
    output: options.Output,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the rules' results. (Default: that of the summary.)", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Prompt files for captions, told apart by their hash; repeat.", show_default=False),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="Also write the grids of images as one PNG.", show_default=False)
    ] = None,
) -> None:
    """Write the page: one file, nothing to download, opens anywhere."""
    started = time.time()
    options.existing(summary, "summary")
    for file in prompts or []:
        options.prompts(file, None)

    from halftone.report.page import write_report

    write_report(summary, output, results=results, prompts=prompts or [], grid=grid)
    tracking.log(
        tracking.Record(
            "report",
            "",
            output,
            files=(output, *([grid] if grid else [])),
            started=started,
        )
    )
