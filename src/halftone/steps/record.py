"""The step `calibration_data`: the reference trajectory of the full-precision model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halftone import device, provenance
from halftone.prompts import check_lengths
from halftone.provenance import Provenance
from halftone.source import Source
from halftone.trajectory import Trajectory
from halftone.trajectory import record as record_trajectory


def record(
    source: Source,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    resolution: int | None,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[Trajectory, Provenance]:
    """The reference trajectory of a full-precision model.

    Raises UserError for prompts that its tokenizer would cut.
    """
    pipeline = source.pipeline.to(device.best())
    check_lengths(prompts, pipeline)
    schedule: dict[str, Any] = {"steps": steps, "guidance": guidance, "resolution": resolution, "seed": seed}
    known = provenance.describe(
        pipeline,
        model_path=source.path,
        model_revision=source.revision,
        model_sha256=source.weights_sha256,
        prompts=prompts,
        **schedule,
    )
    return record_trajectory(pipeline, prompts, batch_size=batch_size, **schedule), known
