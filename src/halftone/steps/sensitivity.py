"""The step `sensitivity`: which windows of calls matter for fidelity and for text match (PCR).

The paper's two experiments: the quantized model with one window of calls restored to full precision, and the
full-precision model disturbed in one window by Gaussian noise that imitates quantization error (here on the
denoiser's output, as strong as that error is on the reference trajectory at the same call: our choice, the
paper is silent). Where a run begins like one that is known, its outputs are taken from there, so a window
costs only the calls from its first one on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from halftone import device
from halftone.calls import CallContext
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.layers import WeightCodes
from halftone.passes.checkpoint import seed_of
from halftone.passes.correction import check_correction
from halftone.passes.rollout import Inputs, Outputs, Rollout, Runs, roll, runs_of, teacher_forced
from halftone.policies import Correction, TimeAxis
from halftone.progress import Progress
from halftone.provenance import Provenance
from halftone.relaxing import WINDOWS, Interval, Relaxation
from halftone.sensitivity import CLEAR, Measured, Sensitivity, Window, capacity, chosen, gains, windows
from halftone.settings import Reconstruction
from halftone.source import Source
from halftone.steps.calibrate import calibrate
from halftone.steps.choice import Choice
from halftone.steps.wrapped import in_use, sites_of, wrapped
from halftone.trajectory import Trajectory

_DIGITS = 6


class TextMatch(Protocol):
    """Scores images against prompts, such as `halftone.evaluate.alignment.Clip`."""

    name: str

    def cosines(self, images: Any, prompts: Sequence[str]) -> Tensor: ...


def sensitivity(
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
    n_windows: int = WINDOWS,
    prompts: Sequence[str] | None = None,
    clip: TextMatch | None = None,
) -> Sensitivity:
    """Measure windows of calls of the recipe without relaxing and correction, and choose the calls to relax.

    Arguments are those of `calibrate`; prompts, clip: for the text match, which is left out without them.
    Raises UserError where relaxing would give no bits.
    """
    base, relaxed = choice.bits.activation, choice.axes.relaxed_bits
    if relaxed <= base:
        raise UserError(f"relaxed_bits {relaxed}: activations have {base} already; ask for more, or fewer")
    check_correction(source.pipeline, choice.axes)
    without = {"relaxing": Interval.NONE, "correction": Correction.NONE}
    plain = replace(choice, axes=choice.axes.model_copy(update=without))
    state = calibrate(
        source,
        trajectory,
        known,
        plain,
        factors=factors,
        weights=weights,
        batch_size=batch_size,
        how=how,
        work=work,
    )
    pipeline = source.pipeline.to(device.best())
    denoiser = denoiser_of(pipeline)
    found = sites_of(pipeline, plain)
    context = CallContext(trajectory.timesteps, trajectory.noise_levels)
    slots = trajectory.n_calls if plain.axes.time_axis is TimeAxis.PER_CALL else 1
    runs = runs_of(pipeline, trajectory, known, batch_size, images=clip is not None)
    parts = windows(trajectory.n_calls, n_windows)
    with wrapped(denoiser, found, plain, context, slots, factors=factors) as quantizers:
        use = in_use(denoiser, quantizers, state.weights, state.activations, plain.bits)
        work_ = _Work(pipeline, trajectory, runs, context, use, known.seed)
        return work_.measure(parts, plain, known, choice, prompts, clip)


class _Work:
    """The runs that are compared. `counted`: calls of the denoiser so far."""

    def __init__(
        self,
        pipeline: Any,
        trajectory: Trajectory,
        runs: Runs,
        context: CallContext,
        use: Callable[[bool], None],
        seed: int,
    ) -> None:
        self.pipeline, self.trajectory, self.runs = pipeline, trajectory, runs
        self.context, self.use, self.seed = context, use, seed
        self.denoiser = denoiser_of(pipeline)
        self.counted = 0

    def measure(
        self,
        parts: list[tuple[int, ...]],
        plain: Choice,
        known: Provenance,
        choice: Choice,
        prompts: Sequence[str] | None,
        clip: TextMatch | None,
    ) -> Sensitivity:
        whole, noise = self._full_precision()
        reference = roll(self.pipeline, self.trajectory, self.runs, lambda call, k, _: whole[call][k])
        every = frozenset(range(self.trajectory.n_calls))
        quantized = self._run(every)
        progress = Progress("sensitivity", 2 * len(parts))
        score = _Score(reference, prompts, clip)
        restored_, perturbed = [], []
        for calls in parts:
            inside = frozenset(calls)
            run = self._run(every - inside, quantized.outputs, calls[0])
            restored_.append(score(run))
            progress.advance()
            run = self._run(frozenset(), whole, calls[0], {call: noise[call] for call in calls})
            perturbed.append(score(run))
            progress.advance()
        cost, whole_match = score(quantized), score(reference)
        clear = score.clearly_worse(quantized)
        gained = gains(cost, whole_match, restored_, text=clear)
        base, relaxed = choice.bits.activation, choice.axes.relaxed_bits
        n_calls = self.trajectory.n_calls
        calls = chosen(parts, gained, capacity(choice.axes.relaxed_budget, base, relaxed, n_calls))
        return Sensitivity(
            made_for=choice.describe(known),
            clip=None if clip is None else clip.name,
            text_clear=clear,
            quantized=cost,
            full_precision=whole_match,
            noise=tuple(_rounded(value) for value in noise),
            windows=tuple(
                Window(calls=part, restored=r, perturbed=p, gain=_rounded(gain))
                for part, r, p, gain in zip(parts, restored_, perturbed, gained, strict=True)
            ),
            denoiser_calls=self.counted,
            relaxed_calls=calls,
            average_bits=_rounded(Relaxation(calls, relaxed).average(base, n_calls)),
        )

    def _full_precision(self) -> tuple[Outputs, list[float]]:
        """Outputs on the reference trajectory, and the rms of quantization error in them at every call."""
        found = []
        for quantized in (False, True):
            self.use(quantized)
            found.append(teacher_forced(self.denoiser, self.trajectory, self.runs, self.context))
            self.counted += self.trajectory.n_calls * len(self.runs)
        whole, own = found
        errors = [
            torch.cat([(a - b).flatten() for a, b in zip(x, y, strict=True)])
            for x, y in zip(whole, own, strict=True)
        ]
        return whole, [float(error.double().square().mean().sqrt()) for error in errors]

    def _run(
        self,
        quantized: frozenset[int],
        before: Outputs | None = None,
        start: int = 0,
        noise: Mapping[int, float] | None = None,
    ) -> Rollout:
        """Sample with the denoiser quantized at these calls. before: outputs of the calls up to `start`;
        noise: standard deviation of what is added to the output, by call."""

        def answer(call: int, batch: int, given: Inputs) -> Tensor:
            if before is not None and call < start:
                return before[call][batch]
            self.use(call in quantized)
            self.counted += 1
            with self.context.at(call):
                output: Tensor = self.denoiser(**given)[0]
            strength = (noise or {}).get(call)
            return output if strength is None else output + strength * self._noise(call, batch, output)

        return roll(self.pipeline, self.trajectory, self.runs, answer)

    def _noise(self, call: int, batch: int, like: Tensor) -> Tensor:
        """Standard normal, of each prompt its own, so that it does not depend on the batch."""
        ids = self.runs[batch][0]
        shape = (like.shape[0] // len(ids), *like.shape[1:])
        rows = []
        for prompt in ids:
            generator = torch.Generator().manual_seed(seed_of("disturb", self.seed, f"{call} {prompt}"))
            rows.append(torch.randn(shape, generator=generator))
        return torch.stack(rows, dim=1).flatten(0, 1).to(like)


class _Score:
    """Measures runs against full precision's."""

    def __init__(self, reference: Rollout, prompts: Sequence[str] | None, clip: TextMatch | None) -> None:
        self.reference, self.prompts, self.clip = reference.latents[-1], prompts, clip
        self.own = self._matches(reference)

    def __call__(self, run: Rollout) -> Measured:
        latents, reference = (x.double().flatten(1) for x in (run.latents[-1], self.reference))
        errors = (latents - reference).norm(dim=1) / reference.norm(dim=1)
        matches = self._matches(run)
        return Measured(
            latent_error=_rounded(float(errors.mean())),
            text_match=None if matches is None else _rounded(float(matches.mean())),
        )

    def clearly_worse(self, run: Rollout) -> bool:
        """Whether the run's text match lies below full precision's by more than chance, prompt by prompt."""
        matches = self._matches(run)
        if matches is None or self.own is None or len(matches) < 2:
            return False
        lost = self.own - matches
        return bool(lost.mean() > CLEAR * lost.std() / len(lost) ** 0.5)

    def _matches(self, run: Rollout) -> Tensor | None:
        if self.clip is None or self.prompts is None:
            return None
        images = np.concatenate([np.asarray(result.images) for result in run.results])
        return self.clip.cosines(np.rint(images * 255).astype(np.uint8), self.prompts).double()


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
