"""The step `calibration_data`: the reference trajectory of the full-precision model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halftone import device, provenance
from halftone.prompts import check_lengths
from halftone.provenance import Provenance
from halftone.settings import PromptSet
from halftone.source import Source
from halftone.trajectory import Trajectory
from halftone.trajectory import record as record_trajectory
from halftone.unconditional import check_text, guidance_of, numbered, usual_guidance


def record(
    source: Source,
    prompts: Sequence[str] | int,
    *,
    steps: int,
    guidance: float | None,
    resolution: int | None,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[Trajectory, Provenance]:
    """The reference trajectory of a full-precision model. prompts: of a model without text, how many images.

    guidance: None for the usual one, and for a model without text. Raises UserError for prompts that its
    tokenizer would cut, and for prompts or guidance of a model without text.
    """
    check_text(source.pipeline, not isinstance(prompts, int))
    guidance = guidance_of(source.pipeline, guidance, usual_guidance(source.pipeline))
    pipeline = source.pipeline.to(device.best())
    if isinstance(prompts, int):
        prompts = numbered(PromptSet.CALIBRATION, prompts)
    else:
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
