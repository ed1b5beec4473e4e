"""How long each unit of block reconstruction is learned, and how strongly it is pushed to round.

`published` is the schedule that BRECQ, Q-Diffusion, TFMQ-DM and DGQ share; on two cores it takes a working
day even for a small model. The shorter ones are our choice: what the step size and the regulariser lose in
iterations they get back in strength, so that the soft roundings still arrive at 0 or 1 before they are made
hard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from halftone.axes import Axes
from halftone.settings import Budget


@dataclass(frozen=True)
class Schedule:
    """Settings of one unit's learning.

    `rounding_weight` multiplies the summed regulariser; `warm_up` is the share of the iterations without
    it; its exponent falls from `beta_start` to `beta_end` afterwards. `samples` is how many (call, prompt,
    guidance half) triples are drawn from the trajectory; `batch_limit` caps the samples of one iteration.
    `softness` is how far from 0 and 1 the soft choices of a round before begin.
    """

    iterations: int
    learning_rate: float
    rounding_weight: float
    warm_up: float
    beta_start: float
    beta_end: float
    samples: int
    batch_limit: int
    softness: float = 0.0

    def __post_init__(self) -> None:
        assert min(self.iterations, self.samples, self.batch_limit) > 0
        assert 0 <= self.warm_up < 1


def later(schedule: Schedule, axes: Axes) -> Schedule:
    """That of a round after the first: shorter, annealed from a lower exponent and without warm-up, since the
    choices are made for the most part (our choice: of TCAQ-DM's PAR the paper tells no figures). Softened
    choices have the first round's warm-up: without it the regulariser drives them back at once."""
    iterations = max(1, round(schedule.iterations * axes.later_iterations))
    return replace(
        schedule,
        iterations=iterations,
        warm_up=schedule.warm_up if axes.later_softness else 0.0,
        beta_start=axes.later_beta,
        softness=axes.later_softness,
    )


@dataclass(frozen=True)
class StepSizeSchedule:
    """Settings of one unit's step-size learning: the rate falls to 0 as a cosine.

    The rate is that of the logarithm of a scale (our choice: scales of one unit differ by orders of
    magnitude, and none may turn negative).
    """

    iterations: int
    learning_rate: float
    norm: float = 2.4


STEP_SIZES: dict[Budget, StepSizeSchedule] = {
    Budget.SMOKE: StepSizeSchedule(4, 1e-2),
    Budget.FAST: StepSizeSchedule(60, 1e-2),
    Budget.STANDARD: StepSizeSchedule(400, 5e-3),
    Budget.PUBLISHED: StepSizeSchedule(5000, 2e-3),
}


SCHEDULES: dict[Budget, Schedule] = {
    Budget.SMOKE: Schedule(
        iterations=8,
        learning_rate=0.3,
        rounding_weight=0.01,
        warm_up=0.2,
        beta_start=20.0,
        beta_end=2.0,
        samples=8,
        batch_limit=4,
    ),
    Budget.FAST: Schedule(
        iterations=150,
        learning_rate=0.05,
        rounding_weight=0.01,
        warm_up=0.2,
        beta_start=20.0,
        beta_end=2.0,
        samples=128,
        batch_limit=16,
    ),
    Budget.STANDARD: Schedule(
        iterations=1000,
        learning_rate=0.02,
        rounding_weight=0.01,
        warm_up=0.2,
        beta_start=20.0,
        beta_end=2.0,
        samples=256,
        batch_limit=16,
    ),
    Budget.PUBLISHED: Schedule(
        iterations=20_000,
        learning_rate=1e-3,
        rounding_weight=0.01,
        warm_up=0.2,
        beta_start=20.0,
        beta_end=2.0,
        samples=1024,
        batch_limit=4096,
    ),
}
