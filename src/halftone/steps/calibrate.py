"""The step `calibrate`: weight codes and activation parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffusers.models.attention_processor import Attention
from torch import nn

from halftone import device
from halftone.calls import CallContext
from halftone.denoiser import denoiser_of, is_layer, sites
from halftone.errors import UserError
from halftone.layers import WeightCodes, set_weights, wrap
from halftone.passes.calibrate import calibrate as observe
from halftone.passes.state import CalibrationState
from halftone.passes.weights import quantize_weights
from halftone.provenance import Provenance
from halftone.recipes import TimeAxis
from halftone.source import Source
from halftone.steps.choice import Choice, check_same_model
from halftone.trajectory import Trajectory


def calibrate(
    source: Source,
    trajectory: Trajectory,
    known: Provenance,
    choice: Choice,
    *,
    weights: Mapping[str, WeightCodes] | None = None,
    batch_size: int = 16,
    checkpoint: Path | None = None,
) -> CalibrationState:
    """Weight codes and activation parameters. `weights`: reconstructed ones, for a recipe that learns its
    rounding.

    The denoiser is wrapped meanwhile and handed back as it was. `checkpoint`: a file from which an
    interrupted run goes on.
    """
    check_same_model(source, known)
    if choice.learns_rounding != (weights is not None):
        needs = (
            "needs reconstructed weights"
            if choice.learns_rounding
            else "rounds weights to nearest and takes none"
        )
        raise UserError(f"recipe {choice.recipe}: {needs}; run reconstruct, or set the axis `rounding`")
    denoiser = denoiser_of(source.pipeline).to(device.best())
    found = sites(denoiser, choice.protocol, choice.recipe, choice.axes.shortcut)
    if weights is None:
        weights = quantize_weights(denoiser, found, choice.axes, choice.bits.weight)
    context = CallContext(trajectory.timesteps, trajectory.noise_levels)
    slots = trajectory.n_calls if choice.axes.time_axis is TimeAxis.PER_CALL else 1
    with restored(denoiser):
        dynamic = choice.axes.time_axis is TimeAxis.DYNAMIC
        quantizers = wrap(denoiser, found, choice.bits, slots, context, dynamic)
        set_weights(denoiser, weights, choice.bits.weight)
        activations = observe(
            denoiser,
            quantizers,
            context,
            trajectory,
            choice.axes,
            batch_size=batch_size,
            seed=known.seed,
            checkpoint=checkpoint,
        )
    return CalibrationState(dict(weights), activations, trajectory.timesteps, trajectory.noise_levels)


@contextlib.contextmanager
def restored(denoiser: nn.Module) -> Iterator[None]:
    """Put layers, their weights and the attention processors back at the end, as they were before."""
    modules = dict(denoiser.named_modules())
    layers = [(name, module, module.weight) for name, module in modules.items() if is_layer(module)]
    processors = [(m, m.processor) for m in modules.values() if isinstance(m, Attention)]
    try:
        yield
    finally:
        for name, layer, weight in layers:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, layer)
            layer.weight = weight
        for module, processor in processors:
            module.set_processor(processor)
