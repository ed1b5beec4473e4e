"""Verbs that make ``scenes-t2i`` (autoencoder, text, denoiser, export, sheet) and ``scenes-uncond``
(uncond, export-uncond); log-run puts any training into MLflow.

``python -m halftone.scenes.train VERB``. Each reads and writes one working folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from halftone.scenes.training_runs import log_finished, log_run

Work = Annotated[Path, typer.Option(help="working folder: parts, latents, checkpoint, logs")]
Threads = Annotated[int, typer.Option(help="torch threads", min=1)]
WORK, MODEL = Path("build/scenes-t2i"), Path("data/models/scenes-t2i")
UNCOND_WORK, UNCOND_MODEL = Path("build/scenes-uncond"), Path("data/models/scenes-uncond")
verbs = typer.Typer(add_completion=False, no_args_is_help=True)


@verbs.command()
def autoencoder(
    work: Work = WORK,
    images: Annotated[int, typer.Option(help="training images")] = 56_000,
    threads: Threads = 2,
) -> None:
    """Train the autoencoder."""
    from halftone.scenes.autoencoder import train

    torch.set_num_threads(threads)
    train(work / "vae", work, images)


@verbs.command()
def text(
    work: Work = WORK,
    steps: Annotated[int, typer.Option(help="training steps")] = 800,
    threads: Threads = 2,
) -> None:
    """Write the tokenizer and train the text encoder on text alone."""
    from halftone.scenes.text_encoder import train
    from halftone.scenes.tokenizer import write_tokenizer

    torch.set_num_threads(threads)
    train(work / "text_encoder", work, write_tokenizer(work / "tokenizer"), steps)


@verbs.command()
def denoiser(
    work: Work = WORK,
    images: Annotated[int, typer.Option(help="images seen when the learning rate reaches zero")] = 420_000,
    batch: Annotated[int, typer.Option(help="images a step")] = 32,
    peak: Annotated[float, typer.Option(help="highest learning rate of the denoiser")] = 1e-3,
    bfloat16: Annotated[bool, typer.Option(help="bfloat16 autocast")] = True,
    compiled: Annotated[bool, typer.Option(help="compile the denoiser first (two minutes)")] = False,
    threads: Threads = 2,
) -> None:
    """Train the denoiser, or continue from the last checkpoint."""
    from halftone.scenes.train_t2i import Plan, Trainer

    torch.set_num_threads(threads)
    plan = Plan(images=images, batch=batch, peak=peak, bfloat16=bfloat16, compiled=compiled)
    trainer = Trainer(work, plan)
    trainer.run()
    log_finished("scenes-t2i", trainer)


@verbs.command()
def export(
    folder: Annotated[Path, typer.Argument(help="diffusers folder to write")] = Path(
        "data/models/scenes-t2i"
    ),
    work: Work = WORK,
) -> None:
    """Write the averaged weights of the last checkpoint as a pipeline folder in half precision."""
    from halftone.scenes.pipeline import save
    from halftone.scenes.train_t2i import checkpoint_pipeline

    pipe, images = checkpoint_pipeline(work)
    save(pipe, folder)
    typer.echo(f"{folder}: after {images} images")


@verbs.command()
def sheet(
    path: Annotated[Path, typer.Argument(help="PNG to write")],
    folder: Annotated[Path, typer.Option(help="pipeline folder")] = MODEL,
    split: Annotated[str, typer.Option(help="prompt split")] = "validation",
    count: Annotated[int, typer.Option(help="pictures", min=1)] = 32,
    guidance: Annotated[float, typer.Option(help="guidance scale")] = 2.0,
    threads: Threads = 1,
) -> None:
    """Draw the first prompts of a split as one picture."""
    from diffusers import StableDiffusionPipeline

    from halftone.scenes.pipeline import sample_sheet
    from halftone.scenes.splits import draw

    torch.set_num_threads(threads)
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = draw(split)[:count]
    sample_sheet(pipe, captions, path, guidance=guidance)
    typer.echo("\n".join(captions))


@verbs.command()
def uncond(
    work: Work = UNCOND_WORK,
    images: Annotated[int, typer.Option(help="images seen when the learning rate reaches zero")] = 160_000,
    batch: Annotated[int, typer.Option(help="images a step")] = 16,
    peak: Annotated[float, typer.Option(help="highest learning rate")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="of weights, renders and noise")] = 7,
    bfloat16: Annotated[bool, typer.Option(help="bfloat16 autocast")] = False,
    compiled: Annotated[bool, typer.Option(help="compile the U-Net first (minutes)")] = False,
    threads: Threads = 2,
) -> None:
    """Train the unconditional model, or continue from the last checkpoint."""
    from halftone.scenes.train_uncond import Plan, Trainer

    torch.set_num_threads(threads)
    plan = Plan(images, batch, seed, peak, bfloat16=bfloat16, compiled=compiled)
    trainer = Trainer(work, plan)
    trainer.run()
    log_finished("scenes-uncond", trainer)


@verbs.command()
def export_uncond(
    folder: Annotated[Path, typer.Argument(help="diffusers folder to write")] = UNCOND_MODEL,
    work: Work = UNCOND_WORK,
) -> None:
    """Write the averaged weights of the unconditional model's last checkpoint, in half precision."""
    from halftone.scenes.train_uncond import checkpoint_pipeline
    from halftone.scenes.uncond import save

    pipe, images = checkpoint_pipeline(work)
    save(pipe, folder)
    typer.echo(f"{folder}: after {images} images")


verbs.command("log-run")(log_run)

if __name__ == "__main__":
    verbs()
