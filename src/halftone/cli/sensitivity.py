"""`halftone sensitivity`: which calls to relax, measured."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import factors as factor_files
from halftone.cli import options
from halftone.cli.calibrate import check_weights, codes_of
from halftone.errors import UserError
from halftone.relaxing import WINDOWS, Interval
from halftone.settings import Protocol, Reconstruction


def verb(
    model: options.ModelArgument,
    data: options.Data,
    recipe: options.Recipe,
    bits: options.BitsOption,
    output: options.Output,
    factors: factor_files.Given = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Of reconstruct, for a recipe that learns its rounding.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Those of the trajectory: text match is then measured too.", show_default=False),
    ] = None,
    clip: Annotated[
        str, typer.Option(help="Of the text match: scenes, or an open_clip model as ARCHITECTURE/WEIGHTS.")
    ] = options.METRICS.clip,
    windows: Annotated[
        int, typer.Option(min=2, max=1000, help="Runs of calls that are told apart.")
    ] = WINDOWS,
    revision: options.Revision = None,
    axes: options.AxesOption = None,
    protocol: options.ProtocolOption = Protocol.EQUAL,
    batch_size: options.BatchSize = options.CALIBRATION.batch_size,
    budget: options.BudgetOption = options.RECONSTRUCTION.budget,
    unit_batch_size: Annotated[
        int, typer.Option(min=1, help="Samples per iteration, for a recipe that learns its scales.")
    ] = options.RECONSTRUCTION.batch_size,
    scratch: options.Scratch = None,
    name: options.Name = None,
) -> None:
    """Measure how much each window of calls matters, and choose those to relax, for `relaxing: auto`.

    Writes sensitivity.json, which calibrate takes, and sensitivity.svg into a folder.
    """
    started = time.time()
    options.model(model, revision)
    resolved, width = options.axes(recipe, axes), options.bits(bits)
    if resolved.relaxing != Interval.AUTO:
        raise UserError(f"recipe {recipe}: relaxing is not auto, so there is nothing to choose; set the axis")
    factor_files.check(factors, recipe, resolved)
    check_weights(weights, recipe, resolved)
    options.existing(data, "calibration-data")
    texts = None if prompts is None else options.prompts(prompts, None)

    from halftone.evaluate.alignment import open_clip_model
    from halftone.prompts import prompts_sha256
    from halftone.source import load_source
    from halftone.steps.choice import Choice
    from halftone.steps.sensitivity import sensitivity
    from halftone.trajectory import Trajectory

    trajectory, known = Trajectory.load(data)
    choice = Choice(recipe, resolved, width, protocol)
    if texts is not None:
        texts = texts[: trajectory.n_prompts]
        if prompts_sha256(texts) != known.prompts_sha256:
            raise UserError(f"{prompts}: not the prompts that {data} was recorded with")
    work = options.scratch(scratch, output)
    work.mkdir(parents=True, exist_ok=True)
    found = sensitivity(
        load_source(model, revision),
        trajectory,
        known,
        choice,
        factors=factor_files.read(factors, choice.describe(known)),
        weights=codes_of(weights, choice.describe(known))[0],
        batch_size=batch_size,
        how=Reconstruction(budget=budget, batch_size=unit_batch_size),
        work=work,
        n_windows=windows,
        prompts=texts,
        clip=None if texts is None else open_clip_model(clip),
    )
    files = found.save(output)
    shutil.rmtree(work, ignore_errors=True)
    calls = ", ".join(map(str, found.relaxed_calls))
    print(f"relax calls {calls or 'none'}: {found.average_bits:.3g} activation bits on average")
    print(f"{found.denoiser_calls} denoiser calls beside calibration")
    tracking.log(
        tracking.Record(
            "sensitivity",
            options.name(name, output),
            output,
            params={"model": model, "recipe": recipe, "bits": bits, "relaxed_calls": calls},
            metrics={"average_bits": found.average_bits, "denoiser_calls": found.denoiser_calls},
            files=tuple(files),
            started=started,
        )
    )
