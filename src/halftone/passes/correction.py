"""What to take off a quantized denoiser's output at every call, found as it samples.

Call after call, on latents that the calls before made, corrected: the mean error of every channel over
positions and images, after guidance (PTQD: its correction of the mean, here without the factor and the
variance). Where drift is corrected too, the prediction of noise is raised by what takes half of what the
latents have too much of away with this call. Mean errors cannot tell all of it: a sampler that clips its
estimate of the image cuts off on one side what noise, of no mean, pushes past the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.correction import channels_of, taken_off
from halftone.errors import UserError
from halftone.passes import checkpoint as checkpoints
from halftone.passes.rollout import Inputs, Runs, roll_together
from halftone.policies import Correction
from halftone.progress import Progress
from halftone.trajectory import Trajectory

DRIFT_SHARE = 0.5
"""Of the drift, taken away by one call (our choice)."""
LARGEST_PUSH = 0.25
"""A bound far beyond what drift asks for, so that none runs away (our choice)."""


def check_correction(pipeline: Any, axes: Axes) -> None:
    """Raises UserError where drift is to be corrected and the denoiser predicts something else than noise,
    and for a pipeline that packs its latents."""
    if axes.correction is not Correction.NONE and hasattr(pipeline, "_unpack_latents"):
        raise UserError(
            f"correction {axes.correction}: is for latents of channels, height and width, which "
            f"{type(pipeline).__name__} packs; write correction: none"
        )
    kind = getattr(pipeline.scheduler.config, "prediction_type", None)
    if axes.correction is Correction.DRIFT and kind != "epsilon":
        raise UserError(
            f"correction drift: is for predictions of noise (epsilon), the scheduler says {kind}; "
            "write correction: mean"
        )


def fit_correction(
    pipeline: Any,
    denoiser: nn.Module,
    context: CallContext,
    trajectory: Trajectory,
    runs: Runs,
    use: Callable[[bool], None],
    correction: Correction,
    guidance: float | None,
    *,
    checkpoint: Path,
    facts: Any = None,
) -> Tensor:
    """What to take off, (calls, output channels), float32; 0 for channels that are no prediction.

    denoiser: that of `pipeline`, wrapped; `use(True)` has it compute with codes, `use(False)` in full
    precision. guidance: of the trajectory. checkpoint: a folder with a file per finished call; the same
    arguments, and `facts` of what the denoiser's state does not tell, go on from it with the same bits. The
    caller removes it. Raises UserError where the sampler makes other calls than were recorded.
    """
    channels = trajectory.latents.shape[2]
    table = torch.zeros(trajectory.n_calls, channels_of(denoiser))
    levels = [*trajectory.noise_levels.tolist(), 0.0]
    limit = _clips_at(pipeline.scheduler)
    progress = Progress("correct", trajectory.n_calls)
    use(True)  # so that the mark sees the codes
    batches = [(ids.start, ids.stop) for ids, _ in runs]
    mark = checkpoints.fingerprint(denoiser, trajectory, (correction.value, guidance, batches, facts))
    checkpoints.folder(checkpoint)

    def answers(call: int, given: Iterator[Inputs]) -> list[Tensor]:
        path = checkpoint / f"call-{call:04d}.safetensors"
        kept = checkpoints.load(path, mark)
        if kept is None:
            outputs = fitted(call, given)
            parts = {f"output/{place}": output for place, output in enumerate(outputs)}
            checkpoints.save(path, {"shift": table[call], **parts}, mark)
        else:
            table[call] = kept["shift"]
            outputs = [kept[f"output/{place}"] for place in range(len(runs))]
        progress.advance()
        return [taken_off(output, table[call]) for output in outputs]

    def fitted(call: int, given: Iterator[Inputs]) -> list[Tensor]:
        outputs, means, drifts, shares = [], [], [], []
        for (ids, _), inputs in zip(runs, given, strict=True):
            with context.at(call):
                use(False)
                whole = denoiser(**inputs)[0]
                use(True)
                outputs.append(denoiser(**inputs)[0])
            latents = inputs[trajectory.input_name][-len(ids) :]
            own, right = (_guided(x[:, :channels], trajectory, guidance) for x in (outputs[-1], whole))
            means.append(_means(own - right))
            drifts.append(_means(latents - trajectory.latents[call, ids.start : ids.stop].to(latents)))
            image = latents * (1 + levels[call] ** 2) ** 0.5 - levels[call] * own
            shares.append((image.abs() <= limit).double().mean(dim=(1, 2, 3)).cpu())
        shift = torch.cat(means).mean(0)
        if correction is Correction.DRIFT:
            kept = float(torch.cat(shares).mean())
            shift = shift - push(torch.cat(drifts).mean(0), kept, levels[call], levels[call + 1])
        table[call, :channels] = shift.float()
        return outputs

    roll_together(pipeline, trajectory, runs, answers)
    return table


def push(drift: Tensor, kept: float, level: float, after: float) -> Tensor:
    """What to add to the prediction of noise at noise level `level`, so that the step to level `after` takes
    DRIFT_SHARE of `drift`, of latents of unit variance, away.

    kept: the share of the image's estimate that the sampler does not clip. What it clips answers the other
    way round: only noise is added there. Nothing where less than half of the usual answer is left, and at the
    last step; nowhere more than moves the estimate, or the latents, by LARGEST_PUSH.
    """
    answer = kept * level - after
    if not after or answer <= 0.5 * (level - after) or after >= level:
        return torch.zeros_like(drift)
    limit = LARGEST_PUSH / max(level, 1.0)
    return (DRIFT_SHARE * drift * (1 + level**2) ** 0.5 / answer).clamp(-limit, limit)


def _clips_at(scheduler: Any) -> float:
    """Beyond what the sampler cuts its estimate of the image off; nothing is sure of dynamic thresholds."""
    if getattr(scheduler.config, "thresholding", False):
        return 0.0
    clips = getattr(scheduler.config, "clip_sample", False)
    return float(scheduler.config.get("clip_sample_range", 1.0)) if clips else float("inf")


def _means(values: Tensor) -> Tensor:
    """(rows, channels, height, width) -> (rows, channels), float64, on the CPU."""
    return values.double().mean(dim=(2, 3)).cpu()


def _guided(errors: Tensor, trajectory: Trajectory, guidance: float | None) -> Tensor:
    """Errors of the halves, (rows, ...), -> those of the guided prediction, a row for each image."""
    if not trajectory.guided:
        return errors
    halves = errors.chunk(2)
    conditional, unconditional = halves if trajectory.conditional_first else reversed(halves)
    return unconditional + (guidance or 1.0) * (conditional - unconditional)
