"""A calibration of a tiny pipeline, as `calibrate` and `analyze` leave it, for tests of what follows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from halftone import artefact, provenance
from halftone.analysis import group_plan, resolve
from halftone.calls import CallContext, legacy_slots
from halftone.denoiser import denoiser_of, sites
from halftone.layers import set_weights, wrap
from halftone.passes.calibrate import calibrate
from halftone.passes.state import CalibrationState
from halftone.passes.weights import quantize_weights
from halftone.plan import Plan
from halftone.policies import TimeAxis
from halftone.probability_quantizer import Form
from halftone.quantizers.bits import Bits
from halftone.recipes import resolve as axes_of
from halftone.runtime import simulated
from halftone.settings import Protocol
from halftone.site_quantizer import SiteQuantizer
from halftone.skeleton import skeleton_of
from halftone.source import load_source
from halftone.start_token import kept_apart, tokenizers_of
from halftone.trajectory import record

STEPS, GUIDANCE, RESOLUTION = 4, 6.0, 16
PROMPTS = ["a large red star", "a small blue ring above a large green cross"]


@dataclass(frozen=True)
class Calibrated:
    """The state file and plan of a calibration, and the very model that was calibrated, quantizers off."""

    state: Path
    plan: Plan
    pipeline: Any
    quantizers: dict[str, SiteQuantizer]
    context: CallContext


def calibrated(
    folder: Path,
    state: Path,
    bits: str = "w4a8",
    recipe: str = "static",
    unet: Any = None,
    **overrides: Any,
) -> Calibrated:
    """Calibrate the pipeline in `folder` (with another denoiser, if given), weights rounded to nearest."""
    width, axes = (
        Bits.parse(bits),
        axes_of(recipe, {"rounding": "nearest", "weight_range": "minmax", **overrides}),
    )
    source = load_source(folder)
    pipeline = source.pipeline
    if unet is not None:
        pipeline.unet = unet
    schedule: dict[str, Any] = {
        "steps": STEPS,
        "guidance": GUIDANCE,
        "resolution": RESOLUTION,
        "seed": 0,
    }
    known = provenance.describe(
        pipeline,
        model_path="models/tiny",
        model_revision=None,
        model_sha256=source.weights_sha256,
        prompts=PROMPTS,
        **schedule,
    )
    trajectory = record(pipeline, PROMPTS, batch_size=2, **schedule)
    calls = trajectory.n_calls
    chosen: dict[str, Any] = {"recipe": recipe, "axes": axes, "protocol": Protocol.EQUAL}
    skeleton = skeleton_of(pipeline, RESOLUTION)
    skeleton = replace(skeleton, denoiser=copy.deepcopy(skeleton.denoiser))  # not to be wrapped
    plan = resolve(skeleton, bits=width, calls=calls, **chosen)
    denoiser = denoiser_of(pipeline)
    apart = kept_apart(axes, partial(tokenizers_of, pipeline))
    found = sites(denoiser, shortcut=axes.shortcut, start_token=apart, bits=width)
    weights = quantize_weights(denoiser, found, axes, width)
    context = CallContext(trajectory.timesteps, trajectory.noise_levels)
    slots = calls if axes.time_axis is TimeAxis.PER_CALL else 1
    dynamic = axes.time_axis is TimeAxis.DYNAMIC
    quantizers = wrap(denoiser, found, width, slots, context, dynamic, plan.relaxation, Form.of(axes))
    set_weights(denoiser, weights, width)
    activations = calibrate(denoiser, quantizers, context, trajectory, axes, batch_size=2)
    groups = {site: group_plan(parameters) for site, parameters in activations.items()}
    plan = resolve(skeleton, bits=width, calls=calls, groups=groups, **chosen)
    result = CalibrationState(
        dict(weights), activations, trajectory.timesteps, trajectory.noise_levels, plan.relaxed_calls
    )
    result.save(state, known.model_copy(update={**chosen, "bits": bits}))
    if axes.legacy_lookup:
        context.lookup = legacy_slots(trajectory.timesteps)
    simulated.multiply_whole_numbers(denoiser, weights)  # from here on as a loaded artefact does
    return Calibrated(state, plan, pipeline, quantizers, context)


_made: dict[Path, tuple[Calibrated, Path]] = {}


def shared_artefact(factory: pytest.TempPathFactory, model: Path) -> tuple[Calibrated, Path]:
    """One W4A8 calibration and its artefact for all test modules; whoever damages files works on a copy."""
    if model not in _made:
        home = factory.mktemp("shared")
        found = calibrated(model, home / "state.safetensors")
        artefact.write(home / "tiny_static_w4a8", found.state, found.plan, load_source(model))
        _made[model] = found, home / "tiny_static_w4a8"
    return _made[model]
