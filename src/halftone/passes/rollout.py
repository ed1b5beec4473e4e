"""Sampling runs on a trajectory's prompts and noise, with a say in every output of the denoiser.

So a run may use one denoiser at some calls and another at others, or go on from outputs that are known
already, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halftone.calls import CallContext
from halftone.errors import UserError
from halftone.passes.lockstep import Lockstep
from halftone.provenance import Provenance
from halftone.trajectory import Trajectory, denoiser_inputs, run_arguments

Runs = Sequence[tuple[range, Mapping[str, Any]]]
"""For each batch its prompts, by their places in the trajectory, and the arguments of the pipeline."""
Inputs = Mapping[str, Any]
Outputs = list[list[Tensor]]
"""The denoiser's outputs by call and batch."""


def runs_of(
    pipeline: Any,
    trajectory: Trajectory,
    known: Provenance,
    batch_size: int,
    *,
    seed: int | None = None,
    images: bool = False,
) -> list[tuple[range, dict[str, Any]]]:
    """How a pipeline is run on the prompts of a trajectory, batch by batch, with its noise or that of
    another seed.

    The denoiser takes its text from the trajectory, so the pipeline is given none. images: they are made to
    the end, as arrays; otherwise a latent pipeline stops at latents.
    """
    latent = not images and hasattr(pipeline, "vae")
    output = {"output_type": "latent" if latent else "np"} if images or latent else {}
    runs = []
    for first in range(0, trajectory.n_prompts, batch_size):
        ids = range(trajectory.n_prompts)[first : first + batch_size]
        arguments = run_arguments(
            pipeline,
            ids,
            [""] * len(ids),
            steps=known.steps,
            guidance=known.guidance,
            resolution=known.resolution,
            seed=known.seed if seed is None else seed,
        )
        runs.append((ids, {**arguments, **output}))
    return runs


def inputs_at(trajectory: Trajectory, call: int, ids: range, latents: Tensor) -> dict[str, Any]:
    """The recorded inputs of a call, with a sampler's latents in place of the reference ones."""
    given = denoiser_inputs(trajectory, call, ids, device=latents.device, dtype=latents.dtype)
    return {**given, trajectory.input_name: latents}


@dataclass(frozen=True)
class Rollout:
    """What a run came to: the latents after every call, (calls, prompts, ...), on the CPU; the outputs that
    the sampler was given, where they were kept; and what the pipeline returned, by batch; nothing if it was
    stopped before the end."""

    latents: Tensor
    outputs: Outputs
    results: list[Any]


def roll(
    pipeline: Any,
    trajectory: Trajectory,
    runs: Runs,
    answer: Callable[[int, int, Inputs], Tensor],
    calls: int | None = None,
) -> Rollout:
    """Sample `calls` calls (default: all) with `answer(call, batch, inputs)` in place of the denoiser.

    Raises UserError where the sampler makes other calls than were recorded.
    """

    def answers(call: int, given: Iterator[Inputs]) -> list[Tensor]:
        outputs.append([answer(call, batch, inputs) for batch, inputs in enumerate(given)])
        return outputs[-1]

    outputs: Outputs = []
    return replace(roll_together(pipeline, trajectory, runs, answers, calls), outputs=outputs)


def roll_together(
    pipeline: Any,
    trajectory: Trajectory,
    runs: Runs,
    answers: Callable[[int, Iterator[Inputs]], list[Tensor]],
    calls: int | None = None,
) -> Rollout:
    """As `roll`, with `answers(call, inputs of every batch)`, which sees all batches of a call before it
    answers any; outputs are not kept."""
    wanted = trajectory.n_calls if calls is None else calls
    latents: list[Tensor] = []
    with torch.no_grad(), Lockstep(pipeline, [arguments for _, arguments in runs]) as sampler:
        for call in range(wanted):
            if len(sampler.latents) != len(runs):
                raise UserError(
                    f"the sampler stopped after {call} of {trajectory.n_calls} calls; "
                    "run calibration-data again"
                )
            pairs = zip(runs, sampler.latents, strict=True)
            sampler.answer(answers(call, (inputs_at(trajectory, call, ids, now) for (ids, _), now in pairs)))
            # some pipelines step both halves of guidance, which stay alike
            pairs_after = zip(runs, sampler.after, strict=True)
            latents.append(torch.cat([after[: len(ids)].cpu() for (ids, _), after in pairs_after]))
        if calls is None and sampler.latents:
            raise UserError(
                f"the sampler goes on after the {wanted} recorded calls; run calibration-data again"
            )
        results = sampler.results if calls is None else []
    return Rollout(torch.stack(latents), [], results)


def teacher_forced(
    denoiser: nn.Module, trajectory: Trajectory, runs: Runs, context: CallContext | None = None
) -> Outputs:
    """What a denoiser returns on the reference trajectory's own inputs. context: that of a quantized one."""
    parameter = next(denoiser.parameters())
    place: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    found: Outputs = []
    with torch.no_grad():
        for call in range(trajectory.n_calls):
            rows = [denoiser_inputs(trajectory, call, ids, **place) for ids, _ in runs]
            with (context or CallContext()).at(call):
                found.append([denoiser(**one)[0] for one in rows])
    return found
