"""Learned activation scales: lower error, resumable, zero points and untouched sites as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from halftone.axes import Axes
from halftone.denoiser import CallContext, SiteKind, sites
from halftone.layers import WeightCodes, set_weights, wrap
from halftone.passes import step_size
from halftone.passes.calibrate import calibrate
from halftone.passes.schedule import STEP_SIZES
from halftone.passes.state import ActivationParameters
from halftone.passes.step_size import learn_step_sizes
from halftone.passes.weights import quantize_weights
from halftone.policies import Shortcut, StepSize
from halftone.quantizers.bits import Bits
from halftone.settings import Budget, Reconstruction
from halftone.site_quantizer import Mode, set_mode
from halftone.trajectory import Trajectory, denoiser_inputs

AXES = Axes(step_size=StepSize.LEARNED, shortcut=Shortcut.SPLIT)
BITS = Bits.parse("w8a4")
HOW = Reconstruction(budget=Budget.FAST, batch_size=4)


class Case:
    def __init__(self, pipeline: Any, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.denoiser = copy.deepcopy(pipeline.unet).requires_grad_(False)
        found = sites(self.denoiser, shortcut=AXES.shortcut)
        self.codes = quantize_weights(self.denoiser, found, AXES, BITS)
        self.context = CallContext(trajectory.timesteps, trajectory.noise_levels)
        self.quantizers = wrap(self.denoiser, found, BITS, 1, self.context)
        self.fitted = calibrate(self.denoiser, self.quantizers, self.context, trajectory, AXES, batch_size=2)

    def learn(self, checkpoint: Path) -> ActivationParameters:
        return learn_step_sizes(
            self.denoiser,
            self.quantizers,
            self.context,
            self.trajectory,
            self.codes,
            self.fitted,
            AXES,
            HOW,
            bits=BITS,
            seed=0,
            checkpoint=checkpoint,
        )

    @torch.no_grad()
    def output(self, mode: Mode) -> torch.Tensor:
        set_mode(self.quantizers, mode)
        with self.context.at(1):
            found = self.denoiser(**denoiser_inputs(self.trajectory, 1))[0]
        set_mode(self.quantizers, Mode.OFF)
        return found


@pytest.fixture
def case(tiny_pipeline: Any, trajectory: Trajectory) -> Case:
    return Case(tiny_pipeline, trajectory)


def use(case: Case, weights: dict[str, WeightCodes]) -> None:
    set_weights(case.denoiser, weights, BITS)


def test_the_output_comes_closer_to_full_precision(case: Case, tmp_path: Path) -> None:
    target = case.output(Mode.OFF)
    learned = case.learn(tmp_path)
    use(case, case.codes)
    after = (case.output(Mode.QUANTIZE) - target).square().mean()
    for name, quantizer in case.quantizers.items():
        quantizer.set_parameters(case.fitted[name].scale, case.fitted[name].zero_point)
    before = (case.output(Mode.QUANTIZE) - target).square().mean()
    assert after < 0.9 * before

    assert learned.keys() == case.fitted.keys()
    moved = [name for name in learned if not torch.equal(learned[name].scale, case.fitted[name].scale)]
    assert len(moved) > len(learned) / 2
    for name, parameters in learned.items():
        assert torch.equal(parameters.zero_point, case.fitted[name].zero_point)
        assert parameters.scale.shape == case.fitted[name].scale.shape
        assert (parameters.scale > 0).all()


def test_halves_of_a_shortcut_learn_apart(case: Case, tmp_path: Path) -> None:
    learned = case.learn(tmp_path)
    split = [
        (name, quantizer.site.split)
        for name, quantizer in case.quantizers.items()
        if quantizer.site.split is not None and quantizer.site.kind is SiteKind.INPUT
    ]
    assert split
    for name, at in split:
        scale = learned[name].scale[0].flatten()
        assert len(scale[:at].unique()) == len(scale[at:].unique()) == 1
        assert scale[0] != scale[-1]


def test_an_interrupted_run_goes_on_with_the_same_bits(
    case: Case, tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = case.learn(tmp_path / "whole")
    done: list[str] = []
    learn = step_size._Work._learn

    def fail_at_third(self: Any, unit: str, *arguments: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(unit)
        return learn(self, unit, *arguments)

    again = Case(tiny_pipeline, case.trajectory)
    with monkeypatch.context() as patch:
        patch.setattr(step_size._Work, "_learn", fail_at_third)
        with pytest.raises(KeyboardInterrupt):
            again.learn(tmp_path / "cut")
    resumed = Case(tiny_pipeline, case.trajectory)
    monkeypatch.setattr(
        step_size._Work, "_learn", lambda self, unit, *rest: (done.append(unit), learn(self, unit, *rest))[1]
    )
    found = resumed.learn(tmp_path / "cut")
    assert len(done) == len(set(done)), "no unit was learned twice"
    assert all(torch.equal(found[name].scale, whole[name].scale) for name in whole)


def test_every_schedule_starts_slow_enough_to_keep_scales_positive() -> None:
    assert all(0 < schedule.learning_rate <= 0.05 for schedule in STEP_SIZES.values())
