"""A class-conditional model, whose pipeline puts the conditional half of guidance first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

import halftone
from halftone.artefact import info, verify
from halftone.cli import main
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.passes.rollout import roll, runs_of
from halftone.plan import Execution
from halftone.sampling import load_subject, sample
from halftone.settings import Model, PromptSet
from halftone.source import load_source
from halftone.steps.record import record
from halftone.trajectory import Trajectory
from halftone.unconditional import classes_of, numbered

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    denoiser = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # a variance is predicted too
        num_layers=1,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    for parameter in denoiser.parameters():  # as initialized, blocks hand on what they are given
        torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("model") / "dit"
    DiTPipeline(denoiser, vae, DDIMScheduler()).save_pretrained(folder)
    return folder


def recorded(model: Path, guidance: float | None = None) -> tuple[Any, Trajectory, Any]:
    source = load_source(model)
    how: dict[str, Any] = {"steps": STEPS, "guidance": guidance, "resolution": None, "batch_size": 2}
    return source, *record(source, 3, **how)


def test_classes_follow_from_the_number_of_an_image_and_reach_all(model: Path) -> None:
    config = load_source(model).pipeline.transformer.config
    drawn = classes_of(config, range(5000))
    assert drawn[10:20] == classes_of(config, range(10, 20))
    assert (min(drawn), max(drawn)) == (0, 999)
    assert len(set(drawn)) > 950


def test_each_half_is_recorded_as_what_it_is(model: Path) -> None:
    source, trajectory, known = recorded(model)
    assert known.guidance == 4.0
    assert trajectory.guided
    assert trajectory.conditional_first
    assert trajectory.conditions["class_labels"].tolist() == classes_of(
        source.pipeline.transformer.config, range(3)
    )
    assert trajectory.unconditions["class_labels"].tolist() == [1000]


def test_a_file_holds_the_order_of_the_halves(model: Path, tmp_path: Path) -> None:
    _, trajectory, known = recorded(model)
    trajectory.save(tmp_path / "data", known)
    assert Trajectory.load(tmp_path / "data")[0].halves == trajectory.halves


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_the_sampler_given_full_precisions_answers_comes_to_its_latents(
    model: Path, guidance: float | None
) -> None:
    source, trajectory, known = recorded(model, guidance)
    assert trajectory.guided == (guidance is None)
    denoiser = denoiser_of(source.pipeline)
    found = roll(
        source.pipeline,
        trajectory,
        runs_of(source.pipeline, trajectory, known, 2),
        lambda call, batch, given: denoiser(**given)[0],
    ).latents
    assert torch.allclose(found[:-1], trajectory.latents[1:], atol=1e-5)


def test_it_is_quantized_and_drawn_by_number(model: Path, tmp_path: Path) -> None:
    axes = {"reparameterization_layers": "all", "rounds": 2, "correction": "drift"}
    how: dict[str, Any] = {"n_prompts": 2, "steps": STEPS, "budget": "smoke", "batch_size": 2}
    how["guidance"] = 7.5  # of the artefact, whatever is usual
    folder = halftone.quantize(str(model), "tcaq", None, tmp_path / "q", bits="w6a6b8", axes=axes, **how)
    assert all(check.passed for check in verify(folder))
    assert info(folder)["provenance"]["guidance"] == 7.5
    drawn = []
    for path, wanted in ((folder, {}), (model, {"steps": STEPS, "guidance": 7.5})):
        subject = load_subject(path, **wanted)
        assert subject.guidance == 7.5
        captions = numbered(PromptSet.TEST, 2)
        drawn.append(np.stack(list(sample(subject, captions, range(2), 1, image_set=PromptSet.TEST))))
    quantized, full = (one.astype(float) for one in drawn)
    assert 0 < np.abs(quantized - full).mean() < full.std() / 4
    integer = load_subject(folder, execution=Execution.INTEGER, device="cpu")
    same = sample(integer, captions, range(2), 1, image_set=PromptSet.TEST)
    assert np.array_equal(np.stack(list(same)), drawn[0])


def test_convolutions_that_are_not_there_cannot_be_reparameterized(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), "--recipe", "tcaq", "--bits", "w6a6"]) == 2
    assert "reparameterization_layers convolutions; choose all" in capsys.readouterr().err


def test_noise_that_no_seed_decides_is_refused(model: Path) -> None:
    source = load_source(model)
    source.pipeline.scheduler = DDPMScheduler.from_config(source.pipeline.scheduler.config)
    with pytest.raises(UserError, match="deterministic scheduler"):
        record(source, 2, steps=2, guidance=None, resolution=None)


def test_settings_know_classes() -> None:
    model = {"path": "m", "class_conditional": True}
    assert Model.model_validate(model).guidance_scale == 4.0
    assert Model.model_validate({**model, "guidance": 1.5}).guidance_scale == 1.5
    assert Model.model_validate(model).unprompted
    with pytest.raises(ValueError, match="exclude each other"):
        Model.model_validate({**model, "unconditional": True})
