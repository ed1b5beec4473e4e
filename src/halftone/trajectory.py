"""Trajectories: the denoiser inputs of every call of a sampling run, for a set of prompts."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halftone.calls import noise_level
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.files import writing
from halftone.progress import Progress
from halftone.provenance import Provenance
from halftone.unconditional import LABELS, check_call, classes_of, takes_classes

Tensors = dict[str, Tensor]


class Half(IntEnum):
    """The two halves of a batch under classifier-free guidance, in the order of most pipelines."""

    UNCONDITIONAL = 0
    CONDITIONAL = 1


class Sample(NamedTuple):
    """One row of a denoiser's batch."""

    call: int
    prompt: int
    half: Half = Half.CONDITIONAL


@dataclass(frozen=True)
class Trajectory:
    """Denoiser inputs of N calls for P prompts. Every call's latents differ; text states and the like do not.

    latents: (N, P, C, H, W), as the denoiser gets them (scaled by the scheduler), without the guidance copy.
    timesteps: (N,), of the scheduler's own dtype. noise_levels: (N,) float32, sigma/alpha. conditions:
    inputs of one row per prompt, (P, ...): `encoder_hidden_states`, `added_cond_kwargs/text_embeds`.
    unconditions: the same inputs of the unconditional half, (1, ...); empty without guidance. common: inputs
    that do not grow with the batch. input_name: the denoiser's name for the latents. conditional_first: the
    pipeline puts the conditional half of a batch before the other, as DiT's does.
    """

    latents: Tensor
    timesteps: Tensor
    noise_levels: Tensor
    conditions: Tensors = field(default_factory=dict)
    unconditions: Tensors = field(default_factory=dict)
    common: Tensors = field(default_factory=dict)
    guided: bool = False
    input_name: str = "sample"
    conditional_first: bool = False

    @property
    def n_calls(self) -> int:
        return self.latents.shape[0]

    @property
    def n_prompts(self) -> int:
        return self.latents.shape[1]

    @property
    def halves(self) -> tuple[Half, ...]:
        """The halves a batch has, in order."""
        if not self.guided:
            return (Half.CONDITIONAL,)
        return tuple(reversed(Half)) if self.conditional_first else tuple(Half)

    def save(self, path: Path | str, provenance: Provenance) -> None:
        """One safetensors file; its bytes depend on the values alone."""
        groups = {"condition": self.conditions, "uncondition": self.unconditions, "common": self.common}
        tensors = {
            f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()
        }
        tensors[f"latents/{self.input_name}"] = self.latents
        tensors |= {"timesteps": self.timesteps, "noise_levels": self.noise_levels}
        tensors["guided"] = torch.tensor(int(self.guided))
        if self.conditional_first:
            tensors["conditional_first"] = torch.tensor(1)
        with writing(path) as temporary:
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=provenance.to_metadata()
            )

    @classmethod
    def load(cls, path: Path | str) -> tuple[Trajectory, Provenance]:
        """Raises UserError where the file is missing, damaged or no trajectory."""
        groups: dict[str, Tensors] = {"condition": {}, "uncondition": {}, "common": {}, "latents": {}, "": {}}
        try:
            with safe_open(path, framework="pt") as stored:
                provenance = Provenance.from_metadata(stored.metadata(), path)
                for key in stored.keys():  # noqa: SIM118
                    group, _, name = key.partition("/") if "/" in key else ("", "", key)
                    groups[group][name] = stored.get_tensor(key)
            ((input_name, latents),) = groups["latents"].items()
            alone = groups[""]
            return cls(
                latents,
                alone["timesteps"],
                alone["noise_levels"],
                groups["condition"],
                groups["uncondition"],
                groups["common"],
                bool(alone["guided"]),
                input_name,
                "conditional_first" in alone,
            ), provenance
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run the step calibration-data") from None
        except (SafetensorError, OSError, KeyError, ValueError) as fault:
            raise UserError(
                f"{path}: not a trajectory ({fault}); run the step calibration-data again"
            ) from None


def generator(prompt_id: int, seed: int) -> torch.Generator:
    """The CPU generator of one image. It depends on prompt id and seed alone: not on batch, shard or
    device."""
    digest = hashlib.sha256(f"halftone noise {seed} {prompt_id}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def noise(prompt_id: int, seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal initial noise of one image, float32 on the CPU: the first draw of its generator."""
    return torch.randn(tuple(shape), generator=generator(prompt_id, seed))


@contextlib.contextmanager
def own_noise(pipeline: Any) -> Iterator[None]:
    """A run of a pipeline. A class-conditional one hands no generator to its scheduler: raises UserError
    where that draws noise then, on which no image's seed has a say."""
    if not takes_classes(pipeline):
        yield
        return
    before = _common_generators()
    yield
    if not all(map(torch.equal, before, _common_generators())):
        raise UserError(
            f"{type(pipeline).__name__} draws noise that no seed decides, by its "
            f"{type(pipeline.scheduler).__name__}; give the model a deterministic scheduler, such as DDIM"
        )


def _common_generators() -> list[Tensor]:
    """States of the generators that are nobody's own, of the CPU and of GPUs in use."""
    return [
        torch.random.get_rng_state(),
        *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []),
    ]


