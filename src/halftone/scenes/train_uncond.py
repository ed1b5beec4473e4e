"""Training of ``scenes-uncond``.

The run may be killed at any moment and started again: it continues from its last checkpoint (SIGTERM
makes it write one first), and every step draws its renders and its noise from (seed, images seen) alone,
so a run that was stopped ends at the very weights of one that was not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline
from torch import Tensor, nn

from halftone.scenes import loop, uncond
from halftone.scenes.autoencoder import to_signal
from halftone.scenes.denoiser import spread_timesteps, weighted_loss
from halftone.scenes.training import (
    Average,
    Log,
    adamw,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
    set_rate,
    warmed_cosine,
)

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Plan:
    images: int = 160_000  # seen in all, every one a fresh render; the learning rate reaches zero here
    batch: int = 16
    seed: int = 7
    peak: float = 1e-3
    warm_up: float = 0.02  # share of the run
    decay: float = 0.01
    average: float = 0.999
    bfloat16: bool = False
    compiled: bool = False
    widths: tuple[int, ...] = uncond.WIDTHS
    first_save: int = 3_200  # images
    save_seconds: float = 120.0
    sheet_seconds: float = 720.0
    sheet: int = 32  # pictures on a sheet
    sheet_steps: int = 25  # of the sampler, for a sheet


class Trainer:
    """``images`` seen so far; ``log`` under ``work``, as are the checkpoint and the sheets."""

    def __init__(self, work: Path, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.work, self.plan = work, plan
        self.unet = uncond.build(plan.widths).train()
        self.optimizer = adamw([(list(self.unet.parameters()), plan.peak)], plan.decay)
        self.average = Average(self.unet, plan.average)
        self.alphas = uncond.build_scheduler().alphas_cumprod
        self.log = Log(work / "uncond.jsonl")
        self.forward = torch.compile(self.unet, dynamic=False) if plan.compiled else self.unet
        self.images = 0
        if (work / CHECKPOINT).exists():
            self._resume()

    def _resume(self) -> None:
        parts, facts = load_checkpoint(self.work / CHECKPOINT)
        self.unet.load_state_dict(parts["unet"])
        self.average.load(parts["unet-average"], facts["steps"])
        load_optimizer(self.optimizer, parts["optimizer"])
        self.images = facts["images"]

    def save(self) -> None:
        parts = {
            "unet": self.unet.state_dict(),
            "unet-average": self.average.values,
            "optimizer": optimizer_tensors(self.optimizer),
        }
        facts = {
            "images": self.images,
            "planned": self.plan.images,
            "steps": self.average.step,
            "widths": self.plan.widths,
        }
        save_checkpoint(self.work / CHECKPOINT, parts, facts)

    def step(self) -> Tensor:
        """One batch; returns its loss."""
        plan = self.plan
        rng = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.images)
        target = to_signal(uncond.pictures(plan.batch, np.random.default_rng([plan.seed, self.images])))
        noise = torch.randn(target.shape, generator=rng)
        timesteps = spread_timesteps(plan.batch, rng)
        kept = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * target + (1 - kept).sqrt() * noise
        set_rate(self.optimizer, warmed_cosine(self.images / plan.images, plan.warm_up))
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            predicted = self.forward(noisy, timesteps).sample
        loss = weighted_loss(predicted.float(), noise, self.alphas, timesteps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.unet)
        self.images += plan.batch
        return loss.detach()

    def run(self) -> None:
        loop.run(self, self.plan)

    def show(self) -> None:
        """A sheet of pictures from the averaged weights, of the same noise every time."""
        pipe = averaged_pipeline(self.average.values, self.plan.widths)
        path = self.work / "sheets" / f"images-{self.images:07d}.png"
        uncond.sample_sheet(pipe, self.plan.sheet, path, self.plan.sheet_steps)


def averaged_pipeline(weights: dict[str, Tensor], widths: tuple[int, ...]) -> DDIMPipeline:
    unet = uncond.build(widths)
    unet.load_state_dict(weights)
    return uncond.assemble(unet)


def checkpoint_pipeline(work: Path) -> tuple[DDIMPipeline, int]:
    """The pipeline of the averaged weights of the last checkpoint, and how many images it has seen."""
    parts, facts = load_checkpoint(work / CHECKPOINT)
    return averaged_pipeline(parts["unet-average"], tuple(facts["widths"])), facts["images"]
