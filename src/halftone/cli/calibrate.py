"""`halftone calibrate`: weight codes and activation parameters."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halftone import tracking
from halftone.axes import Axes
from halftone.cli import factors as factor_files
from halftone.cli import options
from halftone.errors import UserError
from halftone.policies import Rounding
from halftone.relaxing import Interval
from halftone.settings import Budget, Protocol, Reconstruction

if TYPE_CHECKING:
    from halftone.layers import WeightCodes
    from halftone.provenance import Provenance


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
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="sensitivity.json, for a recipe with relaxing: auto.", show_default=False),
    ] = None,
    revision: options.Revision = None,
    axes: options.AxesOption = None,
    protocol: options.ProtocolOption = Protocol.EQUAL,
    batch_size: options.BatchSize = options.CALIBRATION.batch_size,
    budget: options.BudgetOption = options.RECONSTRUCTION.budget,
    unit_batch_size: Annotated[
        int, typer.Option(min=1, help="Samples per iteration, for a recipe that learns its scales.")
    ] = options.RECONSTRUCTION.batch_size,
    cache_mib: options.CacheMib = options.RECONSTRUCTION.cache_mib,
    scratch: options.Scratch = None,
    name: options.Name = None,
) -> None:
    """Quantize the weights, and find the range of every activation at every call.

    Interrupted, the same command goes on with the call it was at.
    """
    started = time.time()
    options.model(model, revision)
    resolved, width = options.axes(recipe, axes), options.bits(bits)
    factor_files.check(factors, recipe, resolved)
    check_weights(weights, recipe, resolved)
    auto = resolved.relaxing == Interval.AUTO
    if auto and sensitivity is None:
        raise UserError(
            f"recipe {recipe} with relaxing auto: add --sensitivity, made with `halftone sensitivity`"
        )
    if sensitivity is not None and not auto:
        raise UserError(f"recipe {recipe}: relaxing is not auto: leave --sensitivity out")
    options.existing(data, "calibration-data")

    from halftone.sensitivity import Sensitivity
    from halftone.source import load_source
    from halftone.steps.calibrate import calibrate
    from halftone.steps.choice import Choice
    from halftone.trajectory import Trajectory

    trajectory, known = Trajectory.load(data)
    choice = Choice(recipe, resolved, width, protocol)
    chosen = choice.describe(known)
    codes, learned = codes_of(weights, chosen)
    relaxed = None
    if sensitivity is not None:
        measured = Sensitivity.load(options.existing(sensitivity, "sensitivity"))
        options.same_row(sensitivity, measured.made_for, chosen, "measure")
        relaxed = measured.relaxed_calls
    work = options.scratch(scratch, output)
    work.mkdir(parents=True, exist_ok=True)
    state = calibrate(
        load_source(model, revision),
        trajectory,
        known,
        choice,
        factors=factor_files.read(factors, chosen),
        weights=codes,
        batch_size=batch_size,
        how=Reconstruction(budget=budget, batch_size=unit_batch_size, cache_mib=cache_mib),
        work=work,
        relaxed=relaxed,
    )
    state.save(output, choice.describe(known, learned))
    shutil.rmtree(work, ignore_errors=True)
    tracking.log(
        tracking.Record(
            "calibrate",
            options.name(name, output),
            output,
            params={"model": model, "recipe": recipe, "bits": bits, "protocol": protocol},
            metrics={
                "weights": len(state.weights),
                "activations": len(state.activations),
                "calibration_denoiser_calls": state.denoiser_calls,
            },
            started=started,
        )
    )


def check_weights(weights: Path | None, recipe: str, axes: Axes) -> None:
    """Raises UserError for reconstructed weights that the recipe needs and has not, or has and needs not."""
    learned = axes.rounding is not Rounding.NEAREST
    if learned and weights is None:
        raise UserError(
            f"recipe {recipe} learns its rounding: add --weights, made with `halftone reconstruct`"
        )
    if weights is not None and not learned:
        raise UserError(f"recipe {recipe} rounds weights to nearest: leave --weights out")


def codes_of(weights: Path | None, chosen: Provenance) -> tuple[dict[str, WeightCodes] | None, Budget | None]:
    """Reconstructed weights, if any, and their budget. Raises UserError for those of another row."""
    from halftone.passes.reconstructed import load
    from halftone.provenance import Provenance

    if weights is None:
        return None, None
    found, metadata = load(options.existing(weights, "reconstruct"))
    made_for = Provenance.from_metadata(metadata, weights)
    options.same_row(weights, made_for.model_copy(update={"budget": None}), chosen, "reconstruct")
    return found.weights, made_for.budget
