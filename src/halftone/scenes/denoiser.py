"""The denoiser of ``scenes-t2i`` and what it is trained to minimize."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from halftone.scenes.autoencoder import LATENT_CHANNELS
from halftone.scenes.text_encoder import WIDTH as TEXT_WIDTH

SIDE = 16  # latent pixels
WIDTHS = (64, 128)
TRAIN_STEPS = 1000
SNR_LIMIT = 5.0


def build() -> UNet2DConditionModel:
    """Cross-attention at 8x8 and in the middle; plain residual blocks at 16x16."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=TRAIN_STEPS, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )


def spread_timesteps(count: int, rng: torch.Generator) -> Tensor:
    """[count] timesteps, one from each of ``count`` equal ranges, in random order: less noise in
    the gradient than independent draws, and the same expectation."""
    at = (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)) / count
    return (at * TRAIN_STEPS).long().clamp_(max=TRAIN_STEPS - 1)


def weighted_loss(predicted: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Mean squared error of the noise; all [n, 4, 16, 16]. Weighted by 1 / sqrt(SNR) where noise
    prevails and by 5 / SNR (min-SNR) where it is faint. Where objects stand is decided at the highest
    noise, and there the noise is easily guessed: at weight 1 the relation of two objects was not learned."""
    kept = alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    weight = snr.rsqrt().clamp(min=1.0) * (SNR_LIMIT / snr).clamp(max=1.0)
    return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
