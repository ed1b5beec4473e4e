"""`halftone outliers`: where the outliers of a model's activations sit."""

from __future__ import annotations

import time

from halftone import tracking
from halftone.cli import options


def verb(
    model: options.ModelArgument,
    data: options.Data,
    output: options.Output,
    revision: options.Revision = None,
    batch_size: options.BatchSize = options.CALIBRATION.batch_size,
    name: options.Name = None,
) -> None:
    """Say where outliers of activations sit: in channels or in positions, which ones, and for how long.

    Runs the full-precision denoiser once along the trajectory. Writes outliers.json, a map of all layers by
    all calls (outliers.svg) and the layers with the widest outliers (worst.svg).
    """
    started = time.time()
    options.model(model, revision)
    options.existing(data, "calibration-data")

    from halftone.outliers import find
    from halftone.source import load_source
    from halftone.trajectory import Trajectory

    trajectory, known = Trajectory.load(data)
    label = options.name(name, output)
    found, seen = find(load_source(model, revision), trajectory, known, name=label, batch_size=batch_size)
    files = found.save(output, seen)
    for line in found.say():
        print(line)
    tracking.log(
        tracking.Record(
            "outliers",
            label,
            output,
            params={"model": model, "model_sha256": known.model_sha256, "n_prompts": known.n_prompts},
            metrics=found.figures(),
            files=tuple(files),
            started=started,
        )
    )
