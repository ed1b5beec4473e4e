"""The unconditional model ``scenes-uncond``: a U-Net over pixels, its noise schedule, its pictures.

It draws scenes of one object at 32x32, without a caption and without an autoencoder. Pictures it is
trained on are the renderer's own, each 2x2 pixels averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from halftone.errors import UserError
from halftone.files import writing
from halftone.progress import track
from halftone.scenes import render
from halftone.scenes.grammar import sample_scene
from halftone.scenes.render import Pixels, grid

SIDE = 32  # pixels
WIDTHS = (32, 64, 64)
STEPS = 50
SAMPLED_AT_ONCE = 50  # pictures; fixed, because a batch's shape shows in the last bits of its pictures


def build(widths: Sequence[int] = WIDTHS) -> UNet2DModel:
    """Self-attention at 8x8 and in the middle; plain residual blocks at 32x32 and 16x16."""
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Signal to noise falls to 1.4e-4: little enough that pure noise is a fair start, even for the
    colour of the ground, which every pixel shares. Trailing: the first call is at the last timestep."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.025,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="trailing",
        clip_sample=True,
        set_alpha_to_one=True,
    )


def halve(pixels: Pixels) -> Pixels:
    """uint8 [n, h, w, 3] -> [n, h / 2, w / 2, 3]: the mean of every 2x2 pixels, rounded."""
    n, h, w, c = pixels.shape
    sums = pixels.reshape(n, h // 2, 2, w // 2, 2, c).sum((2, 4), dtype=np.uint16)
    halved: Pixels = ((sums + 2) // 4).astype(np.uint8)
    return halved


def double(pixels: Pixels) -> Pixels:
    """uint8 [n, h, w, 3] -> [n, 2 h, 2 w, 3]: every pixel four times."""
    return np.ascontiguousarray(pixels.repeat(2, axis=1).repeat(2, axis=2))


def pictures(count: int, rng: np.random.Generator) -> Pixels:
    """Renders of one object each, uint8 [count, 32, 32, 3]. Nothing is held out: there are no prompts."""
    scenes = [sample_scene(rng, single=1.0) for _ in range(count)]
    return halve(render.render(scenes, rng.integers(1 << 40, size=count)))


def assemble(unet: UNet2DModel) -> DDIMPipeline:
    pipe = DDIMPipeline(unet=unet.eval(), scheduler=build_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: DDIMPipeline, folder: Path) -> None:
    """Writes the folder in half precision. The pipeline given is converted in place."""
    pipe.to(dtype=torch.float16)
    with writing(folder) as temporary:
        pipe.save_pretrained(temporary, safe_serialization=True)


def load(folder: Path) -> DDIMPipeline:
    """The pipeline of a folder, in single precision. UserError when there is none."""
    if not (folder / "model_index.json").exists():
        raise UserError(
            f"{folder / 'model_index.json'}: no such file; give a diffusers folder of an unconditional model"
        )
    pipe = DDIMPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: DDIMPipeline, count: int, seed: int = 0, steps: int = STEPS) -> Pixels:
    """uint8 [count, 32, 32, 3]; picture k has its own generator, seeded ``seed + k``."""
    found = []
    for at in track(range(0, count, SAMPLED_AT_ONCE), "sampling"):
        seeds = range(seed + at, seed + min(at + SAMPLED_AT_ONCE, count))
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
        drawn = pipe(batch_size=len(seeds), generator=generators, num_inference_steps=steps, output_type="np")
        found.append(np.rint(np.asarray(drawn.images) * 255).astype(np.uint8))
    return np.concatenate(found)


def sample_sheet(pipe: DDIMPipeline, count: int, path: Path, steps: int = STEPS, columns: int = 8) -> None:
    """A PNG of pictures at twice their size, in rows of ``columns``."""
    from PIL import Image

    drawn = double(sample(pipe, count, steps=steps))
    with writing(path) as temporary:
        Image.fromarray(grid(drawn, columns)).save(temporary, format="PNG")
