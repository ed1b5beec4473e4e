"""`halftone propagation`: how error travels through the calls of a sampling run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halftone.cli import options
from halftone.errors import UserError

if TYPE_CHECKING:
    from halftone.propagation import Curves


def verb(
    model: options.ModelArgument,
    artefacts: Annotated[
        list[Path], typer.Argument(help="Artefacts of the model, such as static and pcr.", show_default=False)
    ],
    data: options.Data,
    output: options.Output,
    revision: options.Revision = None,
    batch_size: options.BatchSize = options.CALIBRATION.batch_size,
) -> None:
    """Plot the error of the latents after every call, as the model samples and from full precision's latents.

    Writes propagation.json and propagation.svg into a folder. Relaxed calls are shaded. Drift is told too:
    how far the mean of the latents is off, over all prompts, in standard deviations between prompts.
    """
    options.model(model, revision)
    options.existing(data, "calibration-data")
    names = [path.name for path in artefacts]
    for path in artefacts:
        options.existing(path, "export")
        if names.count(path.name) > 1:
            raise UserError(f"{path}: two artefacts are called {path.name}; give them names of their own")

    from halftone.propagation import propagation
    from halftone.source import load_source
    from halftone.trajectory import Trajectory

    trajectory, known = Trajectory.load(data)
    by_name = dict(zip(names, artefacts, strict=True))
    found = propagation(load_source(model, revision), trajectory, known, by_name, batch_size=batch_size)
    for one in found.artefacts:
        own, whole = one.teacher_forced[-1], one.free_running[-1]
        print(f"{one.name:40} latents off by {whole:.2%}, by the last call alone {own:.2%}{_drift(one)}")
    print(f"{found.denoiser_calls} denoiser calls")
    found.save(output)


def _drift(found: Curves) -> str:
    """The largest drift of the first half of the calls, where it is decided what is drawn."""
    half = found.drift[: (len(found.drift) + 1) // 2]
    if not half:
        return ""
    call = max(range(len(half)), key=half.__getitem__)
    return (
        f", drift {half[call]:.2f} of the spread between images at call {call} "
        f"(standard error {found.drift_error[call]:.2f})"
    )
