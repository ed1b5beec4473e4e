"""Images for figures: every prompt once in seed set A and once in B, from an artefact or a float model.
A model without text draws numbered images instead (`halftone.unconditional`).

An image depends on its prompt, its id and its seed, and on nothing beside it: not on how many images are
asked for, in which order, or in how many shards. Its noise comes from a generator of its own. And since
kernels sum in another order when they are given another number of rows, the pipeline always runs on the
same number of images, `lanes`, the last run filled up. (That order alone moves an image of a full-precision
model by one level at most, but can change one of a quantized model to the eye, as values fall on the other
side of a code and the sampler carries that on.)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import halftone
from halftone import artefact
from halftone.denoiser import denoiser_of
from halftone.device import best
from halftone.errors import UserError
from halftone.plan import Execution
from halftone.progress import Progress
from halftone.prompts import check_lengths, prompts_sha256, read_prompts
from halftone.recipes import FULL_PRECISION
from halftone.runtime.integer import execution_of
from halftone.settings import PromptSet
from halftone.shards import Pixels, SeedSet, ShardIndex, read_shard, slice_of, write_shard
from halftone.source import load_source
from halftone.trajectory import own_noise, run_arguments
from halftone.unconditional import check_text, first_id, guidance_of, numbered, usual_guidance

__all__ = ["SeedSet", "Subject", "lanes", "load_subject", "read_shard", "sample", "sample_shard"]

Latents = NDArray[np.float16]

_LANES = 8  # a small U-Net on two cores: within 10 % of the speed at 32
_LARGE = 32 * 32  # latent positions above which one image at a time is as fast, and needs the memory of one


@dataclass(frozen=True)
class Subject:
    """A pipeline to be sampled from, and what its images are to be labelled with."""

    pipeline: Any
    steps: int
    guidance: float | None
    resolution: int | None
    model: str
    model_sha256: str
    artefact_sha256: str | None
    execution: Execution
    recipe: str
    bits: str | None


def load_subject(
    path: Path | str,
    *,
    revision: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    device: torch.device | str | None = None,
    execution: Execution = Execution.SIMULATED,
) -> Subject:
    """The artefact at `path`, or the full-precision model (recipe fp, execution float).

    device: by default CUDA where there is one. An artefact brings its steps, guidance and resolution; others
    may be asked for, and the images are labelled with them. A model needs steps, and guidance if it takes
    prompts. execution: of
    an artefact; the images are labelled integer only if none of its quantized modules had to be simulated.
    Raises UserError for a bad path or missing settings.
    """
    device = best() if device is None else device
    if artefact.is_artefact(path):
        if revision is not None:
            raise UserError(f"{path}: is an artefact, so a revision means nothing; leave --revision out")
        facts = artefact.provenance(path)
        pipeline = artefact.load(path, device=device, execution=execution)
        return Subject(
            pipeline,
            facts.steps if steps is None else steps,
            guidance_of(pipeline, guidance, default=facts.guidance),
            facts.resolution if resolution is None else resolution,
            facts.model_path,
            facts.model_sha256,
            artefact.artefact_sha256(path),
            execution_of(denoiser_of(pipeline)),
            facts.recipe or "",
            facts.bits,
        )
    if execution is Execution.INTEGER:
        raise UserError(f"{path}: is a full-precision model; only an artefact runs in integers")
    if steps is None:
        raise UserError(f"{path}: a full-precision model needs --steps and --guidance")
    source = load_source(path, revision)
    guidance = guidance_of(source.pipeline, guidance, default=None)
    if guidance is None and usual_guidance(source.pipeline) is not None:
        raise UserError(f"{path}: a full-precision model needs --steps and --guidance")
    source.pipeline.to(device)
    label = source.path if source.revision is None else f"{source.path}@{source.revision}"
    return Subject(
        source.pipeline,
        steps,
        guidance,
        resolution,
        label,
        source.weights_sha256,
        None,
        Execution.FLOAT,
        FULL_PRECISION,
        None,
    )


def lanes(pipeline: Any, resolution: int | None) -> int:
    """How many images the pipeline runs on at once: a property of model and resolution, never of the job."""
    side = getattr(denoiser_of(pipeline).config, "sample_size", None)
    if resolution is not None:
        side = resolution // getattr(pipeline, "vae_scale_factor", 1)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return _LANES if height and width and height * width <= _LARGE else 1


def sample(
    subject: Subject,
    prompts: Sequence[str],
    ids: Sequence[int],
    seed: int,
    latents: list[Latents] | None = None,
    image_set: PromptSet | None = None,
) -> Iterator[Pixels]:
    """Images uint8 (height, width, 3) of `prompts[k]` for k in `ids`, in order, with the noise of `seed`.

    image_set: of a model without text, which numbered images these are.

    latents: a list that gets, for every image, what each step of the scheduler handed on: (calls, channels,
    height, width).
    Raises UserError naming call and prompts where the denoiser or the decoder gives NaN or infinity.
    """
    pipeline = subject.pipeline
    at_once = lanes(pipeline, subject.resolution)
    for first in range(0, len(ids), at_once):
        wanted = list(ids[first : first + at_once])
        run = wanted + wanted[-1:] * (at_once - len(wanted))
        arguments = run_arguments(
            pipeline,
            [first_id(image_set) + k for k in run],
            [prompts[k] for k in run],
            steps=subject.steps,
            guidance=subject.guidance,
            resolution=subject.resolution,
            seed=seed,
        )
        where = (
            f"{'prompts' if image_set is None else 'images'} {wanted[0] + 1} to {wanted[-1] + 1}, seed {seed}"
        )
        watched: contextlib.AbstractContextManager[list[Latents]] = contextlib.nullcontext([])
        if latents is not None:
            watched = _steps(pipeline)
        with torch.inference_mode(), own_noise(pipeline), _finite(pipeline, where), watched as seen:
            images = np.asarray(pipeline(**arguments, output_type="np").images)
        if latents is not None:
            latents += list(np.stack(seen, axis=1)[: len(wanted)])
        yield from np.rint(images[: len(wanted)] * 255).astype(np.uint8)


def sample_shard(
    output: Path | str,
    subject: Subject,
    prompts: Path | str | None,
    *,
    n_images: int,
    shard: int = 0,
    n_shards: int = 1,
    seed_a: int = 1,
    seed_b: int = 2,
    paired: bool = False,
    image_set: PromptSet = PromptSet.VALIDATION,
) -> ShardIndex:
    """Sample one shard of `n_images` prompts of a file, both seed sets, and write it; returns its index.

    prompts: None for a model without text, which draws the first `n_images` of `image_set`. paired: seed set
    A only, with the latents of every call.
    Raises UserError, and writes nothing, for prompts that are too few or would be cut, seed sets that are not
    disjoint, or images that hold NaN.
    """
    check_text(subject.pipeline, prompts is not None)
    lines = numbered(image_set, n_images) if prompts is None else read_prompts(prompts)
    drawn = image_set if prompts is None else None
    if n_images > len(lines):
        raise UserError(f"{prompts}: {n_images} images need as many prompts, the file holds {len(lines)}")
    if seed_a == seed_b and not paired:
        raise UserError(f"seed {seed_a} is given to both seed sets; they must differ")
    ids = slice_of(n_images, shard, n_shards)
    if prompts is not None:
        check_lengths(lines[:n_images], subject.pipeline, prompts)
    seeds = {SeedSet.A: seed_a} if paired else {SeedSet.A: seed_a, SeedSet.B: seed_b}
    latents: list[Latents] | None = [] if paired else None
    images = _seed_sets(subject, lines, ids, seeds, latents, drawn)
    first = next(images)
    height, width, _ = first[2].shape
    index = ShardIndex(
        shard=shard,
        n_shards=n_shards,
        first=ids.start,
        count=len(ids),
        n_images=n_images,
        seeds=seeds,
        latent_calls=len(latents[0]) if latents else 0,
        height=height,
        width=width,
        model=subject.model,
        model_sha256=subject.model_sha256,
        artefact_sha256=subject.artefact_sha256,
        execution=subject.execution,
        recipe=subject.recipe,
        bits=subject.bits,
        prompts_sha256=prompts_sha256(lines),
        image_set=drawn,
        steps=subject.steps,
        guidance=subject.guidance,
        lanes=lanes(subject.pipeline, subject.resolution),
        scheduler=type(subject.pipeline.scheduler).__name__,
        halftone=halftone.__version__,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
    )
    write_shard(output, index, itertools.chain([first], images), lambda: np.stack(latents or []))
    return index


def _seed_sets(
    subject: Subject,
    prompts: Sequence[str],
    ids: range,
    seeds: dict[SeedSet, int],
    latents: list[Latents] | None,
    image_set: PromptSet | None,
) -> Iterator[tuple[SeedSet, int, Pixels]]:
    progress = Progress("sample", len(seeds) * len(ids))
    started = time.monotonic()
    for seed_set, seed in seeds.items():
        drawn = sample(subject, prompts, ids, seed, latents, image_set)
        for prompt, image in zip(ids, drawn, strict=True):
            progress.advance(note=f"{(progress.done + 1) / (time.monotonic() - started):.2f} images/s")
            yield seed_set, prompt, image


@contextlib.contextmanager
def _steps(pipeline: Any) -> Iterator[list[Latents]]:
    """What the scheduler hands on after every call, (images, channels, height, width), during one run."""
    scheduler, seen = pipeline.scheduler, list[Latents]()
    original = scheduler.step

    @functools.wraps(original)  # pipelines read the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        latents = output.prev_sample if hasattr(output, "prev_sample") else output[0]
        seen.append(latents.detach().to("cpu", torch.float16).numpy())
        return output

    scheduler.step = step
    try:
        yield seen
    finally:
        del scheduler.step


@contextlib.contextmanager
def _finite(pipeline: Any, where: str) -> Iterator[None]:
    """Watch what the denoiser and the decoder give, during one run of the pipeline."""
    calls = itertools.count(1)

    def denoiser(_module: nn.Module, _args: Any, output: Any) -> None:
        call, value = next(calls), _tensor(output)
        if value is not None and not torch.isfinite(value).all():
            raise UserError(
                f"call {call} of the denoiser gave NaN or infinity ({where}); try more bits, "
                "and check that the full-precision model makes images"
            )

    def decoder(_module: nn.Module, _args: Any, output: Any) -> None:
        value = _tensor(output)
        if value is not None and not torch.isfinite(value).all():
            raise UserError(f"the decoder gave NaN or infinity ({where}); run it in float32")

    hooks = [denoiser_of(pipeline).register_forward_hook(denoiser)]
    vae = getattr(pipeline, "vae", None)
    if vae is not None:
        hooks.append(vae.decoder.register_forward_hook(decoder))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    try:
        return output[0]
    except (IndexError, KeyError, TypeError):
        return None
