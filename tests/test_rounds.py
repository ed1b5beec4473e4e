"""Reconstruction in rounds, later ones on what the model quantized so far makes (TCAQ-DM, PAR)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import halftone
from halftone.artefact import verify
from halftone.denoiser import denoiser_of, sites
from halftone.errors import UserError
from halftone.passes import reconstruct as reconstruct_pass
from halftone.passes.reconstruct import Round
from halftone.passes.reconstructed import Reconstructed, load
from halftone.passes.rollout import roll, runs_of
from halftone.passes.schedule import SCHEDULES, later
from halftone.passes.weights import quantize_weights
from halftone.plan import Plan
from halftone.provenance import Provenance
from halftone.quantizers.adaround import SoftRounding
from halftone.quantizers.affine import fit_affine
from halftone.recipes import resolve
from halftone.settings import Budget, Reconstruction
from halftone.source import Source, load_source
from halftone.steps import reconstruct as step
from halftone.steps.choice import Choice, choose
from halftone.steps.record import record
from halftone.trajectory import Trajectory
from reconstruction import reconstruct as plain
from without_text import tiny

SMOKE = Reconstruction(budget=Budget.SMOKE, batch_size=2)
Recorded = tuple[Source, Trajectory, Provenance]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A model without text, its trajectory of three calls and three images."""
    source = load_source(tiny(tmp_path_factory.mktemp("model")))
    return source, *record(source, 3, steps=3, guidance=None, resolution=None, batch_size=2)


def chosen(bits: str = "w4a6", **axes: Any) -> Choice:
    return choose("static", bits, {"weight_range": "minmax", **axes})


def run(recorded: Recorded, choice: Choice, folder: Path, **options: Any) -> Reconstructed:
    return step.reconstruct(*recorded, choice, how=SMOKE, checkpoint=folder, **options)


def same(one: Reconstructed, other: Reconstructed) -> bool:
    tensors = [[t for weight in found.weights.values() for t in weight] for found in (one, other)]
    return one.units == other.units and all(torch.equal(*pair) for pair in zip(*tensors, strict=True))


def test_one_round_is_plain_reconstruction(recorded: Recorded, tmp_path: Path) -> None:
    source, trajectory, _ = recorded
    choice = chosen(rounds=1)
    found = run(recorded, choice, tmp_path / "step")
    denoiser = denoiser_of(source.pipeline)
    modules = [s.module for s in sites(denoiser) if s.kind == "weight" and s.quantized]
    given = denoiser, trajectory, choice.axes, choice.bits, SMOKE, 0
    assert same(found, plain(*given, tmp_path / "pass", modules))
    assert found.denoiser_calls == 0
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).glob("unit-*")} for n in ("step", "pass")]
    assert files[0] == files[1]
    assert not list(tmp_path.glob("*/soft-*"))


