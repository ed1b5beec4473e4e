"""The step `calibrate`: weight codes, activation parameters, and what is taken off the output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from halftone import device
from halftone.calls import CallContext, legacy_slots
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.layers import WeightCodes, quantized_layers, set_weights
from halftone.passes import calibrate as reference
from halftone.passes import progressive
from halftone.passes.checkpoint import seed_of
from halftone.passes.correction import fit_correction
from halftone.passes.relax import relax_shared
from halftone.passes.rollout import Runs, runs_of
from halftone.passes.state import CalibrationState
from halftone.passes.step_size import learn_step_sizes
from halftone.passes.weights import quantize_weights
from halftone.policies import CalibrationInputs, Correction, StepSize, TimeAxis
from halftone.provenance import Provenance
from halftone.relaxing import Interval, Relaxation, relaxed_calls
from halftone.settings import Reconstruction
from halftone.source import Source
from halftone.steps.choice import Choice, check_same_model
from halftone.steps.wrapped import in_use, sites_of, wrapped
from halftone.trajectory import Trajectory


def calibrate(
    source: Source,
    trajectory: Trajectory,
    known: Provenance,
    choice: Choice,
    *,
    factors: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, WeightCodes] | None = None,
    batch_size: int = 16,
    how: Reconstruction | None = None,
    work: Path | None = None,
    relaxed: tuple[int, ...] | None = None,
) -> CalibrationState:
    """Weight codes and activation parameters. `factors`: of the step `reparameterize`, for a recipe that has
    it. `weights`: reconstructed ones, for a recipe that learns its
    rounding. `how`: of step-size learning, for a recipe that learns its scales. `relaxed`: the calls that
    the step `sensitivity` chose, for a recipe that leaves that to it.

    The denoiser is wrapped meanwhile and handed back as it was. `work`: a folder from which an interrupted
    run goes on; the caller removes it. Without one nothing is kept on the way.
    """
    check_same_model(source, known)
    if choice.learns_rounding != (weights is not None):
        needs = (
            "needs reconstructed weights"
            if choice.learns_rounding
            else "rounds weights to nearest and takes none"
        )
        raise UserError(f"recipe {choice.recipe}: {needs}; run reconstruct, or set the axis `rounding`")
    if (choice.axes.relaxing == Interval.AUTO) != (relaxed is not None):
        needs = "is not auto and takes no choice" if relaxed is not None else "auto needs a choice"
        raise UserError(f"recipe {choice.recipe}: relaxing {needs}; run sensitivity, or set the axis")
    if choice.axes.legacy_lookup:
        legacy_slots(trajectory.timesteps)  # refused before anything is spent
    denoiser = denoiser_of(source.pipeline).to(device.best())
    found = sites_of(source.pipeline, choice)
    context = CallContext(trajectory.timesteps, trajectory.noise_levels)
    per_call = choice.axes.time_axis is TimeAxis.PER_CALL
    slots = trajectory.n_calls if per_call else 1
    if relaxed is None:
        relaxed = relaxed_calls(choice.axes.relaxing, trajectory.n_calls)
    relaxation = Relaxation(relaxed, choice.axes.relaxed_bits) if relaxed else None
    within = relaxation if per_call else None
    with wrapped(denoiser, found, choice, context, slots, factors=factors, relaxation=within) as quantizers:
        if weights is None:
            weights = quantize_weights(denoiser, found, choice.axes, choice.bits)
        # both in memory only where the full-precision outputs are needed once more
        learned = choice.axes.step_size is StepSize.LEARNED
        set_weights(denoiser, weights, choice.bits, keep_full_precision=learned)
        activations = reference.calibrate(
            denoiser,
            quantizers,
            context,
            trajectory,
            choice.axes,
            batch_size=batch_size,
            seed=known.seed,
            checkpoint=None if work is None else work / "calls.safetensors",
        )
        made = reference.denoiser_calls(trajectory, choice.axes, batch_size, known.seed)
        if choice.axes.calibration_inputs is CalibrationInputs.PROGRESSIVE:
            batches = -(-trajectory.n_prompts // batch_size)

            def noise(draw: int) -> Runs:
                seed = known.seed if draw == 0 else seed_of("noise", known.seed, f"draw {draw}")
                return runs_of(source.pipeline.to(device.best()), trajectory, known, batch_size, seed=seed)

            made += progressive.denoiser_calls(choice.axes, trajectory.n_calls, batches)
            with _folder(work, "progressive") as place:
                activations = progressive.calibrate_progressively(
                    source.pipeline,
                    denoiser,
                    quantizers,
                    context,
                    trajectory,
                    choice.axes,
                    activations,
                    noise,
                    checkpoint=place,
                )
        if learned:
            for layer in quantized_layers(denoiser).values():
                layer.use_full_precision(True)
            with _folder(work, "step_sizes") as place:
                activations = learn_step_sizes(
                    denoiser,
                    quantizers,
                    context,
                    trajectory,
                    weights,
                    activations,
                    choice.axes,
                    how or Reconstruction(),
                    bits=choice.bits,
                    seed=known.seed,
                    checkpoint=place,
                )
        if relaxation is not None and not per_call:
            activations = relax_shared(activations, quantizers, relaxation, trajectory.n_calls)
    correction = None
    if choice.axes.correction is not Correction.NONE:
        slots = trajectory.n_calls if per_call or relaxation else 1
        runs = runs_of(source.pipeline.to(device.best()), trajectory, known, batch_size)
        with wrapped(
            denoiser, found, choice, context, slots, factors=factors, relaxation=relaxation
        ) as quantizers:
            use = in_use(denoiser, quantizers, weights, activations, choice.bits)
            with _folder(work, "correction") as place:
                correction = fit_correction(
                    source.pipeline,
                    denoiser,
                    context,
                    trajectory,
                    runs,
                    use,
                    choice.axes.correction,
                    known.guidance,
                    checkpoint=place,
                    facts=(choice.axes.model_dump(mode="json"), str(choice.bits)),
                )
        made += 2 * trajectory.n_calls * len(runs)
    return CalibrationState(
        dict(weights),
        activations,
        trajectory.timesteps,
        trajectory.noise_levels,
        relaxed,
        made,
        dict(factors or {}),
        correction,
    )


@contextmanager
def _folder(work: Path | None, name: str) -> Iterator[Path]:
    """Where checkpoints of a name lie; without `work` they are gone at the end."""
    with tempfile.TemporaryDirectory(prefix="halftone-") as spare:
        yield (work or Path(spare)) / name
