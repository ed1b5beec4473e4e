"""Training of the denoiser of ``scenes-t2i``, jointly with its text encoder.

The run may be killed at any moment and started again: it continues from its last checkpoint (SIGTERM
makes it write one first), and every step draws from a generator seeded by (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from halftone.scenes import denoiser, loop
from halftone.scenes.latents import LatentBank
from halftone.scenes.pipeline import assemble, sample_sheet
from halftone.scenes.splits import draw
from halftone.scenes.text_encoder import tokenize
from halftone.scenes.training import (
    Average,
    Log,
    Tensors,
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
    images: int = 420_000  # seen in all; the learning rate reaches zero here
    batch: int = 32
    chunks: int = 30  # of the latent bank
    seed: int = 3
    peak: float = 1e-3
    text_peak: float = 1.5e-4
    warm_up: float = 0.02  # share of the run
    empty: float = 0.1  # share of empty captions
    average: float = 0.999
    bfloat16: bool = True
    compiled: bool = False
    first_save: int = 9_600  # images
    save_seconds: float = 300.0
    sheet_seconds: float = 720.0


class Trainer:
    def __init__(self, work: Path, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.work, self.plan = work, plan
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.vae = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)
        self.text = CLIPTextModel.from_pretrained(work / "text_encoder").train()
        self.unet = denoiser.build()
        self.optimizer = adamw(
            [(list(self.unet.parameters()), plan.peak), (list(self.text.parameters()), plan.text_peak)],
            decay=0.01,
        )
        self.averages = {"unet": Average(self.unet, plan.average), "text": Average(self.text, plan.average)}
        self.bank = LatentBank(work / "bank", self.vae, self.tokenizer, plan.chunks, plan.seed)
        self.alphas = denoiser.noise_schedule().alphas_cumprod
        self.nothing = tokenize(self.tokenizer, [""])
        self.log = Log(work / "t2i.jsonl")
        self.forward = torch.compile(self.unet, dynamic=False) if plan.compiled else self.unet
        self.images = 0
        if (work / CHECKPOINT).exists():
            self._resume()

    def _modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text": self.text}

    def _resume(self) -> None:
        parts, facts = load_checkpoint(self.work / CHECKPOINT)
        for name, module in self._modules().items():
            module.load_state_dict(parts[name])
            self.averages[name].load(parts[f"{name}-average"], facts["steps"])
        load_optimizer(self.optimizer, parts.get("optimizer", {}))  # none: started from given weights
        self.images = facts["images"]

    def save(self) -> None:
        parts: dict[str, Mapping[str, Tensor]] = {"optimizer": optimizer_tensors(self.optimizer)}
        for name, module in self._modules().items():
            parts[name], parts[f"{name}-average"] = module.state_dict(), self.averages[name].values
        facts = {"images": self.images, "planned": self.plan.images, "steps": self.averages["unet"].step}
        save_checkpoint(self.work / CHECKPOINT, parts, facts)

    def step(self) -> Tensor:
        """One batch; returns its loss."""
        plan = self.plan
        self._grow_bank()
        rng = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.images)
        latents, ids = self.bank.draw(plan.batch, rng)
        ids[torch.rand(plan.batch, generator=rng) < plan.empty] = self.nothing
        noise = torch.randn(latents.shape, generator=rng)
        timesteps = denoiser.spread_timesteps(plan.batch, rng)
        kept = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        set_rate(self.optimizer, warmed_cosine(self.images / plan.images, plan.warm_up))
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            words = self.text(ids).last_hidden_state
            predicted = self.forward(noisy, timesteps, words).sample
        loss = denoiser.weighted_loss(predicted.float(), noise, self.alphas, timesteps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for module in self._modules().values():
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        self.optimizer.step()
        for name, module in self._modules().items():
            self.averages[name].update(module)
        self.images += plan.batch
        return loss.detach()

    def _grow_bank(self) -> None:
        """One more chunk whenever as many images were seen as are in the bank, until it is full."""
        if not self.bank.full and self.images >= len(self.bank):
            self.bank.grow()

    def run(self) -> None:
        loop.run(self, self.plan)

    def show(self) -> None:
        """A sheet of 64 validation captions, drawn with the averaged weights."""
        parts: dict[str, Tensors] = {name: average.values for name, average in self.averages.items()}
        pipe = averaged_pipeline(self.work, parts)
        path = self.work / "sheets" / f"images-{self.images:07d}.png"
        sample_sheet(pipe, draw("validation")[:64], path, columns=16)


def averaged_pipeline(work: Path, parts: Mapping[str, Tensors]) -> StableDiffusionPipeline:
    """A pipeline of the finished parts in ``work`` with the given weights of denoiser and text encoder."""
    unet: UNet2DConditionModel = denoiser.build()
    text = CLIPTextModel.from_pretrained(work / "text_encoder")
    unet.load_state_dict(parts["unet"])
    text.load_state_dict(parts["text"], strict=False)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    return assemble(unet.eval(), vae.eval(), text.eval(), tokenizer)


def checkpoint_pipeline(work: Path) -> tuple[StableDiffusionPipeline, int]:
    """The pipeline of the averaged weights of the last checkpoint, and how many images it has seen."""
    parts, facts = load_checkpoint(work / CHECKPOINT)
    return averaged_pipeline(work, {k: parts[f"{k}-average"] for k in ("unet", "text")}), facts["images"]
