from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerAncestralDiscreteScheduler, UNet2DModel

from halftone import artefact
from halftone.errors import UserError
from halftone.plan import Execution
from halftone.prompts import prompts_sha256
from halftone.sampling import SeedSet, Subject, lanes, load_subject, read_shard, sample, sample_shard
from halftone.trajectory import noise
from quantized import shared_artefact

PROMPTS = [f"a large red star above a small blue ring {n}" for n in range(11)]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artefact(tmp_path_factory, tiny_model_folder)[1]


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Subject:
    return load_subject(folder, device="cpu")


@pytest.fixture(scope="module")
def full_precision(tiny_model_folder: Path) -> Subject:
    return load_subject(tiny_model_folder, steps=4, guidance=6.0, resolution=16, device="cpu")


@pytest.fixture(params=["quantized", "full_precision"])
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def test_an_image_depends_on_prompt_id_and_seed_alone(subject: Subject) -> None:
    whole = list(sample(subject, PROMPTS, range(11), seed=1))
    assert whole[0].shape == (16, 16, 3)
    assert whole[0].dtype == np.uint8
    for ids in ([0], [10], [5, 6], [9, 2, 7], list(range(10, -1, -1))):
        for k, image in zip(ids, sample(subject, PROMPTS, ids, seed=1), strict=True):
            assert np.array_equal(image, whole[k]), (ids, k)
    other = next(sample(subject, PROMPTS, [0], seed=2))
    assert not np.array_equal(other, whole[0])


def test_noise_of_the_image_is_that_of_its_generator(full_precision: Subject) -> None:
    seen = []
    hook = full_precision.pipeline.unet.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    next(sample(full_precision, PROMPTS, [7], seed=3))
    hook.remove()
    assert torch.equal(seen[0][0], noise(7, 3, (4, 8, 8)))


def test_shards_are_slices_of_the_whole(quantized: Subject, prompts: Path, tmp_path: Path) -> None:
    index = sample_shard(tmp_path / "whole.zip", quantized, prompts, n_images=5)
    whole = read_shard(tmp_path / "whole.zip")
    assert whole.index == index
    for shard in range(2):
        sample_shard(tmp_path / "part.zip", quantized, prompts, n_images=5, shard=shard, n_shards=2)
        part = read_shard(tmp_path / "part.zip")
        for seed_set, k in itertools.product(SeedSet, part.index.ids):
            assert np.array_equal(part.image(seed_set, k), whole.image(seed_set, k))
    assert not np.array_equal(whole.image(SeedSet.A, 0), whole.image(SeedSet.B, 0))


def test_a_paired_shard_holds_the_latents_of_every_call(
    quantized: Subject, prompts: Path, tmp_path: Path
) -> None:
    sample_shard(tmp_path / "both.zip", quantized, prompts, n_images=3)
    index = sample_shard(tmp_path / "paired.zip", quantized, prompts, n_images=3, paired=True)
    both, paired = read_shard(tmp_path / "both.zip"), read_shard(tmp_path / "paired.zip")
    assert set(index.seeds) == {SeedSet.A}
    assert all(np.array_equal(paired.image(SeedSet.A, k), both.image(SeedSet.A, k)) for k in range(3))
    assert paired.latents is not None
    assert both.latents is None
    assert paired.latents.shape == (3, 5, 4, 8, 8)  # 4 steps of PNDM are 5 calls
    vae = quantized.pipeline.vae
    with torch.inference_mode():
        last = torch.from_numpy(paired.latents[:, -1]).float() / vae.config.scaling_factor
        decoded = quantized.pipeline.image_processor.postprocess(vae.decode(last)[0], output_type="np")
    assert np.abs(decoded[0] * 255 - paired.image(SeedSet.A, 0)).max() < 2  # float16 is all that was lost


