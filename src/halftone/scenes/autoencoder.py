"""The autoencoder between pixels and latents: factor 4, four channels, no attention.

Images [n, 3, 64, 64] in [-1, 1]; latents [n, 4, 16, 16]. ``scaling_factor`` brings the latents of
the training renders to unit variance.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from halftone.files import writing
from halftone.scenes.render import SIDE, Pixels, grid, render
from halftone.scenes.splits import sample_training_scene
from halftone.scenes.training import Log, adamw, set_rate, warmed_cosine

WIDTHS = (16, 32, 64)
LATENT_CHANNELS = 4
KL_WEIGHT = 1e-5
GRADIENT_WEIGHT = 1.0
PEAK_RATE = 2e-3


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def to_signal(pixels: Pixels) -> Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_pixels(signal: Tensor) -> Pixels:
    """float [n, 3, h, w] in [-1, 1] -> uint8 [n, h, w, 3]."""
    levels = signal.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())


def training_pixels(count: int, rng: np.random.Generator) -> Pixels:
    scenes = [sample_training_scene(rng, single=0.25) for _ in range(count)]
    return render(scenes, rng.integers(1 << 40, size=count))


def reconstruction_loss(drawn: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 + L1 of horizontal and vertical differences."""
    off = drawn - target
    slope = off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
    return off.abs().mean() + off.square().mean() + GRADIENT_WEIGHT * slope


def psnr(drawn: Pixels, target: Pixels) -> float:
    """Of all images together, in dB."""
    error: NDArray[np.float64] = (drawn.astype(np.float64) - target) ** 2
    return float(10 * np.log10(255.0**2 / max(error.mean(), 1e-9)))


@torch.no_grad()
def measure(vae: AutoencoderKL, pixels: Pixels) -> tuple[float, float, Pixels]:
    """PSNR (dB), standard deviation of the unscaled latents, and the reconstructions."""
    mean = vae.encode(to_signal(pixels)).latent_dist.mode()
    drawn = to_pixels(vae.decode(mean).sample)
    return psnr(drawn, pixels), float(mean.std()), drawn


def train(
    folder: Path, work: Path, images: int, batch: int = 16, seed: int = 1, start: Path | None = None
) -> None:
    """Trains on fresh renders and writes a diffusers folder; log and pictures go to ``work``.

    A short run, so it is not resumable; the folder is refreshed every fiftieth of the way. ``start``
    is the folder of an autoencoder to continue from, under a new schedule.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = build() if start is None else AutoencoderKL.from_pretrained(start).train()
    optimizer = adamw([(list(vae.parameters()), PEAK_RATE)], decay=1e-4)
    held = training_pixels(128, np.random.default_rng(seed + 1))
    log, started, steps = Log(work / "autoencoder.jsonl"), time.monotonic(), images // batch
    chunk = training_pixels(4096, rng)
    for step in range(steps):
        if step and step % (4096 // batch) == 0:
            chunk = training_pixels(4096, rng)
        at = step * batch % 4096
        target = to_signal(chunk[at : at + batch])
        set_rate(optimizer, warmed_cosine(step / steps, 0.03))
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(target).latent_dist
            drawn = vae.decode(latents.sample()).sample
        loss = reconstruction_loss(drawn.float(), target)
        total = loss + KL_WEIGHT * latents.kl().float().mean() / (LATENT_CHANNELS * (SIDE // 4) ** 2)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % max(steps // 50, 1) == 0 or step == steps - 1:
            ratio, deviation, shown = measure(vae, held)
            vae.register_to_config(scaling_factor=round(1 / deviation, 5))
            with writing(folder) as temporary:
                vae.save_pretrained(temporary)
            _show(work / "autoencoder.png", held, shown)
            rate = (step + 1) * batch / (time.monotonic() - started)
            log.write(step=step, loss=loss.item(), psnr=ratio, latent_std=deviation, rate=rate)


def _show(path: Path, target: Pixels, drawn: Pixels) -> None:
    from PIL import Image

    pairs = np.stack([target[:20], drawn[:20]], axis=1).reshape(-1, SIDE, SIDE, 3)
    with writing(path) as temporary:
        Image.fromarray(grid(pairs, 8)).save(temporary, format="PNG")
