"""The step `reconstruct`: weight codes by block reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from halftone import device
from halftone.calls import CallContext
from halftone.denoiser import SiteKind, denoiser_of, sites
from halftone.passes.reconstruct import reconstruct as learn
from halftone.passes.reconstructed import Reconstructed
from halftone.provenance import Provenance
from halftone.settings import Reconstruction
from halftone.source import Source
from halftone.steps.choice import Choice, check_same_model
from halftone.steps.wrapped import wrapped
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
    `checkpoint`: a folder in which an interrupted run can go on;
    `shared`: one in which finished units stay for other rows whose weights are learned alike."""
    check_same_model(source, known)
    denoiser = denoiser_of(source.pipeline).to(device.best())
    found = sites(denoiser, choice.protocol, choice.recipe, choice.axes.shortcut)
    weights = [site for site in found if site.kind is SiteKind.WEIGHT and site.quantized]
    splits = {site.module: site.split for site in weights if site.split is not None}
    modules = [site.module for site in weights]
    how = how or Reconstruction()
    place: AbstractContextManager[Any] = nullcontext()
    if choice.reparameterizes or factors:  # dividing is the quantizers' work, which are off meanwhile
        place = wrapped(denoiser, found, choice, CallContext(), 1, factors=factors)
    with place:
        return learn(
            denoiser, trajectory, choice.axes, choice.bits, how, seed, checkpoint, modules, splits, shared
        )
