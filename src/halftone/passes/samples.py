"""Which samples of a trajectory the units are reconstructed on: as many from each call as from any other."""

from __future__ import annotations

import torch

from halftone.trajectory import Sample, Trajectory


def choose_samples(trajectory: Trajectory, count: int, seed: int) -> list[Sample]:
    """`count` samples (all there are, if fewer), spread evenly over the calls, prompts and halves at
    random.

    Both halves of classifier-free guidance are drawn from, and no sample twice (Q-Diffusion takes every
    so-manieth call and both halves of each prompt; drawing them is our choice, it reaches more calls and
    prompts with few samples). In order of calls.
    """
    halves = trajectory.halves
    pairs = trajectory.n_prompts * len(halves)
    count = min(count, trajectory.n_calls * pairs)
    calls = [place * trajectory.n_calls // count for place in range(count)]
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Sample] = []
    for call in sorted(set(calls)):
        picks = torch.randperm(pairs, generator=generator)[: calls.count(call)].tolist()
        chosen += [Sample(call, pick // len(halves), halves[pick % len(halves)]) for pick in sorted(picks)]
    return chosen
