"""Recorded trajectories: what the real pipeline gave its denoiser."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from halftone.errors import UserError
from halftone.provenance import Provenance, code_commit, describe
from halftone.trajectory import (
    Half,
    Sample,
    Trajectory,
    denoiser_inputs,
    generator,
    noise,
    record,
    run_arguments,
    sample_inputs,
)

PROMPTS = ["a red star", "a blue ring above a green square", "a small star"]
SETTINGS: dict[str, Any] = {"steps": 4, "guidance": 5.0, "resolution": 16, "seed": 3}


@pytest.fixture(scope="module")
def trajectory(tiny_pipeline: Any) -> Trajectory:
    return record(tiny_pipeline, PROMPTS, **SETTINGS, batch_size=2)


def provenance(pipeline: Any) -> Provenance:
    model = {"model_path": "data/tiny", "model_revision": None, "model_sha256": "0" * 64}
    return describe(pipeline, **model, prompts=PROMPTS, **SETTINGS)


def test_noise_depends_on_prompt_and_seed_alone() -> None:
    assert torch.equal(noise(5, 1, (4, 8, 8)), noise(5, 1, (4, 8, 8)))
    drawn = torch.stack([noise(k, seed, (4, 8, 8)) for k in range(3) for seed in range(3)]).flatten(1)
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.3
    assert abs(drawn.std().item() - 1) < 0.05
    assert drawn.dtype == torch.float32


def test_noise_is_kept_for_ever() -> None:
    # images of committed rows were made from it
    known = [0.3609335720539093, -0.8631172776222229, 0.7613973021507263]
    assert noise(7, 1, (3,)).tolist() == pytest.approx(known, abs=1e-6)


def test_shapes_and_schedule(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    assert trajectory.latents.shape == (5, 3, 4, 8, 8)
    assert (trajectory.n_calls, trajectory.n_prompts, trajectory.guided) == (5, 3, True)
    assert trajectory.timesteps.tolist() == [751, 501, 501, 251, 1]
    assert trajectory.noise_levels[1] == trajectory.noise_levels[2]
    assert (trajectory.noise_levels.diff() <= 0).all()
    assert trajectory.conditions["encoder_hidden_states"].shape == (3, 32, 32)
    assert trajectory.unconditions["encoder_hidden_states"].shape == (1, 32, 32)
    first = torch.stack([noise(k, 3, (4, 8, 8)) for k in range(3)])
    assert torch.allclose(trajectory.latents[0], first * tiny_pipeline.scheduler.init_noise_sigma)


def test_a_trajectory_does_not_depend_on_the_batch_size(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    other = record(tiny_pipeline, PROMPTS, **SETTINGS, batch_size=3)
    assert torch.equal(other.latents[0], trajectory.latents[0])
    assert torch.allclose(other.latents, trajectory.latents, atol=1e-4)


def test_inputs_are_those_of_the_pipeline(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    seen: list[dict[str, Any]] = []
    signature = inspect.signature(type(tiny_pipeline.unet).forward)

    def keep(denoiser: Any, args: Any, kwargs: Any) -> None:
        seen.append(dict(signature.bind(denoiser, *args, **kwargs).arguments))

    hook = tiny_pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True)
    arguments = run_arguments(tiny_pipeline, [0, 1], PROMPTS[:2], **SETTINGS)
    tiny_pipeline(**arguments, output_type="latent")
    hook.remove()
    assert len(seen) == trajectory.n_calls
    for call, expected in enumerate(seen):
        given = denoiser_inputs(trajectory, call, [0, 1])
        assert torch.equal(given["sample"], expected["sample"])
        assert torch.equal(given["encoder_hidden_states"], expected["encoder_hidden_states"])
        with torch.no_grad():
            ours = tiny_pipeline.unet(**given)[0]
            theirs = tiny_pipeline.unet(**{k: v for k, v in expected.items() if k != "self"})[0]
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_rows_of_different_calls_share_a_batch(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    samples = [Sample(4, 2), Sample(0, 1, Half.UNCONDITIONAL), Sample(2, 0)]
    with torch.no_grad():
        together = tiny_pipeline.unet(**sample_inputs(trajectory, samples))[0]
        alone = [tiny_pipeline.unet(**sample_inputs(trajectory, [one]))[0] for one in samples]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    given = sample_inputs(trajectory, samples, dtype=torch.float16)
    assert given["timestep"].tolist() == [1, 751, 501]
    assert given["sample"].dtype == torch.float16


def test_inputs_can_be_trained_on(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    given = sample_inputs(trajectory, [Sample(0, 0)])
    weight = torch.ones(4, 8, 8, requires_grad=True)
    (given["sample"] * weight).sum().backward()
    assert weight.grad is not None


def test_without_guidance_there_is_one_half(tiny_pipeline: Any) -> None:
    found = record(tiny_pipeline, PROMPTS[:2], **{**SETTINGS, "guidance": 1.0}, batch_size=2)
    assert not found.guided
    assert not found.unconditions
    assert found.halves == (Half.CONDITIONAL,)
    assert denoiser_inputs(found, 0)["sample"].shape[0] == 2


def test_a_stochastic_scheduler_draws_from_each_images_own_generator(fresh_pipeline: Any) -> None:
    fresh_pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(fresh_pipeline.scheduler.config)
    pair = record(fresh_pipeline, PROMPTS[:2], **SETTINGS, batch_size=2)
    single = record(fresh_pipeline, PROMPTS[:2], **SETTINGS, batch_size=1)
    assert torch.allclose(pair.latents, single.latents, atol=1e-3)
    assert pair.n_calls == 4


def test_unconditional_trajectory(tiny_unconditional: Any) -> None:
    pipeline = DDIMPipeline(tiny_unconditional, DDIMScheduler())
    found = record(pipeline, ["", "", ""], **{**SETTINGS, "resolution": None}, batch_size=2)
    assert found.latents.shape == (4, 3, 3, 8, 8)
    assert torch.equal(found.latents[0, 2], noise(2, 3, (3, 8, 8)))
    assert denoiser_inputs(found, 1).keys() == {"sample", "timestep", "return_dict"}


def tiny_sdxl(tiny_pipeline: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    old = tiny_pipeline.text_encoder.config
    config = CLIPTextConfig(**{k: v for k, v in old.to_dict().items() if k != "model_type"})
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_pipeline.vae,
        text_encoder=tiny_pipeline.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tiny_pipeline.tokenizer,
        tokenizer_2=tiny_pipeline.tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler.from_config(tiny_pipeline.scheduler.config),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sdxl_trajectory_has_the_added_conditions(tiny_pipeline: Any, tmp_path: Path) -> None:
    pipeline = tiny_sdxl(tiny_pipeline)
    found = record(pipeline, PROMPTS, **SETTINGS, batch_size=2)
    assert found.n_calls == 4
    assert found.conditions["added_cond_kwargs/text_embeds"].shape == (3, 32)
    assert found.conditions["added_cond_kwargs/time_ids"].shape == (3, 6)
    found.save(tmp_path / "t.safetensors", provenance(pipeline))
    again, _ = Trajectory.load(tmp_path / "t.safetensors")
    with torch.no_grad():
        output = pipeline.unet(**denoiser_inputs(again, 2))[0]
    assert output.shape == (6, 4, 8, 8)


def test_a_saved_trajectory_comes_back_and_has_the_same_bytes(
    tiny_pipeline: Any, trajectory: Trajectory, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        trajectory.save(tmp_path / name, provenance(tiny_pipeline))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again, known = Trajectory.load(tmp_path / "one")
    assert known == provenance(tiny_pipeline)
    for call in range(trajectory.n_calls):
        mine, theirs = denoiser_inputs(trajectory, call), denoiser_inputs(again, call)
        assert mine.keys() == theirs.keys()
        assert torch.equal(mine["sample"], theirs["sample"])
        assert torch.equal(mine["encoder_hidden_states"], theirs["encoder_hidden_states"])
        assert torch.equal(mine["timestep"], theirs["timestep"])
    assert torch.equal(again.noise_levels, trajectory.noise_levels)


def test_damaged_files_are_the_users_to_put_right(
    tiny_pipeline: Any, trajectory: Trajectory, tmp_path: Path
) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(UserError, match="no such file"):
        Trajectory.load(path)
    trajectory.save(path, provenance(tiny_pipeline))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a trajectory"):
        Trajectory.load(path)


def test_guidance_that_a_trajectory_cannot_hold_is_refused(fresh_pipeline: Any) -> None:
    def disturb(denoiser: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] + torch.arange(args[0].shape[0]).reshape(-1, 1, 1, 1), *args[1:]), kwargs

    fresh_pipeline.unet.register_forward_pre_hook(disturb, with_kwargs=True)
    with pytest.raises(UserError, match="different latents for 2 prompts"):
        record(fresh_pipeline, PROMPTS[:2], **SETTINGS, batch_size=2)


def test_provenance(tiny_pipeline: Any) -> None:
    known = provenance(tiny_pipeline)
    assert known.scheduler["class"] == "PNDMScheduler"
    assert known.scheduler["config"]["steps_offset"] == 1
    assert not any(key.startswith("_") for key in known.scheduler["config"])
    later = known.model_copy(update={"recipe": "minmax", "bits": "w4a8"})
    assert Provenance.from_metadata(later.to_metadata()) == later
    with pytest.raises(UserError, match="says nothing of its making"):
        Provenance.from_metadata({"halftone": "{}"}, "x.safetensors")
    commit = code_commit()
    assert commit is None or len(commit) == 40


def test_generators_go_on_after_the_noise() -> None:
    one = generator(1, 1)
    first = torch.randn(8, generator=one)
    assert torch.equal(first, noise(1, 1, (8,)))
    assert not torch.equal(torch.randn(8, generator=one), first)
