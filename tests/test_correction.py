"""What is taken off the denoiser's output: how it is found, stored, and applied."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import halftone
from halftone import artefact
from halftone.artefact.manifest import write_manifest
from halftone.calls import CallContext
from halftone.correction import correct
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.passes.correction import (
    DRIFT_SHARE,
    check_correction,
    fit_correction,
    push,
)
from halftone.passes.rollout import runs_of
from halftone.plan import Execution
from halftone.policies import Correction
from halftone.provenance import Provenance
from halftone.recipes import resolve
from halftone.scenes import uncond
from halftone.source import Source, load_source
from halftone.steps.record import record
from halftone.trajectory import Trajectory
from quantized import GUIDANCE, PROMPTS, RESOLUTION, STEPS
from without_text import tiny

BIAS = torch.tensor([0.03, -0.02, 0.01])
Case = tuple[Source, Trajectory, Provenance]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def case(model: Path) -> Case:
    source = load_source(model)
    return source, *record(source, 3, steps=4, guidance=None, resolution=None)


@contextmanager
def off_by(denoiser: nn.Module, errors: Callable[[Tensor], Tensor]) -> Iterator[Callable[[bool], None]]:
    """A switch between the denoiser and one whose output is off."""
    on = [False]

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        answered = isinstance(output, tuple)  # and not the sampler's own call, which waits for the answer
        return (output[0] + errors(output[0]),) if answered and on[0] else output

    handle = denoiser.register_forward_hook(hook)
    try:
        yield lambda quantized: on.__setitem__(0, quantized)
    finally:
        handle.remove()


def fit(
    case: Case, errors: Callable[[Tensor], Tensor], kind: Correction, checkpoint: Path, facts: Any = None
) -> Tensor:
    source, trajectory, known = case
    denoiser = denoiser_of(source.pipeline)
    runs = runs_of(source.pipeline, trajectory, known, 2)
    with off_by(denoiser, errors) as use:
        place = source.pipeline, denoiser, CallContext(), trajectory, runs
        return fit_correction(*place, use, kind, known.guidance, checkpoint=checkpoint, facts=facts)


@pytest.mark.parametrize("kind", [Correction.MEAN, Correction.DRIFT])
def test_a_constant_error_is_found(case: Case, kind: Correction, tmp_path: Path) -> None:
    found = fit(case, lambda _: BIAS.reshape(1, 3, 1, 1), kind, tmp_path)
    torch.testing.assert_close(found, BIAS.expand(4, 3), atol=1e-5, rtol=0)


def test_a_step_takes_half_of_the_drift_away(case: Case) -> None:
    """Against the sampler itself: two steps from the same latents."""
    source, trajectory, _ = case
    scheduler = DDIMScheduler.from_config(source.pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(len(trajectory.timesteps))
    drift, levels = torch.tensor([0.001, -0.002, 0.0]), trajectory.noise_levels.tolist()
    sample, prediction = torch.randn(2, 1, 3, 4, 4)
    for call in range(len(levels) - 1):
        step = partial(scheduler.step, timestep=scheduler.timesteps[call], sample=sample)
        more = push(drift, 1.0, levels[call], levels[call + 1]).reshape(1, 3, 1, 1)
        change = step(prediction + more).prev_sample - step(prediction).prev_sample
        # a drift shrinks and grows as the image in the latents does
        scale = ((1 + levels[call] ** 2) / (1 + levels[call + 1] ** 2)) ** 0.5
        wanted = (-DRIFT_SHARE * scale * drift).reshape(1, 3, 1, 1).expand_as(change)
        torch.testing.assert_close(change, wanted, atol=1e-6, rtol=1e-2)
    assert not push(drift, 1.0, levels[-1], 0.0).any()
    assert not push(drift, 0.0, levels[0], levels[1]).any()


def test_noise_does_not_run_away_where_the_sampler_clips(model: Path, tmp_path: Path) -> None:
    source = load_source(model)
    assert source.pipeline.scheduler.config.clip_sample
    trajectory, known = record(source, 4, steps=50, guidance=None, resolution=None)
    noise = torch.Generator().manual_seed(0)

    def errors(output: Tensor) -> Tensor:
        return 0.1 * torch.randn(output.shape, generator=noise)

    found = fit((source, trajectory, known), errors, Correction.DRIFT, tmp_path)
    assert found.abs().max() < 0.5


def test_a_fit_that_was_interrupted_goes_on(case: Case, tmp_path: Path) -> None:
    asked = [0]

    def errors(output: Tensor) -> Tensor:
        asked[0] += 1
        if asked[0] == 6:
            raise KeyboardInterrupt
        return 0.1 * output**2

    whole = fit(case, lambda output: 0.1 * output**2, Correction.DRIFT, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(case, errors, Correction.DRIFT, tmp_path / "cut")
    finished, asked[0] = (asked[0] - 1) // 2, 6
    assert torch.equal(fit(case, errors, Correction.DRIFT, tmp_path / "cut"), whole)
    batches = 2
    assert asked[0] - 6 == batches * (len(whole) - finished)
    fit(case, errors, Correction.DRIFT, tmp_path / "cut", facts="of another row")
    assert asked[0] - 6 == batches * (2 * len(whole) - finished)


@pytest.mark.parametrize("conditional_first", [False, True])
def test_the_guided_prediction_is_what_is_corrected(
    tiny_model_folder: Path, conditional_first: bool, tmp_path: Path
) -> None:
    source = load_source(tiny_model_folder)
    how: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "resolution": RESOLUTION}
    trajectory, known = record(source, PROMPTS, **how)
    assert known.guidance is not None
    trajectory = replace(trajectory, conditional_first=conditional_first)

    def errors(output: Tensor) -> Tensor:
        first = torch.arange(len(output)).reshape(-1, 1, 1, 1) < len(output) // 2
        return torch.where(first, 0.01, 0.03).expand_as(output)

    found = fit((source, trajectory, known), errors, Correction.MEAN, tmp_path)
    unconditional, conditional = (0.03, 0.01) if conditional_first else (0.01, 0.03)
    wanted = unconditional + known.guidance * (conditional - unconditional)
    torch.testing.assert_close(found, torch.full_like(found, wanted), atol=1e-5, rtol=0)


def test_outputs_of_either_form_are_corrected_by_call(case: Case) -> None:
    denoiser = uncond.build((8, 8, 8)).eval()
    sample = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = denoiser(sample, 3).sample
        table, context = torch.stack([BIAS, -BIAS]), CallContext()
        correct(denoiser, table, context)
        for call in (0, 1):
            with context.at(call):
                for whole in (True, False):
                    output = denoiser(sample, 3, return_dict=whole)
                    found = output.sample if whole else output[0]
                    torch.testing.assert_close(found, plain - table[call].reshape(1, 3, 1, 1))


def test_drift_needs_predictions_of_noise(case: Case) -> None:
    pipeline = load_source(case[0].path).pipeline
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    check_correction(pipeline, resolve("static", {"correction": "mean"}))
    with pytest.raises(UserError, match="says v_prediction; write correction: mean"):
        check_correction(pipeline, resolve("static", {"correction": "drift"}))


def test_an_artefact_brings_its_correction(model: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"n_prompts": 2, "steps": 3, "budget": "smoke", "bits": "w4a4"}
    made = {
        kind: halftone.quantize(str(model), "minmax", None, tmp_path / kind, axes={"correction": kind}, **how)
        for kind in ("none", "mean", "drift")
    }
    stored = {kind: load_file(folder / "unet" / "quantized.safetensors") for kind, folder in made.items()}
    assert "correction" not in stored["none"]
    table = stored["mean"].pop("correction")
    assert table.shape == (3, 3)
    assert table.abs().max() > 0
    assert stored["none"].keys() == stored["mean"].keys()
    assert "correction" not in (made["none"] / "plan.json").read_text()
    sample = torch.randn(1, 3, 32, 32)
    found = {}
    for kind, execution in (
        ("none", Execution.SIMULATED),
        ("mean", Execution.SIMULATED),
        ("mean", Execution.INTEGER),
    ):
        pipeline = artefact.load(made[kind], execution=execution)
        context, denoiser = pipeline._halftone_context, denoiser_of(pipeline)
        timestep = int(context.timesteps[1])
        with torch.no_grad(), context.at(1):
            found[kind, execution] = denoiser(sample, timestep).sample
    shift = table[1].reshape(1, 3, 1, 1)
    torch.testing.assert_close(
        found["mean", Execution.SIMULATED], found["none", Execution.SIMULATED] - shift, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        found["mean", Execution.SIMULATED], found["mean", Execution.INTEGER], atol=1e-4, rtol=1e-4
    )
    drift = stored["drift"]["correction"]
    torch.testing.assert_close(drift[0], table[0], atol=1e-5, rtol=0)  # nothing has drifted yet

    bad = tmp_path / "bad"
    shutil.copytree(made["mean"], bad)
    save_file({**stored["mean"], "correction": table[:2]}, bad / "unet" / "quantized.safetensors")
    write_manifest(bad)
    with pytest.raises(UserError, match=r"correction has shape \(2, 3\), it should be \(3, 3\)"):
        artefact.load(bad)
