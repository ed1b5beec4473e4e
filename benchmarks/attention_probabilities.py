"""What the switches on attention probabilities do to a denoiser's output, call by call: error of the
probabilities alone, all else in float.

    OMP_NUM_THREADS=1 python benchmarks/attention_probabilities.py

Fitted to four calibration prompts, measured on four others along their reference trajectory: mean over its
calls of |output - full precision's| / |full precision's|.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halftone.calls import CallContext
from halftone.denoiser import SiteKind, denoiser_of, sites
from halftone.layers import wrap
from halftone.passes.calibrate import calibrate
from halftone.probability_quantizer import Form
from halftone.quantizers.bits import Bits
from halftone.recipes import resolve
from halftone.site_quantizer import Mode
from halftone.source import load_source
from halftone.start_token import kept_apart, tokenizers_of
from halftone.steps.wrapped import restored
from halftone.trajectory import Trajectory, denoiser_inputs, record

HOME = Path(__file__).parent.parent / "data"
HOW: dict[str, Any] = {"steps": 8, "guidance": 7.5, "resolution": 64, "seed": 0, "batch_size": 4}
DYNAMIC, APART = {"probabilities_scale": "dynamic"}, {"start_token": "apart"}
ADAPTIVE = {"probabilities": "adaptive"}
CHOICES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "uniform, dynamic": DYNAMIC,
    "uniform, dynamic, of a head": {**DYNAMIC, "probabilities_scope": "head"},
    "uniform, dynamic, start apart": {**DYNAMIC, **APART},
    "log2": {"probabilities": "log2"},
    "log2, dynamic, start apart": {"probabilities": "log2", **DYNAMIC, **APART},
    "adaptive, likelihood ratio": ADAPTIVE,
    "adaptive, output error": {**ADAPTIVE, "adaptive_selector": "output_error"},
}
BITS = (3, 4, 6, 8)


def trajectory(pipeline: Any, name: str) -> Trajectory:
    prompts = (HOME / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()[:4]
    return record(pipeline, prompts, **HOW)


def main() -> None:
    pipeline = load_source(HOME / "models" / "scenes-t2i").pipeline
    pipeline.set_progress_bar_config(disable=True)
    denoiser = denoiser_of(pipeline)
    fitted, measured = trajectory(pipeline, "calibration"), trajectory(pipeline, "validation")
    context = CallContext(fitted.timesteps, fitted.noise_levels)

    @torch.no_grad()
    def outputs() -> list[Tensor]:
        found = []
        for call in range(measured.n_calls):
            with context.at(call):
                found.append(denoiser(**denoiser_inputs(measured, call, range(4)))[0])
        return found

    full = outputs()
    for name, further in CHOICES.items():
        errors = []
        axes = resolve("static", {"rounding": "nearest", **further})
        found = sites(denoiser, start_token=kept_apart(axes, partial(tokenizers_of, pipeline)))
        chosen = [site for site in found if site.kind in (SiteKind.PROBABILITIES, SiteKind.VALUE)]
        for bits in BITS:
            with restored(denoiser):
                calls, form = fitted.n_calls, Form.of(axes)
                quantizers = wrap(denoiser, chosen, Bits(8, 8, bits), calls, context, probabilities=form)
                calibrate(denoiser, quantizers, context, fitted, axes, batch_size=4)
                for quantizer in quantizers.values():
                    if quantizer.site.kind is SiteKind.PROBABILITIES:
                        quantizer.mode = Mode.QUANTIZE
                pairs = zip(outputs(), full, strict=True)
                errors.append(sum(float((a - b).norm() / b.norm()) for a, b in pairs) / len(full))
        print(f"| {name} | " + " | ".join(f"{100 * error:.2g} %" for error in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
