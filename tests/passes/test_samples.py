"""Which calls samples are drawn from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from halftone.passes.samples import TRAIN_STEPS, calibration_prompts, choose_samples, normal_timesteps
from halftone.policies import CalibrationCalls
from halftone.trajectory import Trajectory

CALLS, PROMPTS = 10, 6


@pytest.fixture
def trajectory() -> Trajectory:
    return Trajectory(
        latents=torch.zeros(CALLS, PROMPTS, 1, 2, 2),
        timesteps=torch.arange(950, -1, -100),
        noise_levels=torch.linspace(10, 0.1, CALLS),
        conditions={},
        unconditions={},
        guided=True,
    )


def test_normal_timesteps_are_clamped_at_both_ends() -> None:
    """PTQ4DM: mean and deviation 0.4 T; 15.9 % fall to 0 and 6.7 % to T - 1."""
    drawn = normal_timesteps(100_000, torch.Generator().manual_seed(0)).double()
    assert drawn.min() == 0
    assert drawn.max() == TRAIN_STEPS - 1
    assert (drawn == 0).double().mean() == pytest.approx(0.159, abs=0.01)
    assert (drawn == TRAIN_STEPS - 1).double().mean() == pytest.approx(0.067, abs=0.01)
    assert drawn.mean() == pytest.approx(420, abs=15)


def test_all_and_uniform_spread_evenly(trajectory: Trajectory) -> None:
    everywhere = Counter(s.call for s in choose_samples(trajectory, 40, 0))
    assert everywhere == dict.fromkeys(range(CALLS), 4)
    every_second = Counter(s.call for s in choose_samples(trajectory, 40, 0, CalibrationCalls.UNIFORM))
    assert every_second == dict.fromkeys(range(0, CALLS, 2), 8)


@pytest.mark.parametrize("calls", CalibrationCalls)
def test_no_sample_is_drawn_twice_and_a_seed_decides(trajectory: Trajectory, calls: CalibrationCalls) -> None:
    chosen = choose_samples(trajectory, 50, 3, calls)
    assert len(set(chosen)) == len(chosen) > 0
    assert chosen == choose_samples(trajectory, 50, 3, calls)
    assert chosen != choose_samples(trajectory, 50, 4, calls)


def test_normal_prefers_the_middle_and_the_ends(trajectory: Trajectory) -> None:
    counts = Counter(s.call for s in choose_samples(trajectory, 30, 0, CalibrationCalls.NORMAL))
    assert sum(n for call, n in counts.items() if call >= CALLS // 2) > 15  # nearer to x_0: mean 0.4 T


def test_ranges_see_as_much_data_under_normal_as_under_uniform(trajectory: Trajectory) -> None:
    sizes = {calls: sum(map(len, calibration_prompts(trajectory, calls, 0))) for calls in CalibrationCalls}
    assert sizes[CalibrationCalls.ALL] == CALLS * PROMPTS
    assert sizes[CalibrationCalls.UNIFORM] == CALLS // 2 * PROMPTS
    assert 0 < sizes[CalibrationCalls.NORMAL] <= sizes[CalibrationCalls.UNIFORM]
