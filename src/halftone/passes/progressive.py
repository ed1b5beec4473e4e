"""Progressive calibration (PCR): the parameters of a call are fitted to what the calls before it, already
quantized, hand on.

At every call the activations are observed on the quantized sampler's own latents, while the call still uses
the parameters that the reference trajectory gave it (algorithm of PCR's stage 3); then the call runs again
with its new parameters, and the sampler goes on with that output. Two denoiser calls per batch and call:
each prompt's latents and its sampler's state are carried forward, where replaying the prefix of every call
would take 1,326 calls instead of 102 for 51 calls. One noise draw per prompt, and the last call is calibrated
too (our choices: the published code draws anew for every call and leaves the last one out; the axes
`replay_prefix`, `refresh_noise` and `calibrate_last` do as it does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.errors import UserError
from halftone.passes import checkpoint as checkpoints
from halftone.passes.calibrate import NONE, Walk
from halftone.passes.lockstep import Lockstep
from halftone.passes.rollout import Runs, inputs_at
from halftone.passes.state import ActivationParameters, SiteParameters, set_parameters
from halftone.policies import GroupLayout
from halftone.progress import Progress
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.trajectory import Trajectory


def denoiser_calls(axes: Axes, n_calls: int, batches: int) -> int:
    """Calls of the denoiser that progressive calibration makes, each on one batch."""
    calibrated = n_calls if axes.calibrate_last else n_calls - 1
    return batches * (calibrated * (calibrated + 1) // 2 if axes.replay_prefix else 2 * calibrated)


def calibrate_progressively(
    pipeline: Any,
    denoiser: nn.Module,
    quantizers: Mapping[str, SiteQuantizer],
    context: CallContext,
    trajectory: Trajectory,
    axes: Axes,
    reference: ActivationParameters,
    runs: Callable[[int], Runs],
    *,
    checkpoint: Path,
) -> ActivationParameters:
    """Parameters per call, also set in `quantizers`, whose mode is off afterwards.

    denoiser: that of `pipeline`, wrapped, its weights quantized. reference: what the reference trajectory
    gave. runs: those of a noise draw; number 0 is the recorded one. checkpoint: a folder with a file per
    finished call; the same arguments go on from it, with the same bits: finished calls are not run again, the
    samplers are handed what the denoiser gave then. The caller removes it. Raises UserError where a value is
    not finite, or where the sampler makes other calls than were recorded.
    """
    set_parameters(quantizers, reference)
    widths = {name: quantizer.widths for name, quantizer in quantizers.items()}
    batches = [(ids.start, ids.stop) for ids, _ in runs(0)]
    mark = checkpoints.fingerprint(denoiser, trajectory, (axes.model_dump(mode="json"), widths, batches))
    checkpoints.folder(checkpoint)
    # a partition that all calls share cannot wait for the last of them
    shared = axes.group_layout is GroupLayout.ALIGNED
    groups = {name: one.groups for name, one in reference.items() if shared and one.groups is not None}
    work = _Work(pipeline, denoiser, quantizers, context, trajectory, axes, Walk(quantizers, axes, groups))
    try:
        with torch.no_grad():
            work.replay(runs, checkpoint, mark) if axes.replay_prefix else work.carry(
                runs(0), checkpoint, mark
            )
        if not axes.calibrate_last:
            last = {
                site: SiteParameters(
                    *(value if value is None else value[-1] if len(value) else NONE for value in values)
                )
                for site, values in reference.items()
            }
            work.walk.take(last)
    finally:
        set_mode(quantizers, Mode.OFF)
        for quantizer in quantizers.values():
            quantizer.observer = None
    found = work.walk.parameters()
    set_parameters(quantizers, found)
    return found


@dataclass
class _Work:
    pipeline: Any
    denoiser: nn.Module
    quantizers: Mapping[str, SiteQuantizer]
    context: CallContext
    trajectory: Trajectory
    axes: Axes
    walk: Walk

    def __post_init__(self) -> None:
        calls = self.trajectory.n_calls
        self.calibrated = calls if self.axes.calibrate_last else calls - 1
        self.progress = Progress("calibrate progressively", self.calibrated)

    def carry(self, runs: Runs, checkpoint: Path, mark: str) -> None:
        """Every sampler waits at the call at hand, and goes on with what the calibrated call gave."""
        with Lockstep(self.pipeline, [arguments for _, arguments in runs]) as sampler:
            for call in range(self.calibrated):
                self._check(sampler, runs, call)
                path = checkpoint / f"call-{call:04d}.safetensors"
                outputs = _kept(path, mark, self.walk, len(runs))
                if outputs is None:
                    given = self._given(sampler, runs, call)
                    self._observe(call, [given])
                    outputs = self._quantized(call, given)
                    _keep(path, mark, self.walk, outputs)
                else:
                    self.walk.use(call)
                sampler.answer(outputs)
                self.progress.advance()
            if self.axes.calibrate_last and sampler.latents:
                raise UserError(
                    f"the sampler goes on after {self.calibrated} calls; run calibration-data again"
                )

    def replay(self, runs: Callable[[int], Runs], checkpoint: Path, mark: str) -> None:
        """The algorithm as published: for every call the samplers start again."""
        for call in range(self.calibrated):
            path = checkpoint / f"call-{call:04d}.safetensors"
            if _kept(path, mark, self.walk, 0) is None:
                batches = runs(call if self.axes.refresh_noise else 0)
                self._observe(call, (self._prefix(batch, call) for batch in batches))
                _keep(path, mark, self.walk, [])
            self.walk.use(call)
            self.progress.advance()

    def _prefix(self, batch: tuple[range, Mapping[str, Any]], call: int) -> list[dict[str, Any]]:
        """What one batch's sampler gives the denoiser at a call, the calls before it quantized."""
        with Lockstep(self.pipeline, [batch[1]]) as sampler:
            for before in range(call):
                self._check(sampler, [batch], before)
                sampler.answer(self._quantized(before, self._given(sampler, [batch], before)))
            self._check(sampler, [batch], call)
            return self._given(sampler, [batch], call)

    def _observe(self, call: int, batches: Iterable[list[dict[str, Any]]]) -> None:
        """Fit the call's parameters, and use them from now on."""
        self.walk.start_call(call)
        for given in batches:
            set_mode(self.quantizers, Mode.OBSERVE_QUANTIZED)
            with self.context.at(call):
                for one in given:
                    self.denoiser(**one)
        self.walk.finish_call()
        self.walk.use(call)

    def _quantized(self, call: int, given: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        set_mode(self.quantizers, Mode.QUANTIZE)
        with self.context.at(call):
            outputs = [self.denoiser(**one)[0] for one in given]
        set_mode(self.quantizers, Mode.OFF)
        return outputs

    def _given(self, sampler: Lockstep, runs: Runs, call: int) -> list[dict[str, Any]]:
        return [
            inputs_at(self.trajectory, call, ids, latents)
            for (ids, _), latents in zip(runs, sampler.latents, strict=True)
        ]

    def _check(self, sampler: Lockstep, runs: Runs, call: int) -> None:
        if len(sampler.latents) != len(runs):
            raise UserError(
                f"the sampler stopped after {call} of {self.trajectory.n_calls} calls; "
                "run calibration-data again"
            )


def _keep(path: Path, mark: str, walk: Walk, outputs: Sequence[Tensor]) -> None:
    tensors = {f"output/{place}": output for place, output in enumerate(outputs)}
    for site, values in walk.last().items():
        parts = {name: value for name, value in values._asdict().items() if value is not None}
        tensors |= {f"site/{site}/{name}": value for name, value in parts.items()}
    checkpoints.save(path, tensors, mark)


def _kept(path: Path, mark: str, walk: Walk, batches: int) -> list[Tensor] | None:
    """Outputs of a finished call, its parameters taken into `walk`; None if there is none, or of another
    run."""
    tensors = checkpoints.load(path, mark)
    if tensors is None:
        return None
    sites: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "site":
            site, _, part = rest.rpartition("/")
            sites.setdefault(site, {})[part] = value
    walk.take({site: SiteParameters(**parts) for site, parts in sites.items()})
    return [tensors[f"output/{place}"] for place in range(batches)]
