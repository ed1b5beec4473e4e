"""Error of a plainly quantized model that samples on its own, against its error at single calls.

Teacher-forced: the quantized denoiser is given the reference trajectory's latents, so that a call's error is
its own. Free-running: it samples, so that a call inherits what the calls before it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halftone.calls import CallContext
from halftone.denoiser import denoiser_of, sites
from halftone.layers import wrap
from halftone.progress import Progress
from halftone.provenance import Provenance
from halftone.proxy.finding import Finding, Test, median, rounded
from halftone.site_quantizer import Mode, set_mode
from halftone.source import Source
from halftone.steps.calibrate import calibrate
from halftone.steps.choice import choose
from halftone.steps.wrapped import restored
from halftone.trajectory import Trajectory, denoiser_inputs, record

PROMPTS = 16
"""Prompts used at most: the errors are means over all pixels, and hardly change with more."""
INHERITED = 2**0.5
"""Free-running over teacher-forced error. Independent errors add up in squares, so from here on a call
inherits at least as much as it adds."""
RECIPE = "minmax"


def accumulation(
    source: Source,
    trajectory: Trajectory,
    known: Provenance,
    prompts: Sequence[str],
    *,
    bits: str,
    batch_size: int,
) -> Finding:
    """Does the error that earlier calls leave in the latents outweigh the error of the call itself?

    prompts: those of the trajectory, in its order. Raises UserError for bad bits or another model's
    trajectory.
    """
    count = min(PROMPTS, trajectory.n_prompts)
    errors = _errors(source, _first(trajectory, count), known, list(prompts[:count]), bits, batch_size)
    ratios = [
        free / forced if forced > 0 else None
        for free, forced in zip(errors["free_running"], errors["teacher_forced"], strict=True)
    ]
    later = ratios[len(ratios) // 2 :]
    return Finding(
        key="accumulation",
        title="Error inherited from earlier calls",
        methods=("PCR", "PAR"),
        claim="Calibrating (PCR) or reconstructing (PAR) on the inputs that the quantized model itself "
        "arrives at beats doing so on the full-precision trajectory.",
        tests=(
            Test(
                measure=f"free-running over teacher-forced error of the {RECIPE} {bits} model's output "
                "(median over the later half of the calls)",
                figure=median(later) if len(ratios) > 1 else None,
                threshold=rounded(INHERITED),
                reason="errors add up in squares: from the root of two on, a call inherits at least as much "
                "as it adds",
            ),
        ),
        further={
            "largest ratio": max((rounded(ratio) for ratio in ratios if ratio is not None), default=None),
            "teacher-forced error over output (median over calls)": median(errors["teacher_forced"]),
            "free-running error over output (median over calls)": median(errors["free_running"]),
            "error of the last call's latents over the latents": rounded(errors["latents"][-1]),
            "prompts": count,
        },
        note="" if len(ratios) > 1 else "One call inherits nothing.",
        data={
            **{name: [rounded(value) for value in values] for name, values in errors.items()},
            "ratio": [ratio and rounded(ratio) for ratio in ratios],
            "line": rounded(INHERITED),
        },
    )


def _errors(
    source: Source,
    trajectory: Trajectory,
    known: Provenance,
    prompts: list[str],
    bits: str,
    batch_size: int,
) -> dict[str, list[float]]:
    """Root mean square error over root mean square, at every call: of outputs (two ways) and of latents."""
    denoiser = denoiser_of(source.pipeline)
    reference = _outputs(denoiser, trajectory, batch_size, "full precision")
    choice = choose(RECIPE, bits)
    state = calibrate(source, trajectory, known, choice, batch_size=batch_size)
    context = CallContext(trajectory.timesteps, trajectory.noise_levels)
    with restored(denoiser):
        # parameters are shared by all calls, so nobody has to say which call it is
        found = sites(denoiser, choice.protocol, choice.recipe, bits=choice.bits)
        quantizers = wrap(denoiser, found, choice.bits, 1, context)
        state.apply(denoiser, quantizers, choice.bits)
        set_mode(quantizers, Mode.QUANTIZE)
        forced = _outputs(denoiser, trajectory, batch_size, "single calls")
        with _listening(denoiser, trajectory.n_calls) as heard:
            free = record(
                source.pipeline,
                prompts,
                steps=known.steps,
                guidance=known.guidance,
                resolution=known.resolution,
                seed=known.seed,
                batch_size=batch_size,
            )
    return {
        "teacher_forced": [_error(a, b) for a, b in zip(forced, reference, strict=True)],
        "free_running": [_error(a, b) for a, b in zip(heard.by_call(), reference, strict=True)],
        "latents": [_error(a, b) for a, b in zip(free.latents, trajectory.latents, strict=True)],
    }


def _outputs(denoiser: nn.Module, trajectory: Trajectory, batch_size: int, title: str) -> list[Tensor]:
    """What the denoiser returns on the trajectory's inputs: by call, the batches one after another."""
    parameter = next(denoiser.parameters())
    place: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    progress = Progress(title, trajectory.n_calls)
    found = []
    for call in range(trajectory.n_calls):
        rows = []
        for first in range(0, trajectory.n_prompts, batch_size):
            chosen = range(trajectory.n_prompts)[first : first + batch_size]
            with torch.no_grad():
                rows.append(_plain(denoiser(**denoiser_inputs(trajectory, call, chosen, **place))))
        found.append(torch.cat(rows))
        progress.advance()
    return found


class _Heard:
    """A forward hook that keeps outputs; the pipeline makes all calls of a batch before it takes the next."""

    def __init__(self, n_calls: int) -> None:
        self.n_calls = n_calls
        self.outputs: list[Tensor] = []

    def __call__(self, denoiser: nn.Module, arguments: Any, output: Any) -> None:
        self.outputs.append(_plain(output))

    def by_call(self) -> list[Tensor]:
        return [torch.cat(self.outputs[call :: self.n_calls]) for call in range(self.n_calls)]


@contextmanager
def _listening(denoiser: nn.Module, n_calls: int) -> Any:
    heard = _Heard(n_calls)
    hook = denoiser.register_forward_hook(heard)
    try:
        yield heard
    finally:
        hook.remove()


def _plain(output: Any) -> Tensor:
    first: Tensor = output[0]
    return first.detach().float().cpu()


def _error(x: Tensor, reference: Tensor) -> float:
    size = float(reference.double().square().mean())
    return (float((x.double() - reference.double()).square().mean()) / size) ** 0.5 if size > 0 else 0.0


def _first(trajectory: Trajectory, count: int) -> Trajectory:
    """The trajectory of the first prompts alone."""
    return replace(
        trajectory,
        latents=trajectory.latents[:, :count],
        conditions={name: values[:count] for name, values in trajectory.conditions.items()},
    )