def run_arguments(
    pipeline: Any,
    ids: Sequence[int],
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float | None,
    resolution: int | None,
    seed: int,
) -> dict[str, Any]:
    """Arguments of the pipeline's `__call__` for one batch of images with noise of their own.

    Every image has its generator, for the initial noise and for what a stochastic scheduler draws later.
    Latents of a conditional U-Net are drawn here in float32, so that a half-precision run starts from the
    same noise. A pipeline that takes no prompt is given how many images to make, or their classes. Raises
    UserError where it needs more than this, or cannot draw at the resolution.
    """
    denoiser: Any = denoiser_of(pipeline)
    check_call(pipeline, getattr(denoiser, "config", {}), resolution)
    takes = inspect.signature(type(pipeline).__call__).parameters
    generators = [generator(k, seed) for k in ids]
    given: dict[str, Any] = {
        "generator": generators,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    given |= {"prompt": list(prompts)} if "prompt" in takes else {"batch_size": len(ids)}
    if takes_classes(pipeline):
        given[LABELS] = classes_of(denoiser.config, ids)
    if resolution is not None:
        given |= {"height": resolution, "width": resolution}
    latent_unet = isinstance(denoiser, UNet2DConditionModel) and hasattr(pipeline, "vae")
    if latent_unet:
        side = denoiser.config.sample_size if resolution is None else resolution // pipeline.vae_scale_factor
        shape = (pipeline.vae.config.latent_channels, side, side)
        drawn = [torch.randn(shape, generator=one) for one in generators]
        given["latents"] = torch.stack(drawn).to(denoiser.dtype)
    return {name: value for name, value in given.items() if name in takes}


def record(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float | None,
    resolution: int | None,
    seed: int,
    batch_size: int,
) -> Trajectory:
    """Run the pipeline on the prompts and keep what its denoiser is given. A prompt's id is its place.

    Recorded by a hook inside the real pipeline, so any scheduler works. An unconditional pipeline makes as
    many images as there are prompts. Raises UserError for inputs that a trajectory cannot hold.
    """
    denoiser = denoiser_of(pipeline)
    recorder = _Recorder(denoiser, pipeline, -(-len(prompts) // batch_size))
    hook = denoiser.register_forward_pre_hook(recorder, with_kwargs=True)
    quiet = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    takes = inspect.signature(type(pipeline).__call__).parameters
    output = {"output_type": "latent" if hasattr(pipeline, "vae") else "np"} if "output_type" in takes else {}
    try:
        for first in range(0, len(prompts), batch_size):
            ids = range(len(prompts))[first : first + batch_size]
            recorder.start(len(ids))
            batch = [prompts[k] for k in ids]
            arguments = run_arguments(
                pipeline, ids, batch, steps=steps, guidance=guidance, resolution=resolution, seed=seed
            )
            with torch.no_grad(), own_noise(pipeline):
                pipeline(**arguments, **output)
    finally:
        hook.remove()
        pipeline.set_progress_bar_config(**quiet)
    return recorder.finish()


class _Recorder:
    """The pre-forward hook of `record`: splits every call's inputs into latents, rows per prompt, and the
    rest."""

    def __init__(self, denoiser: nn.Module, pipeline: Any, n_batches: int) -> None:
        self.signature = inspect.signature(type(denoiser).forward)
        self.input_name = list(self.signature.parameters)[1]
        self.pipeline, self.n_batches = pipeline, n_batches
        self.latents: list[list[Tensor]] = []  # by batch, by call
        self.timesteps: list[list[Tensor]] = []
        self.noise_levels: list[float] = []
        self.others: list[Tensors] = []  # by batch
        self.rows = 0
        self.guided = False
        self.conditional_first = takes_classes(pipeline)
        self.progress: Progress | None = None

    def start(self, rows: int) -> None:
        self.rows = rows
        self.latents.append([])
        self.timesteps.append([])

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self.signature.bind(denoiser, *args, **kwargs).arguments
        tensors = dict(_flat({k: v for k, v in arguments.items() if k not in ("self", "return_dict")}))
        latents = tensors.pop(self.input_name).detach().to("cpu", copy=True)
        timestep = tensors.pop("timestep").detach().cpu().reshape(-1)[0]
        others = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        if not self.timesteps[-1]:
            self.guided = latents.shape[0] == 2 * self.rows
            self.others.append(others)
        elif others.keys() != self.others[-1].keys() or any(
            not torch.equal(value, self.others[-1][name]) for name, value in others.items()
        ):
            raise UserError(
                "the denoiser is given inputs that change from call to call; this pipeline is not supported"
            )
        if self.guided and torch.equal(latents[: self.rows], latents[self.rows :]):
            latents = latents[self.rows :].clone()
        if latents.shape[0] != self.rows:
            raise UserError(
                f"the denoiser is given {latents.shape[0]} different latents for {self.rows} prompts; "
                "this kind of guidance is not supported"
            )
        self.latents[-1].append(latents)
        self.timesteps[-1].append(timestep)
        if len(self.latents) == 1:
            self._note_level(float(timestep))
        self._advance()

    def _note_level(self, timestep: float) -> None:
        level = noise_level(self.pipeline.scheduler, timestep)
        if level is None:
            kind = type(self.pipeline.scheduler).__name__
            raise UserError(f"scheduler {kind} does not say its noise levels; choose another one")
        self.noise_levels.append(level)

    def _advance(self) -> None:
        if self.progress is None:
            calls = len(self.pipeline.scheduler.timesteps)
            self.progress = Progress("trajectory", self.n_batches * calls)
        self.progress.advance()

    def finish(self) -> Trajectory:
        first = torch.stack(self.timesteps[0])
        if any(len(t) != len(first) or not torch.equal(torch.stack(t), first) for t in self.timesteps):
            raise UserError(
                "the pipeline calls its denoiser at other timesteps in another batch; not supported"
            )
        per_row = [dict(self._rows(k)) for k in range(len(self.others))]
        conditions = {name: torch.cat([rows[name][-1] for rows in per_row]) for name in per_row[0]}
        unconditions = {name: per_row[0][name][0][:1].clone() for name in per_row[0]} if self.guided else {}
        common = {name: value for name, value in self.others[0].items() if name not in conditions}
        latents = torch.stack([torch.cat(call) for call in zip(*self.latents, strict=True)])
        levels = torch.tensor(self.noise_levels, dtype=torch.float32)
        return Trajectory(
            latents,
            first,
            levels,
            conditions,
            unconditions,
            common,
            self.guided,
            self.input_name,
            conditional_first=self.guided and self.conditional_first,
        )

    def _rows(self, batch: int) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Inputs with a row per row of the batch, split into halves, the unconditional one first."""
        rows = self.latents[batch][0].shape[0]
        for name, value in self.others[batch].items():
            if value.ndim and value.shape[0] == rows * (1 + self.guided):
                halves = value.split(rows)[:: -1 if self.conditional_first else 1]
                if self.guided and not torch.allclose(
                    halves[0], halves[0][:1].expand_as(halves[0]), atol=1e-3
                ):
                    raise UserError(f"{name}: the unconditional half differs between prompts; not supported")
                yield name, halves


def _flat(inputs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif name == "timestep":
            yield name, torch.as_tensor(value)
        elif value is not None:
            raise UserError(
                f"denoiser input {prefix}{name} is a {type(value).__name__}, which cannot be recorded"
            )


def sample_inputs(
    trajectory: Trajectory,
    samples: Sequence[Sample],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one denoiser forward on these rows, which may come from different calls.

    `dtype`: of floating-point inputs, their own by default. Timesteps are given per row.
    """
    calls = torch.tensor([sample.call for sample in samples])
    prompts = torch.tensor([sample.prompt for sample in samples])
    halves = torch.tensor([int(sample.half) for sample in samples], dtype=torch.bool)
    inputs: Tensors = {trajectory.input_name: trajectory.latents[calls, prompts]}
    for name, values in trajectory.conditions.items():
        rows = values[prompts]
        if name in trajectory.unconditions:
            rows[~halves] = trajectory.unconditions[name]
        inputs[name] = rows
    inputs |= trajectory.common
    given: dict[str, Any] = {"return_dict": False, "timestep": trajectory.timesteps[calls].to(device)}
    for name, value in inputs.items():
        *folders, last = name.split("/")
        place = given
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value.to(device, dtype if value.is_floating_point() else None)
    return given


def denoiser_inputs(
    trajectory: Trajectory,
    call: int,
    prompts: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one denoiser forward as the sampler makes it: all `prompts` (default: every one)
    at `call`, under guidance both halves in the pipeline's order."""
    chosen = range(trajectory.n_prompts) if prompts is None else prompts
    samples = [Sample(call, prompt, half) for half in trajectory.halves for prompt in chosen]
    return sample_inputs(trajectory, samples, device=device, dtype=dtype)
