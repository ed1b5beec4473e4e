"""`halftone analyze`: what a calibration amounts to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options


def verb(
    calibration: Annotated[Path, typer.Argument(help="State file of calibrate.", show_default=False)],
    output: options.Output,
    name: options.Name = None,
) -> None:
    """Write the plan (what is quantized how), statistics of every site, and a plot of the ranges.

    Runs no denoiser.
    """
    started = time.time()
    options.existing(calibration, "calibrate")

    from halftone.analysis import PLAN, RANGES, STATISTICS, analyze

    plan = analyze(calibration, output, name=options.name(name, output))
    figures = {key: value for key, value in plan.columns().items() if isinstance(value, int | float)}
    tracking.log(
        tracking.Record(
            "analyze",
            options.name(name, output),
            output,
            params={"recipe": plan.recipe, "bits": plan.bits, "protocol": plan.protocol},
            metrics={**figures, "quantized_sites": len(plan.quantized)},
            files=(output / PLAN, output / STATISTICS, output / RANGES),
            started=started,
        )
    )
