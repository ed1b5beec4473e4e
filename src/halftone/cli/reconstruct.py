"""`halftone reconstruct`: learn how to round the weights, block by block."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halftone import tracking
from halftone.cli import factors as factor_files
from halftone.cli import options
from halftone.errors import UserError
from halftone.policies import Rounding
from halftone.settings import Protocol, Reconstruction

if TYPE_CHECKING:
    from halftone.passes.reconstructed import UnitReport


def verb(
    model: options.ModelArgument,
    data: options.Data,
    recipe: options.Recipe,
    bits: options.BitsOption,
    output: options.Output,
    factors: factor_files.Given = None,
    revision: options.Revision = None,
    axes: options.AxesOption = None,
    protocol: options.ProtocolOption = Protocol.EQUAL,
    budget: options.BudgetOption = options.RECONSTRUCTION.budget,
    cache_mib: options.CacheMib = options.RECONSTRUCTION.cache_mib,
    batch_size: options.BatchSize = options.RECONSTRUCTION.batch_size,
    seed: options.Seed = 0,
    scratch: options.Scratch = None,
    shared: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which finished blocks stay, for rows whose weights are learned alike.",
            show_default=False,
        ),
    ] = None,
    name: options.Name = None,
) -> None:
    """Learn the rounding of weights block by block, so that each block's output stays that of full precision.

    Interrupted, the same command goes on with the block it was at.
    """
    started = time.time()
    options.model(model, revision)
    resolved, width = options.axes(recipe, axes), options.bits(bits)
    if resolved.rounding is Rounding.NEAREST:
        raise UserError(
            f"recipe {recipe} rounds weights to nearest: nothing to reconstruct; go on with calibrate"
        )
    factor_files.check(factors, recipe, resolved)
    options.existing(data, "calibration-data")

    from halftone.source import load_source
    from halftone.steps.choice import Choice
    from halftone.steps.reconstruct import reconstruct
    from halftone.trajectory import Trajectory

    trajectory, known = Trajectory.load(data)
    choice = Choice(recipe, resolved, width, protocol)
    how = Reconstruction(budget=budget, batch_size=batch_size, cache_mib=cache_mib)
    work = options.scratch(scratch, output)
    source = load_source(model, revision)
    chosen = choice.describe(known)
    found = reconstruct(
        source,
        trajectory,
        known,
        choice,
        factors=factor_files.read(factors, chosen),
        how=how,
        seed=seed,
        checkpoint=work,
        shared=shared,
    )
    found.save(output, choice.describe(known, budget).to_metadata())
    shutil.rmtree(work, ignore_errors=True)
    rounds = [[unit for unit in found.units if unit.round == k + 1] for k in range(resolved.rounds)]
    if rounds[0]:
        undecided = statistics.mean(unit.polarisation for unit in rounds[0])
        print(
            f"{len(rounds[0])} units: errors {_ratio(rounds[0]):.3g} times lower than rounded to nearest, "
            f"{min(unit.ratio for unit in rounds[0]):.3g} at worst; {undecided:.2g} from 0 or 1 at hardening"
        )
    for k, units in enumerate(rounds[1:], 2):
        print(f"round {k}: errors of the units {_ratio(units):.3g} times lower than with the codes before")
    if found.denoiser_calls:
        print(f"{found.denoiser_calls} denoiser calls for the data of later rounds")
    gains = [unit.ratio for unit in rounds[0] if unit.ratio != float("inf")]
    tracking.log(
        tracking.Record(
            "reconstruct",
            options.name(name, output),
            output,
            params={"recipe": recipe, "bits": bits, "protocol": protocol, "budget": budget, "seed": seed},
            metrics={
                "units": len(rounds[0]),
                "kept_nearest": sum(unit.kept_nearest for unit in rounds[0]),
                "mean_error_ratio": sum(gains) / len(gains) if gains else 1.0,
                "rounds": len(rounds),
                "reconstruction_denoiser_calls": found.denoiser_calls,
                **{f"error_ratio_round_{k}": _ratio(units) for k, units in enumerate(rounds[1:], 2)},
            },
            started=started,
        )
    )


def _ratio(units: Sequence[UnitReport]) -> float:
    """Median over the units of a round."""
    return statistics.median(unit.ratio for unit in units)
