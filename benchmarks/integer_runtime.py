"""Seconds per denoiser call: full precision in diffusers, simulated execution, integer execution.

    python benchmarks/integer_runtime.py [--bits w4a8] [--threads 2] [--rounds 15]

The embedded model at the size it is sampled at: 8 images with classifier-free guidance, a batch of 16. Each
round runs every variant once, in turn, so that what else the machine does falls on all of them alike. Ranges
are shared over the calls and weights rounded to nearest: neither changes the work of a call. Prints a
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
from torch import nn

import halftone
from halftone.denoiser import denoiser_of
from halftone.files import read_json
from halftone.prompts import read_prompts
from halftone.runtime.integer import execution_of, simulated_modules
from halftone.source import load_source

MODEL, PROMPTS = Path("data/models/scenes-t2i"), Path("data/prompts/calibration.txt")
BATCH, TEXT_TOKENS = 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        variants = _variants(Path(folder) / "artefact", chosen.bits)
        calls = {name: _call(denoiser) for name, denoiser in variants.items()}
        load = os.getloadavg()[0]
        times = _interleaved(calls, chosen.rounds)
    _print(times, chosen.bits, chosen.threads, load)


def _variants(artefact: Path, bits: str) -> dict[str, nn.Module]:
    schedule = {"steps": 4, "guidance": 2.0, "resolution": 64}
    halftone.quantize(MODEL, "minmax", read_prompts(PROMPTS), artefact, bits=bits, n_prompts=4, **schedule)
    integer = denoiser_of(halftone.load(artefact, execution="integer"))
    print(f"integer: {execution_of(integer)}, {len(simulated_modules(integer))} modules simulated\n")
    return {
        "full precision (diffusers, float32)": denoiser_of(load_source(MODEL).pipeline),
        "simulated": denoiser_of(halftone.load(artefact)),
        "integer": integer,
    }


def _call(denoiser: nn.Module) -> Callable[[], object]:
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


def _print(times: dict[str, list[float]], bits: str, threads: int, load: float) -> None:
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    rounds = len(next(iter(times.values())))
    print(
        f"{bits}, batch {BATCH}, {threads} threads, {cpu}, torch {torch.__version__}, {rounds} rounds, ",
        end="",
    )
    print(f"load before {load:.1f}\n")
    print(
        "| execution | median ms | quartiles ms | times full precision's speed |\n| --- | --- | --- | --- |"
    )
    full = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
        print(f"| {name} | {middle:.0f} | {low:.0f}-{high:.0f} | {1000 * full / middle:.2f} |")


if __name__ == "__main__":
    main()
