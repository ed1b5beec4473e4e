"""`halftone reparameterize`: factors that move range from activations to weights."""

from __future__ import annotations

import time

from halftone import tracking
from halftone.cli import options
from halftone.errors import UserError
from halftone.policies import Reparameterization
from halftone.settings import Protocol


def verb(
    model: options.ModelArgument,
    data: options.Data,
    recipe: options.Recipe,
    bits: options.BitsOption,
    output: options.Output,
    revision: options.Revision = None,
    axes: options.AxesOption = None,
    protocol: options.ProtocolOption = Protocol.EQUAL,
    batch_size: options.BatchSize = options.CALIBRATION.batch_size,
    name: options.Name = None,
) -> None:
    """Find a factor for every input channel of the layers that the axis `reparameterization` names.

    Writes factors.safetensors, which reconstruct and calibrate take, and what the factors balance:
    imbalance.json and imbalance.svg.
    """
    started = time.time()
    options.model(model, revision)
    resolved, width = options.axes(recipe, axes), options.bits(bits)
    if resolved.reparameterization is Reparameterization.NONE:
        raise UserError(f"recipe {recipe} reparameterizes nothing: go on without, or set the axis")
    options.existing(data, "calibration-data")

    from halftone.source import load_source
    from halftone.steps.choice import Choice
    from halftone.steps.reparameterize import reparameterize
    from halftone.trajectory import Trajectory

    trajectory, known = Trajectory.load(data)
    choice = Choice(recipe, resolved, width, protocol)
    source = load_source(model, revision)
    found = reparameterize(source, trajectory, known, choice, batch_size=batch_size)
    files = found.save(output, choice.describe(known))
    print(f"{len(found.layers)} layers, {found.denoiser_calls} denoiser calls")
    print(f"the denoiser's output changes by {found.difference:.2g} of its largest value")
    tracking.log(
        tracking.Record(
            "reparameterize",
            options.name(name, output),
            output,
            params={"model": model, "recipe": recipe, "bits": bits, "protocol": protocol},
            metrics={
                "layers": len(found.layers),
                "difference": found.difference,
                "denoiser_calls": found.denoiser_calls,
            },
            files=tuple(files),
            started=started,
        )
    )
