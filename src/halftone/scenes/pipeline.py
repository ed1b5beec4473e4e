"""From trained parts to an ordinary Stable Diffusion pipeline folder, and pictures from one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from halftone.files import read_json, write_json, writing
from halftone.scenes.render import Pixels, grid
from halftone.scenes.tokenizer import write_tokenizer

STEPS, GUIDANCE = 25, 2.0


def build_scheduler() -> PNDMScheduler:
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Writes the folder in half precision. The pipeline given is converted in place."""
    pipe.to(dtype=torch.float16)
    with writing(folder) as temporary:
        pipe.save_pretrained(temporary, safe_serialization=True)
        write_tokenizer(temporary / "tokenizer")  # adds vocab.json and merges.txt
        for file in temporary.rglob("*.safetensors"):
            file.chmod(0o644)  # some writers make their files private
        for file in temporary.rglob("config.json"):  # a folder of the machine that trained it
            write_json(file, {k: v for k, v in read_json(file).items() if k != "_name_or_path"})


def sample(
    pipe: StableDiffusionPipeline, captions: Sequence[str], seed: int = 0, guidance: float = GUIDANCE
) -> Pixels:
    """One picture per caption, uint8 [n, 64, 64, 3]; each has its own generator."""
    generators = [torch.Generator("cpu").manual_seed(seed + k) for k in range(len(captions))]
    found = pipe(
        list(captions),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    )
    pictures: Pixels = np.rint(np.asarray(found.images) * 255).astype(np.uint8)
    return pictures


def sample_sheet(
    pipe: StableDiffusionPipeline,
    captions: Sequence[str],
    path: Path,
    columns: int = 8,
    guidance: float = GUIDANCE,
) -> None:
    """A PNG of one picture per caption, in rows of ``columns``."""
    from PIL import Image

    pictures = sample(pipe, captions, guidance=guidance)
    with writing(path) as temporary:
        Image.fromarray(grid(pictures, columns)).save(temporary, format="PNG")
