"""What to take off a quantized denoiser's output at every call, found as it samples.

Call after call, on latents that the calls before made, corrected: the mean error of every channel over
positions and images, after guidance (PTQD: its correction of the mean, here without the factor and the
variance). Where drift is corrected too, the prediction of noise is raised by what the latents have too much
of already, so that the sampler takes it away. Mean errors cannot tell all of it: a sampler that clips its
estimate of the image cuts off on one side what noise, of no mean, pushes past the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.correction import channels_of, taken_off
from halftone.errors import UserError
from halftone.passes.rollout import Inputs, Runs, roll_together
from halftone.policies import Correction
from halftone.progress import Progress
from halftone.trajectory import Trajectory

DRIFT_GAIN = 2.0
"""Prediction of noise added for latents that are off by one. A call then takes away twice the share by which
it lowers the noise level, 10 to 30 % of the drift; 4 overshot at six bits (our choice).
"""


def check_correction(pipeline: Any, axes: Axes) -> None:
    """Raises UserError where drift is to be corrected and the denoiser predicts something else than noise."""
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
) -> Tensor:
    """What to take off, (calls, output channels), float32; 0 for channels that are no prediction.

    denoiser: that of `pipeline`, wrapped; `use(True)` has it compute with codes, `use(False)` in full
    precision. guidance: of the trajectory. Raises UserError for latents that are no images, and where the
    sampler makes other calls than were recorded.
    """
    if trajectory.latents.ndim != 5:
        shape = tuple(trajectory.latents.shape[2:])
        raise UserError(f"correction: latents are {shape}, not (channels, height, width); write none")
    channels = trajectory.latents.shape[2]
    table = torch.zeros(trajectory.n_calls, channels_of(denoiser))
    progress = Progress("correct", trajectory.n_calls)

    def answers(call: int, given: Iterator[Inputs]) -> list[Tensor]:
        outputs, errors, drifts = [], [], []
        for (ids, _), inputs in zip(runs, given, strict=True):
            with context.at(call):
                use(False)
                whole = denoiser(**inputs)[0]
                use(True)
                outputs.append(denoiser(**inputs)[0])
            errors.append(_guided(_means(outputs[-1] - whole), len(ids), trajectory, guidance))
            latents = inputs[trajectory.input_name][-len(ids) :]
            drifts.append(_means(latents - trajectory.latents[call, ids.start : ids.stop].to(latents)))
        shift = torch.cat(errors).mean(0)[:channels]
        if correction is Correction.DRIFT:
            shift = shift - DRIFT_GAIN * torch.cat(drifts).mean(0)
        table[call, :channels] = shift.float()
        progress.advance()
        return [taken_off(output, table[call]) for output in outputs]

    roll_together(pipeline, trajectory, runs, answers)
    return table


def _means(values: Tensor) -> Tensor:
    """(rows, channels, height, width) -> (rows, channels), float64, on the CPU."""
    return values.double().mean(dim=(2, 3)).cpu()


def _guided(errors: Tensor, count: int, trajectory: Trajectory, guidance: float | None) -> Tensor:
    """Errors of the halves, (rows, channels), -> those of the guided prediction, (count, channels)."""
    if not trajectory.guided:
        return errors
    halves = errors[:count], errors[count:]
    conditional, unconditional = halves if trajectory.conditional_first else reversed(halves)
    return unconditional + (guidance or 1.0) * (conditional - unconditional)
