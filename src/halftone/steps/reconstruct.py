"""The step `reconstruct`: weight codes by block reconstruction, in one round or several."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from halftone import device
from halftone.calls import CallContext
from halftone.denoiser import SiteKind, denoiser_of
from halftone.layers import set_weights
from halftone.passes import calibrate as reference
from halftone.passes import checkpoint as checkpoints
from halftone.passes.aligned import aligned_trajectory
from halftone.passes.reconstruct import Round, learn_round
from halftone.passes.reconstructed import Reconstructed, UnitReport
from halftone.passes.rollout import runs_of
from halftone.policies import TimeAxis
from halftone.provenance import Provenance
from halftone.relaxing import Relaxation, relaxed_calls
from halftone.settings import Reconstruction
from halftone.source import Source
from halftone.steps.choice import Choice, check_same_model
from halftone.steps.wrapped import sites_of, wrapped
from halftone.trajectory import Trajectory


def reconstruct(
    source: Source,
    trajectory: Trajectory,
    known: Provenance,
    choice: Choice,
    *,
    factors: Mapping[str, Tensor] | None = None,
    how: Reconstruction | None = None,
    seed: int = 0,
    checkpoint: Path,
    shared: Path | None = None,
) -> Reconstructed:
    """Weight codes by block reconstruction. `factors`: of `reparameterize`, for a recipe that has it.
    `checkpoint`: a folder in which an interrupted run can go on; `shared`: one in which finished units stay
    for other rows whose weights are learned alike.

    After the first round of several, each learns on what the sampler makes with the weights of the round
    before and activations whose ranges are fitted to them, from the same noise; the outputs to keep are full
    precision's on the same inputs. Such data replace those before (TCAQ-DM, PAR: our choice, the paper is
    silent).
    """
    check_same_model(source, known)
    work = _Work(source, known, choice, factors, how or Reconstruction(), seed, checkpoint, shared)
    return work.run(trajectory)


class _Work:
    def __init__(
        self,
        source: Source,
        known: Provenance,
        choice: Choice,
        factors: Mapping[str, Tensor] | None,
        how: Reconstruction,
        seed: int,
        checkpoint: Path,
        shared: Path | None,
    ) -> None:
        self.source, self.known, self.choice, self.factors = source, known, choice, factors
        self.how, self.seed, self.checkpoint, self.shared = how, seed, checkpoint, shared
        self.denoiser = denoiser_of(source.pipeline).to(device.best())
        self.sites = sites_of(source.pipeline, choice)
        weights = [site for site in self.sites if site.kind is SiteKind.WEIGHT and site.quantized]
        self.modules = [site.module for site in weights]
        self.splits = {site.module: site.split for site in weights if site.split is not None}

    def run(self, data: Trajectory) -> Reconstructed:
        reports: list[UnitReport] = []
        calls, done = 0, None
        for number in range(1, self.choice.axes.rounds + 1):
            if done is not None:
                data, made = self._aligned(done, data)
                calls += made
            done = self._round(done, data, keep_soft=number < self.choice.axes.rounds)
            reports += done.found.units
        assert done is not None
        return dataclasses.replace(done.found, units=tuple(reports), denoiser_calls=calls)

    def _round(self, before: Round | None, data: Trajectory, *, keep_soft: bool) -> Round:
        place: AbstractContextManager[Any] = nullcontext()
        if self.choice.reparameterizes or self.factors:  # dividing is the work of quantizers, off meanwhile
            place = wrapped(self.denoiser, self.sites, self.choice, CallContext(), 1, factors=self.factors)
        with place:
            return learn_round(
                self.denoiser,
                data,
                self.choice.axes,
                self.choice.bits,
                self.how,
                self.seed,
                self.checkpoint,
                self.modules,
                self.splits,
                self.shared,
                before=before,
                keep_soft=keep_soft,
            )

    def _aligned(self, done: Round, data: Trajectory) -> tuple[Trajectory, int]:
        """What the model of a round gives its denoiser, and the denoiser calls that it took. The ranges of
        activations are fitted to that round's data, as for plain static calibration: for it scales are not
        learned, calibration is not progressive, and no calls are relaxed where these are still to be measured
        or parameters are shared over them."""
        axes, batch_size = self.choice.axes, self.how.batch_size
        runs = runs_of(self.source.pipeline.to(device.best()), data, self.known, batch_size)
        made = reference.denoiser_calls(data, axes, batch_size, self.known.seed) + data.n_calls * len(runs)
        path = self.checkpoint / f"data-{done.number + 1}.safetensors"
        facts = [done.mark, axes.model_dump(mode="json"), str(self.choice.bits), batch_size]
        facts += [[str(site) for site in self.sites], self.known.model_dump(mode="json")]
        mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        kept = checkpoints.load(path, mark)
        if kept is not None:
            return dataclasses.replace(data, latents=kept["latents"]), made
        context = CallContext(data.timesteps, data.noise_levels)
        per_call = axes.time_axis is TimeAxis.PER_CALL
        relaxed = relaxed_calls(axes.relaxing, data.n_calls) if per_call else ()
        with wrapped(
            self.denoiser,
            self.sites,
            self.choice,
            context,
            data.n_calls if per_call else 1,
            factors=self.factors,
            relaxation=Relaxation(relaxed, axes.relaxed_bits) if relaxed else None,
        ) as quantizers:
            set_weights(self.denoiser, done.found.weights, self.choice.bits)
            place = self.denoiser, quantizers, context, data
            reference.calibrate(*place, axes, batch_size=batch_size, seed=self.known.seed)
            found = aligned_trajectory(self.source.pipeline, *place, runs)
        checkpoints.save(path, {"latents": found.latents}, mark)
        return found, made
