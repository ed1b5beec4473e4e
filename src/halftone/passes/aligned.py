"""Data of a later round of reconstruction: what the model, as quantized so far, gives its denoiser (TCAQ-DM,
PAR)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halftone.calls import CallContext
from halftone.passes.rollout import Inputs, Runs, roll
from halftone.progress import Progress
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.trajectory import Trajectory


def aligned_trajectory(
    pipeline: Any,
    denoiser: nn.Module,
    quantizers: Mapping[str, SiteQuantizer],
    context: CallContext,
    trajectory: Trajectory,
    runs: Runs,
) -> Trajectory:
    """`trajectory` with the latents that the quantized sampler comes to from the same noise.

    denoiser: that of `pipeline`, wrapped, its weights and the parameters of `quantizers` set; their mode is
    off afterwards. Raises UserError where the sampler makes other calls than were recorded.
    """
    seen: list[list[Tensor]] = [[] for _ in range(trajectory.n_calls)]
    progress = Progress("align", trajectory.n_calls * len(runs))

    def answer(call: int, batch: int, given: Inputs) -> Tensor:
        latents = given[trajectory.input_name]
        count = len(runs[batch][0])
        seen[call].append(latents[-count:].detach().to("cpu", trajectory.latents.dtype, copy=True))
        with context.at(call):
            output: Tensor = denoiser(**given)[0]
        progress.advance()
        return output

    set_mode(quantizers, Mode.QUANTIZE)
    try:
        roll(pipeline, trajectory, runs, answer)
    finally:
        set_mode(quantizers, Mode.OFF)
    return dataclasses.replace(trajectory, latents=torch.stack([torch.cat(rows) for rows in seen]))
