"""Progressive calibration (PCR): the parameters of a call are fitted to what the calls before it, already
quantized, hand on.

At every call the activations are observed on the quantized sampler's own latents, while the call still uses
the parameters that the reference trajectory gave it (algorithm of PCR's stage 3); then the call runs again
with its new parameters, and the sampler goes on with that output. Two denoiser calls per batch and call:
each prompt's latents and its sampler's state are carried forward, where replaying the prefix of every call
would take 1,325 calls instead of 102 for 51 calls. One noise draw per prompt, and the last call is calibrated
too (our choices: the published code draws anew for every call and leaves the last one out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halftone.calls import CallContext
from halftone.errors import UserError
from halftone.files import explain_disk_faults
from halftone.layers import Mode, SiteQuantizer, set_mode
from halftone.passes import checkpoint as checkpoints
from halftone.passes.calibrate import Walk
from halftone.passes.lockstep import Lockstep
from halftone.passes.state import ActivationParameters, SiteParameters, set_parameters
from halftone.progress import Progress
from halftone.recipes import Axes
from halftone.trajectory import Trajectory, denoiser_inputs


def calibrate_progressively(
    pipeline: Any,
    denoiser: nn.Module,
    quantizers: Mapping[str, SiteQuantizer],
    context: CallContext,
    trajectory: Trajectory,
    axes: Axes,
    reference: ActivationParameters,
    runs: Sequence[tuple[range, Mapping[str, Any]]],
    *,
    checkpoint: Path,
) -> ActivationParameters:
    """Parameters per call, also set in `quantizers`, whose mode is off afterwards.

    denoiser: that of `pipeline`, wrapped, its weights quantized. reference: what the reference trajectory
    gave. runs: for each batch its prompts (places in the trajectory) and the arguments of the pipeline.
    checkpoint: a folder with a file per finished call; the same arguments go on from it, with the same bits:
    finished calls are not run again, the samplers are handed what the denoiser gave then. The caller removes
    it. Raises UserError where a value is not finite, or where the sampler makes other calls than were
    recorded.
    """
    set_parameters(quantizers, reference)
    widths = {name: quantizer.widths for name, quantizer in quantizers.items()}
    facts = axes.model_dump(mode="json"), widths, [(ids.start, ids.stop) for ids, _ in runs]
    mark = checkpoints.fingerprint(denoiser, trajectory, facts)
    with explain_disk_faults(checkpoint):
        checkpoint.mkdir(parents=True, exist_ok=True)
    walk, calls = Walk(quantizers, axes), trajectory.n_calls
    progress = Progress("calibrate progressively", calls)
    try:
        with torch.no_grad(), Lockstep(pipeline, [arguments for _, arguments in runs]) as sampler:
            for call in range(calls):
                if len(sampler.latents) != len(runs):
                    raise UserError(
                        f"the sampler stopped after {call} of {calls} calls; run calibration-data again"
                    )
                path = checkpoint / f"call-{call:04d}.safetensors"
                outputs = _kept(path, mark, walk, len(runs))
                if outputs is None:
                    given = [
                        _inputs(trajectory, call, ids, latents)
                        for (ids, _), latents in zip(runs, sampler.latents, strict=True)
                    ]
                    with context.at(call):
                        walk.start_call(call)
                        set_mode(quantizers, Mode.OBSERVE_QUANTIZED)
                        for one in given:
                            denoiser(**one)
                        walk.finish_call()
                        walk.use(call)
                        set_mode(quantizers, Mode.QUANTIZE)
                        outputs = [denoiser(**one)[0] for one in given]
                        set_mode(quantizers, Mode.OFF)
                    _keep(path, mark, walk, outputs)
                else:
                    walk.use(call)
                sampler.answer(outputs)
                progress.advance()
            if sampler.latents:
                raise UserError(f"the sampler goes on after {calls} calls; run calibration-data again")
    finally:
        set_mode(quantizers, Mode.OFF)
        for quantizer in quantizers.values():
            quantizer.observer = None
    found = walk.parameters()
    set_parameters(quantizers, found)
    return found


def _inputs(trajectory: Trajectory, call: int, ids: range, latents: Tensor) -> dict[str, Any]:
    """The recorded inputs of a call, with the sampler's latents in place of the reference ones."""
    given = denoiser_inputs(trajectory, call, ids, device=latents.device, dtype=latents.dtype)
    return {**given, trajectory.input_name: latents}


def _keep(path: Path, mark: str, walk: Walk, outputs: Sequence[Tensor]) -> None:
    tensors = {f"output/{place}": output for place, output in enumerate(outputs)}
    for site, values in walk.last().items():
        tensors |= {f"site/{site}/{name}": value for name, value in values._asdict().items()}
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
