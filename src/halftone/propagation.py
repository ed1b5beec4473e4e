"""How quantization error travels: error of the latents against call, free-running and teacher-forced.

Free-running, the quantized model samples, and a call inherits what the calls before it did. Teacher-forced,
every call starts from full precision's latents and sampler state, so the error after it is its own. Where the
first outgrows the second, what is left to a recipe is the inherited error (PCR, PAR).

What all images are off by alike, the drift, changes what a model draws and not only how well: grounds turn
into other grounds. A sampler that clips its estimate of the image makes drift of mere noise, because what
noise pushes past the limit is cut off on that side alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from halftone import device
from halftone.artefact.load import describe, load
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.files import write_json, write_text
from halftone.passes.rollout import Inputs, Outputs, Runs, roll, runs_of, teacher_forced
from halftone.progress import Progress
from halftone.provenance import Provenance
from halftone.report.plots import Errors, errors_svg
from halftone.source import Source
from halftone.steps.choice import check_same_model
from halftone.trajectory import Trajectory

DATA, PLOT = "propagation.json", "propagation.svg"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Curves(_Part):
    """Of one artefact, after every call: |latents - full precision's| / |full precision's|, mean over the
    prompts; and of the free-running latents their drift, empty where there is one prompt only, with its
    standard error."""

    name: str
    recipe: str
    bits: str
    relaxed_calls: tuple[int, ...]
    free_running: tuple[float, ...]
    teacher_forced: tuple[float, ...]
    drift: tuple[float, ...]
    drift_error: tuple[float, ...]


class Propagation(_Part):
    """What `halftone propagation` finds."""

    format: int = 2
    prompts: int
    prompts_sha256: str
    model_sha256: str | None
    denoiser_calls: int = Field(description="made for this, each on one batch")
    artefacts: tuple[Curves, ...]

    def save(self, folder: Path) -> list[Path]:
        """propagation.json and propagation.svg."""
        write_json(folder / DATA, self.model_dump(mode="json"))
        rows = [
            Errors(
                one.name,
                one.free_running,
                one.free_running,
                one.free_running,
                one.relaxed_calls,
                one.teacher_forced,
            )
            for one in self.artefacts
        ]
        write_text(folder / PLOT, errors_svg(rows))
        return [folder / DATA, folder / PLOT]


def propagation(
    source: Source,
    trajectory: Trajectory,
    known: Provenance,
    artefacts: Mapping[str, Path],
    *,
    batch_size: int,
) -> Propagation:
    """Measure artefacts of one model, by name, on the prompts and the noise of its reference trajectory.

    2 N denoiser calls per batch and artefact, and N for full precision. Raises UserError for an artefact of
    another model or schedule.
    """
    check_same_model(source, known)
    for name, folder in artefacts.items():
        _check(name, folder, trajectory, known)
    place = device.best()
    pipeline = source.pipeline.to(place)
    runs = runs_of(pipeline, trajectory, known, batch_size)
    whole = teacher_forced(denoiser_of(pipeline), trajectory, runs)
    reference = roll(pipeline, trajectory, runs, lambda call, batch, _: whole[call][batch]).latents
    calls = len(runs) * trajectory.n_calls
    found = []
    for name, folder in artefacts.items():
        plan = describe(folder).plan
        quantized = load(folder, device=place)
        denoiser, context = denoiser_of(quantized), quantized._halftone_context
        context.detach()

        def answer(call: int, _: int, given: Inputs, denoiser: Any = denoiser, at: Any = context) -> Tensor:
            with at.at(call):
                return denoiser(**given)[0]

        free = roll(pipeline, trajectory, runs, answer).latents
        forced = _forced(
            pipeline, trajectory, runs, whole, teacher_forced(denoiser, trajectory, runs, context)
        )
        calls += 2 * len(runs) * trajectory.n_calls
        drift, drift_error = drifts(free, reference)
        found.append(
            Curves(
                name=name,
                recipe=plan.recipe,
                bits=plan.bits,
                relaxed_calls=plan.relaxed_calls,
                free_running=relative_errors(free, reference),
                teacher_forced=relative_errors(forced, reference),
                drift=drift,
                drift_error=drift_error,
            )
        )
    return Propagation(
        prompts=trajectory.n_prompts,
        prompts_sha256=known.prompts_sha256,
        model_sha256=known.model_sha256,
        denoiser_calls=calls,
        artefacts=tuple(found),
    )


def relative_errors(latents: Tensor, reference: Tensor) -> tuple[float, ...]:
    """|latents - reference| / |reference| by call, mean over the prompts, of (calls, prompts, ...)."""
    ours, theirs = (x.double().flatten(2) for x in (latents, reference))
    errors = ((ours - theirs).norm(dim=2) / theirs.norm(dim=2)).mean(dim=1)
    return tuple(float(f"{error:.6g}") for error in errors.tolist())


def drifts(latents: Tensor, reference: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By call, of (calls, prompts, channels, ...): how far the mean of a channel is off, averaged over the
    prompts, in standard deviations of that mean between prompts; and the standard error of it. Both are root
    mean squares over the channels, and empty for one prompt, prompts that do not differ, and latents that
    are no images."""
    if latents.ndim != 5 or latents.shape[1] < 2:
        return (), ()
    ours, theirs = (x.double().flatten(3).mean(dim=3) for x in (latents, reference))
    spread, errors = theirs.std(dim=1), ours - theirs
    if not spread.all():
        return (), ()
    noise = errors.std(dim=1) / latents.shape[1] ** 0.5
    rms = (((part / spread) ** 2).mean(dim=1).sqrt() for part in (errors.mean(dim=1), noise))
    shift, error = (tuple(float(f"{value:.6g}") for value in part.tolist()) for part in rms)
    return shift, error


def _forced(pipeline: Any, trajectory: Trajectory, runs: Runs, whole: Outputs, own: Outputs) -> Tensor:
    """Latents after every call that has a quantized output while all before it have full precision's. The
    outputs are known, so no denoiser runs: the samplers are taken to each call anew."""
    progress, found = Progress("teacher-forced", trajectory.n_calls), []
    for last in range(trajectory.n_calls):

        def answer(call: int, batch: int, _: Inputs, last: int = last) -> Tensor:
            return (own if call == last else whole)[call][batch]

        found.append(roll(pipeline, trajectory, runs, answer, calls=last + 1).latents[last])
        progress.advance()
    return torch.stack(found)


def _check(name: str, folder: Path, trajectory: Trajectory, known: Provenance) -> None:
    described = describe(folder)
    if described.provenance.model_sha256 != known.model_sha256:
        raise UserError(f"{name}: an artefact of another model than the trajectory's")
    if described.plan.calls != trajectory.n_calls:
        raise UserError(
            f"{name}: calibrated for {described.plan.calls} calls, the trajectory has {trajectory.n_calls}"
        )
