"""Which samples of a trajectory units are reconstructed on, and which ranges are estimated on."""

from __future__ import annotations

import torch

from halftone.policies import CalibrationCalls
from halftone.trajectory import Sample, Trajectory

STRIDE = 2  # of `uniform`: Q-Diffusion takes 25 of the 50 steps of its text-to-image sampler
NORMAL_MEAN, NORMAL_STD = 0.4, 0.4  # of `normal`, as shares of the training timesteps (PTQ4DM's script)
TRAIN_STEPS = 1000


def choose_samples(
    trajectory: Trajectory, count: int, seed: int, calls: CalibrationCalls = CalibrationCalls.ALL
) -> list[Sample]:
    """`count` samples (all there are, if fewer), spread over the calls as `calls` says, prompts and halves at
    random.

    Both halves of classifier-free guidance are drawn from, and no sample twice (Q-Diffusion takes every
    so-manieth call and both halves of each prompt; drawing them is our choice, it reaches more calls and
    prompts with few samples). In order of calls.
    """
    halves = trajectory.halves
    pairs = trajectory.n_prompts * len(halves)
    generator = torch.Generator().manual_seed(seed)
    if calls is CalibrationCalls.NORMAL:
        wanted = [min(n, pairs) for n in _normal_counts(trajectory, count, generator)]
    else:
        open_calls = range(0, trajectory.n_calls, STRIDE if calls is CalibrationCalls.UNIFORM else 1)
        count = min(count, len(open_calls) * pairs)
        spread = [open_calls[place * len(open_calls) // count] for place in range(count)]
        wanted = [spread.count(call) for call in range(trajectory.n_calls)]
    chosen: list[Sample] = []
    for call, number in enumerate(wanted):
        if number:
            picks = torch.randperm(pairs, generator=generator)[:number].tolist()
            chosen += [
                Sample(call, pick // len(halves), halves[pick % len(halves)]) for pick in sorted(picks)
            ]
    return chosen


def calibration_prompts(trajectory: Trajectory, calls: CalibrationCalls, seed: int) -> list[list[int]]:
    """For each call the prompts whose tensors ranges are estimated on.

    `normal` draws as many (prompt, call) pairs as `uniform` has, so that recipes compare at equal data.
    """
    prompts = list(range(trajectory.n_prompts))
    if calls is not CalibrationCalls.NORMAL:
        stride = STRIDE if calls is CalibrationCalls.UNIFORM else 1
        return [prompts if call % stride == 0 else [] for call in range(trajectory.n_calls)]
    generator = torch.Generator().manual_seed(seed)
    total = len(range(0, trajectory.n_calls, STRIDE)) * len(prompts)
    counts = _normal_counts(trajectory, total, generator)
    return [sorted(torch.randperm(len(prompts), generator=generator)[:n].tolist()) for n in counts]


def _normal_counts(trajectory: Trajectory, count: int, generator: torch.Generator) -> list[int]:
    """How many of `count` draws fall to each call: t ~ N(0.4 T, (0.4 T)^2), clamped to [0, T - 1] (PTQ4DM),
    at the call whose timestep lies nearest (our choice: a trajectory holds its calls' timesteps only)."""
    drawn = normal_timesteps(count, generator).double()
    nearest = (drawn[:, None] - trajectory.timesteps.double()[None]).abs().argmin(dim=1)
    return torch.bincount(nearest, minlength=trajectory.n_calls).tolist()


def normal_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` whole timesteps in 0..T-1, (count,) int64 (PTQ4DM, normally distributed time-step
    calibration)."""
    drawn = torch.randn(count, generator=generator) * NORMAL_STD * TRAIN_STEPS + NORMAL_MEAN * TRAIN_STEPS
    return drawn.long().clamp_(0, TRAIN_STEPS - 1)
