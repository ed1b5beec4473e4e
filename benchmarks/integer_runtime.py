"""Seconds per denoiser call, or per image: full precision in diffusers, simulated and integer execution.

    python benchmarks/integer_runtime.py [--bits w4a8] [--threads 2] [--rounds 15] [--images]

The embedded model at the size it is sampled at: 8 images with classifier-free guidance, a batch of 16. Each
round runs every variant once, in turn, so that what else the machine does falls on all of them alike. Ranges
are shared over the calls and weights rounded to nearest: neither changes the work of a call. `--images`
times 8 whole images instead, text encoder and autoencoder with them, and gives seconds for one. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import halftone
from halftone.denoiser import denoiser_of
from halftone.files import read_json
from halftone.prompts import read_prompts
from halftone.runtime.integer import execution_of, simulated_modules
from halftone.source import load_source

MODEL, PROMPTS = Path("data/models/scenes-t2i"), Path("data/prompts/calibration.txt")
BATCH, TEXT_TOKENS = 16, 32
STEPS, GUIDANCE = 25, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", action="store_true", help="whole images, not one call")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        variants = _variants(Path(folder) / "artefact", chosen.bits)
        make = _image if chosen.images else _call
        calls = {name: make(pipeline) for name, pipeline in variants.items()}
        load = os.getloadavg()[0]
        times = _interleaved(calls, chosen.rounds)
    _print(times, "s an image" if chosen.images else "ms", chosen.bits, chosen.threads, load)


def _variants(artefact: Path, bits: str) -> dict[str, DiffusionPipeline]:
    schedule = {"steps": STEPS, "guidance": GUIDANCE, "resolution": 64}
    halftone.quantize(MODEL, "minmax", read_prompts(PROMPTS), artefact, bits=bits, n_prompts=4, **schedule)
    integer = halftone.load(artefact, execution="integer")
    denoiser = denoiser_of(integer)
    print(f"integer: {execution_of(denoiser)}, {len(simulated_modules(denoiser))} modules simulated\n")
    return {
        "full precision (diffusers, float32)": load_source(MODEL).pipeline,
        "simulated": halftone.load(artefact),
        "integer": integer,
    }


def _image(pipeline: DiffusionPipeline) -> Callable[[], object]:
    prompts = read_prompts(PROMPTS)[: BATCH // 2]
    pipeline.set_progress_bar_config(disable=True)

    def image() -> object:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        return pipeline(
            prompts,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=64,
            width=64,
            generator=generators,
        )

    return image


def _call(pipeline: DiffusionPipeline) -> Callable[[], object]:
    denoiser = denoiser_of(pipeline)
    config = read_json(MODEL / "unet" / "config.json")
    generator = torch.Generator().manual_seed(0)
    side = config["sample_size"]
    latents = torch.randn(BATCH, config["in_channels"], side, side, generator=generator)
    text = torch.randn(BATCH, TEXT_TOKENS, config["cross_attention_dim"], generator=generator)

    def call() -> object:
        with torch.inference_mode():
            return denoiser(latents, 500, encoder_hidden_states=text)

    return call


def _interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # once without the clock: kernels are chosen and weights packed
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return times


def _print(times: dict[str, list[float]], unit: str, bits: str, threads: int, load: float) -> None:
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    rounds = len(next(iter(times.values())))
    print(
        f"{bits}, batch {BATCH}, {threads} threads, {cpu}, torch {torch.__version__}, {rounds} rounds, ",
        end="",
    )
    print(f"load before {load:.1f}\n")
    factor, digits = (1000, 0) if unit == "ms" else (2 / BATCH, 3)
    print(f"| execution | median, {unit} | quartiles | times full precision's speed |")
    print("| --- | --- | --- | --- |")
    full = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        low, middle, high = (factor * value for value in statistics.quantiles(seconds, n=4))
        ratio = factor * full / middle
        print(f"| {name} | {middle:.{digits}f} | {low:.{digits}f}-{high:.{digits}f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
