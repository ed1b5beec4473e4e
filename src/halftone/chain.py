"""From a pipeline to an artefact, without a workflow: `quantize` takes all the steps in one process.

The rules of the workflow take the same steps, one per process, with files in between.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halftone.analysis import group_plans, resolve
from halftone.artefact.write import check_components, check_place, write
from halftone.axes import Axes
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.files import check_writable
from halftone.passes.state import CalibrationState
from halftone.plan import Plan
from halftone.prompts import read_prompts
from halftone.quantizers.bits import Bits
from halftone.relaxing import Interval
from halftone.settings import Budget, Calibration, Components, Protocol, Reconstruction
from halftone.skeleton import skeleton_of
from halftone.source import Source, load_source
from halftone.steps.calibrate import calibrate
from halftone.steps.choice import choose
from halftone.steps.reconstruct import reconstruct
from halftone.steps.record import record
from halftone.steps.reparameterize import reparameterize
from halftone.steps.sensitivity import sensitivity

IN_MEMORY = "in memory"


def quantize(
    model: Any,
    recipe: str,
    prompts: Sequence[str] | Path | str | None,
    output: Path | str,
    *,
    bits: str | Bits = "w4a8",
    axes: Axes | Mapping[str, Any] | None = None,
    protocol: Protocol | str = Protocol.EQUAL,
    revision: str | None = None,
    n_prompts: int | None = None,
    steps: int = 25,
    guidance: float | None = None,
    resolution: int | None = None,
    budget: Budget | str = Budget.FAST,
    batch_size: int = 16,
    seed: int = 0,
    components: Components | str = Components.COPY,
) -> Path:
    """Quantize a model and write the artefact; returns its folder, which `halftone.load` reads.

    model: a diffusers pipeline, which is handed back as it was, or what `load_source` takes: a diffusers
    folder, a hub id with `revision`, a `.safetensors` file. prompts: calibration prompts, or a file with one
    a line; the first `n_prompts` are used (default: 16, or all there are). None for a model without text,
    which is calibrated on `n_prompts` images. steps, guidance, resolution: of the sampling that is calibrated
    for (guidance by default 7.5; none without text). components: what becomes of text encoder and VAE: a
    `copy`, a `reference` (hub id and commit) or `int8`. A folder `.{output}.work` beside the artefact holds
    the steps' checkpoints until it is written, so that the same call goes on after an interruption. Raises
    UserError.
    """
    choice, stored = choose(recipe, bits, axes, protocol), Components(components)
    texts = _first(prompts, n_prompts)
    output = Path(output)
    check_place(output)
    check_writable(output)
    source = load_source(model, revision) if isinstance(model, str | Path) else source_of(model)
    check_components(source, stored)
    skeleton = skeleton_of(source.pipeline, resolution)
    trajectory, known = record(
        source, texts, steps=steps, guidance=guidance, resolution=resolution, seed=seed, batch_size=batch_size
    )

    def planned(state: CalibrationState | None = None) -> Plan:
        return resolve(
            skeleton,
            recipe=choice.recipe,
            axes=choice.axes,
            bits=choice.bits,
            protocol=choice.protocol,
            calls=trajectory.n_calls,
            relaxed=None if state is None else state.relaxed_calls,
            groups=None if state is None else group_plans(state),
        )

    planned()  # what cannot be planned is told before time is spent
    work = output.with_name(f".{output.name}.work")
    weights, factors = None, None
    if choice.reparameterizes:
        factors = reparameterize(source, trajectory, known, choice, batch_size=batch_size).values
    how = Reconstruction(budget=Budget(budget))
    if choice.learns_rounding:
        learned = reconstruct(
            source,
            trajectory,
            known,
            choice,
            factors=factors,
            how=how,
            seed=seed,
            checkpoint=work / "reconstruct",
        )
        weights = learned.weights
    work.mkdir(parents=True, exist_ok=True)
    how_calibrated: dict[str, Any] = {
        "factors": factors,
        "weights": weights,
        "batch_size": batch_size,
        "how": how,
    }
    relaxed = None
    if choice.axes.relaxing == Interval.AUTO:
        (work / "sensitivity").mkdir(exist_ok=True)
        measured = sensitivity(source, trajectory, known, choice, **how_calibrated, work=work / "sensitivity")
        relaxed = measured.relaxed_calls
    state = calibrate(source, trajectory, known, choice, **how_calibrated, work=work, relaxed=relaxed)
    spent = how.budget if choice.learns_rounding else None
    state.save(work / "state.safetensors", choice.describe(known, spent))
    write(output, work / "state.safetensors", planned(state), source, stored, trajectory)
    shutil.rmtree(work)
    return output


def source_of(pipeline: Any) -> Source:
    """A pipeline in memory as a source: its weights are known by their values."""
    denoiser = denoiser_of(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    name = str(getattr(pipeline, "_name_or_path", "") or IN_MEMORY)
    return Source(pipeline, name, None, None, _state_sha256(denoiser))


def _state_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _first(prompts: Sequence[str] | Path | str | None, count: int | None) -> list[str] | int:
    """The first prompts; of a model without text, how many images."""
    if prompts is None:
        return Calibration().n_prompts if count is None else count
    if isinstance(prompts, str | Path):
        prompts = read_prompts(prompts)
    wanted = min(Calibration().n_prompts, len(prompts)) if count is None else count
    if wanted > len(prompts):
        raise UserError(
            f"{wanted} calibration prompts were asked for, {len(prompts)} are there; ask for fewer"
        )
    return list(prompts[:wanted])