def test_the_same_shard_has_the_same_bytes(full_precision: Subject, prompts: Path, tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        sample_shard(tmp_path / name, full_precision, prompts, n_images=2)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_labels(
    quantized: Subject, full_precision: Subject, folder: Path, prompts: Path, tmp_path: Path
) -> None:
    label = sample_shard(tmp_path / "q.zip", quantized, prompts, n_images=1, seed_a=4, seed_b=5)
    assert label.artefact_sha256 == artefact.artefact_sha256(folder)
    assert (label.recipe, label.bits, label.execution) == ("static", "w4a8", Execution.SIMULATED)
    assert (label.steps, label.guidance, label.seeds) == (4, 6.0, {SeedSet.A: 4, SeedSet.B: 5})
    assert label.prompts_sha256 == prompts_sha256(PROMPTS)
    label = sample_shard(tmp_path / "fp.zip", full_precision, prompts, n_images=1)
    assert (label.recipe, label.bits, label.execution) == ("fp", None, Execution.FLOAT)
    assert label.artefact_sha256 is None


def test_stochastic_schedulers_draw_from_each_images_own_generator(full_precision: Subject) -> None:
    pipeline = full_precision.pipeline
    before = pipeline.scheduler
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(before.config)
    try:
        whole = list(sample(full_precision, PROMPTS, range(3), seed=1))
        alone = next(sample(full_precision, PROMPTS, [2], seed=1))
    finally:
        pipeline.scheduler = before
    assert np.array_equal(whole[2], alone)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_unconditional_pipelines(tiny_unconditional: UNet2DModel, scheduler: Any) -> None:
    from diffusers import DDIMPipeline

    kind = DDPMPipeline if scheduler is DDPMScheduler else DDIMPipeline
    pipeline = kind(unet=tiny_unconditional, scheduler=scheduler())
    pipeline.set_progress_bar_config(disable=True)
    subject = Subject(pipeline, 3, 1.0, None, "m", "0", None, Execution.FLOAT, "fp", None)
    whole = list(sample(subject, PROMPTS, range(10), seed=1))
    assert np.array_equal(whole[9], next(sample(subject, PROMPTS, [9], seed=1)))
    assert not np.array_equal(whole[8], whole[9])


def test_large_latents_run_one_at_a_time(full_precision: Subject) -> None:
    assert lanes(full_precision.pipeline, 16) == lanes(full_precision.pipeline, None) == 8
    assert lanes(full_precision.pipeline, 256) == 1


def test_bad_requests_write_nothing(
    quantized: Subject, full_precision: Subject, tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results" / "out.zip"

    def refused(said: str, **options: Any) -> None:
        with pytest.raises(UserError, match=said):
            sample_shard(out, quantized, prompts, **{"n_images": 2, **options})

    refused("the file holds 11", n_images=12)
    refused("they must differ", seed_b=1)
    refused("shards count from 0", shard=1)
    with pytest.raises(UserError, match="--steps and --guidance"):
        load_subject(tiny_model_folder)
    prompts.write_text("a star\n" + "red " * 40 + "\n")
    refused(r"prompts\.txt: line 2 has 42 tokens")
    refused("line 2", shard=0, n_shards=2)  # every shard of a bad file fails
    assert not out.parent.exists()


def test_nan_is_reported_with_its_call_and_nothing_is_written(
    full_precision: Subject, prompts: Path, tmp_path: Path
) -> None:
    calls = itertools.count(1)

    def poison(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] * torch.nan,) if next(calls) == 3 else output

    hook = full_precision.pipeline.unet.register_forward_hook(poison)
    try:
        with pytest.raises(UserError, match=r"call 3 of the denoiser.*prompts 1 to 2, seed 1"):
            sample_shard(tmp_path / "out.zip", full_precision, prompts, n_images=2)
    finally:
        hook.remove()
    hook = full_precision.pipeline.vae.decoder.register_forward_hook(lambda _m, _a, out: out * torch.inf)
    try:
        with pytest.raises(UserError, match="decoder gave NaN or infinity"):
            sample_shard(tmp_path / "out.zip", full_precision, prompts, n_images=2)
    finally:
        hook.remove()
    assert not (tmp_path / "out.zip").exists()


def test_other_settings_than_the_calibrated_ones_are_labelled(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    subject = replace(load_subject(folder, steps=3, guidance=2.0, device="cpu"))
    with pytest.warns(UserWarning, match="not the calibrated one"):
        label = sample_shard(tmp_path / "out.zip", subject, prompts, n_images=1)
    assert (label.steps, label.guidance) == (3, 2.0)