def test_rounds_go_on_from_each_other_and_say_what_they_cost(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, trajectory, _ = recorded
    computed: list[int] = []
    hook = (
        denoiser_of(source.pipeline)
        .get_submodule("conv_out")
        .register_forward_hook(lambda *_: computed.append(1))
    )
    found = run(recorded, chosen(rounds=3), tmp_path / "three", shared=tmp_path / "units")
    hook.remove()
    learned: list[int] = []
    learn = reconstruct_pass.learn
    monkeypatch.setattr(reconstruct_pass, "learn", lambda *a: (learned.append(1), learn(*a))[1])
    first = run(recorded, chosen(), tmp_path / "one", shared=tmp_path / "units")
    assert not learned, "rows with and without rounds share the first"

    by_round = [[unit for unit in found.units if unit.round == k] for k in (1, 2, 3)]
    assert tuple(by_round[0]) == first.units, "the first round is the plain one"
    names = [unit.name for unit in first.units]
    assert [[unit.name for unit in units] for units in by_round] == [names] * 3
    assert {unit.iterations for unit in by_round[2]} == {2}  # a quarter of eight
    assert all(unit.mse_after <= unit.mse_before for unit in by_round[1] if not unit.kept_nearest)
    assert not same(replace(found, units=()), replace(first, units=()))
    batches = 2
    assert found.denoiser_calls == 2 * 2 * trajectory.n_calls * batches  # fitted, then sampled, twice
    assert len(computed) == found.denoiser_calls + 3 * 2  # and what a round's order of units is told from

    found.save(tmp_path / "found", {"halftone": "provenance"})
    again, _ = load(tmp_path / "found")
    assert again.units == found.units
    assert again.denoiser_calls == found.denoiser_calls


def test_rounds_go_on_after_an_interruption_bit_for_bit(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = chosen(rounds=2)
    whole = run(recorded, choice, tmp_path / "whole")
    units = len(whole.units) // 2
    learn, sample = reconstruct_pass.learn, step.aligned_trajectory
    learned: list[int] = []
    sampled: list[int] = []

    def killed_now_and_then(*args: Any) -> Any:
        learned.append(1)
        if len(learned) in (3, units + 4):  # in the first round; after a unit of the second, counting again
            raise KeyboardInterrupt
        return learn(*args)

    def killed_once(*args: Any) -> Any:
        sampled.append(1)
        if len(sampled) == 1:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(reconstruct_pass, "learn", killed_now_and_then)
    monkeypatch.setattr(step, "aligned_trajectory", killed_once)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(recorded, choice, tmp_path / "parts")
    resumed = run(recorded, choice, tmp_path / "parts")
    assert len(learned) == 2 * units + 2, "no finished unit is learned again"
    assert len(sampled) == 2, "nor is the sampler run again"
    assert same(resumed, whole)
    for name, found in (("a", whole), ("b", resumed)):
        found.save(tmp_path / name, {"halftone": "{}"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def aligned(recorded: Recorded, choice: Choice, folder: Path) -> Trajectory:
    """What the model with weights rounded to nearest gives its denoiser."""
    source, trajectory, known = recorded
    denoiser = denoiser_of(source.pipeline)
    codes = quantize_weights(denoiser, sites(denoiser), choice.axes, choice.bits)
    folder.mkdir()
    work = step._Work(source, known, choice, None, SMOKE, 0, folder, None)
    return work._aligned(Round(1, Reconstructed(codes, ()), {}, "nearest"), trajectory)[0]


def close(found: Trajectory, wanted: Trajectory) -> bool:
    return bool((found.latents - wanted.latents).norm() <= 1e-3 * wanted.latents.norm())


def test_data_of_a_model_that_loses_nothing_are_those_it_was_given(
    recorded: Recorded, tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = load_source(tiny_model_folder)
    prompts = ["a red star", "a blue ring", "a green cross"]
    guided = source, *record(source, prompts, steps=3, guidance=3.0, resolution=16, batch_size=2)
    for place, one in enumerate((recorded, guided)):
        found = aligned(one, chosen("w16a16", rounds=2), tmp_path / f"wide{place}")
        assert found.latents.shape == one[1].latents.shape
        assert close(found, one[1])
    found = aligned(recorded, chosen("w3a3", rounds=2), tmp_path / "narrow")
    assert torch.equal(found.latents[0], recorded[1].latents[0]), "the noise is the same"
    assert not close(found, recorded[1])


def test_data_are_made_again_for_other_activations(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"weight_range": "minmax", "rounds": 2, "calibration_inputs": "reference", "relaxing": "none"}
    made: list[object] = []
    original = step.aligned_trajectory
    monkeypatch.setattr(step, "aligned_trajectory", lambda *given: (made.append(given), original(*given))[1])
    for protocol in ("equal", "equal", "paper"):  # these quantize other activations, and the same weights
        run(recorded, choose("pcr", "w4a6", axes, protocol), tmp_path)
    assert len(made) == 2


def test_a_sampler_that_makes_more_calls_than_were_recorded_is_refused(recorded: Recorded) -> None:
    source, whole, known = recorded
    cut = replace(whole, latents=whole.latents[:2], timesteps=whole.timesteps[:2])
    runs = runs_of(source.pipeline, cut, known, 3)
    with pytest.raises(UserError, match="goes on after the 2 recorded calls"):
        roll(source.pipeline, cut, runs, lambda call, batch, given: given["sample"])


def test_soft_choices_are_gone_on_from() -> None:
    weight = torch.linspace(-1, 1, 12).reshape(2, 6)
    params = fit_affine(-1.0, 1.0, 4)
    alpha = torch.linspace(-3, 3, 12).reshape(2, 6)
    soft = SoftRounding(weight, params, noise=1.0, alpha=alpha)
    assert torch.equal(soft.alpha, alpha)
    assert soft.alpha.data_ptr() != alpha.data_ptr()
    schedule = later(SCHEDULES[Budget.FAST], resolve("static", {"rounds": 2}))
    assert (schedule.iterations, schedule.warm_up, schedule.beta_start) == (38, 0.0, 10.0)
    assert schedule.softness == 0.0
    softened = later(SCHEDULES[Budget.FAST], resolve("static", {"rounds": 2, "later_softness": 0.1}))
    assert (softened.warm_up, softened.softness) == (0.2, 0.1)
    assert schedule.samples == SCHEDULES[Budget.FAST].samples


def test_rounds_compose_with_factors(recorded: Recorded, tmp_path: Path) -> None:
    """With a recipe that learns the timestep's layers apart, and whose ranges are fitted progressively."""
    axes = {
        "rounds": 2,
        "reparameterization": "tcr",
        "reparameterization_layers": "all",
        "calibration_inputs": "progressive",
    }
    how: dict[str, Any] = {"n_prompts": 2, "steps": 2, "budget": "smoke", "batch_size": 2}
    made = halftone.quantize(recorded[0].path, "tfmq", None, tmp_path / "q", bits="w4a6", axes=axes, **how)
    assert all(check.passed for check in verify(made))
    assert Plan.load(made / "plan.json").axes.rounds == 2


@pytest.mark.parametrize(
    ("recipe", "axes", "message"),
    [
        ("minmax", {"rounds": 2}, "rounding: adaround"),
        ("static", {"rounds": 2, "unit_input": "full_precision"}, "unit_input: quantized_prefix"),
        ("static", {"later_iterations": 0.5}, "one round only"),
        ("static", {"later_beta": 5}, "one round only"),
        ("static", {"later_softness": 0.1}, "one round only"),
        ("static", {"rounds": 2, "later_softness": 0.5}, "later_softness"),
        ("static", {"rounds": 11}, "rounds"),
    ],
)
def test_rounds_that_mean_nothing_are_refused(recipe: str, axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(recipe, axes)
