"""The step `reparameterize`: a factor for every input channel of the layers that a recipe names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from halftone import device
from halftone.calls import CallContext
from halftone.denoiser import Site, denoiser_of, sites
from halftone.errors import UserError
from halftone.factors import Factors, LayerBalance, balance
from halftone.folding import Shared, reparameterized_layers
from halftone.passes.reparameterize import channel_maxima, factors_of
from halftone.provenance import Provenance
from halftone.source import Source
from halftone.steps.choice import Choice, check_same_model
from halftone.steps.wrapped import wrapped
from halftone.trajectory import Trajectory, denoiser_inputs

CLOSE, ROUNDINGS = 1e-4, 10
"""Of the largest output: as much may the denoiser change by rounding in float32, and so many times the
relative rounding of a type that is coarser."""


def reparameterize(
    source: Source, trajectory: Trajectory, known: Provenance, choice: Choice, *, batch_size: int = 16
) -> Factors:
    """Factors from the reference trajectory, and what they do to the ranges; the denoiser stays as it is.

    Raises UserError for a recipe that does not reparameterize, or has no layer for it, and where the denoiser
    would give other outputs.
    """
    check_same_model(source, known)
    if not choice.reparameterizes:
        raise UserError(f"recipe {choice.recipe} reparameterizes nothing: go on without, or set the axis")
    denoiser = denoiser_of(source.pipeline).to(device.best())
    found = sites(denoiser, choice.protocol, choice.recipe, choice.axes.shortcut, bits=choice.bits)
    shared = reparameterized_layers(denoiser, found, choice.axes)
    names = [name for one in shared for name in one.layers]
    maxima = channel_maxima(denoiser, names, trajectory, batch_size=batch_size)
    factors = factors_of(denoiser, shared, maxima, choice.axes)
    difference, dtype = _difference(denoiser, found, choice, trajectory, factors), denoiser.dtype
    if not difference <= max(CLOSE, ROUNDINGS * torch.finfo(dtype).eps):
        raise UserError(
            f"reparameterized, this {type(denoiser).__name__} gives outputs that differ by {difference:.2g} "
            f"of the largest one, which rounding in {dtype} does not explain; choose reparameterization "
            "none, or a lower reparameterization_limit"
        )
    batches = -(-trajectory.n_prompts // batch_size)
    return Factors(
        factors,
        _balances(shared, maxima, factors, choice.axes.reparameterization_limit),
        difference,
        trajectory.n_calls * batches + 2 * len(_checked(trajectory)),
    )


def _balances(
    shared: Sequence[Shared], maxima: Mapping[str, Tensor], factors: Mapping[str, Tensor], limit: float
) -> tuple[LayerBalance, ...]:
    found = []
    for one in shared:
        for name in one.layers:
            factor, seen = factors[name], maxima[name]
            found.append(
                LayerBalance(
                    layer=name,
                    division=one.division,
                    before=balance(seen),
                    after=balance(seen / factor),
                    median_factor=float(factor.median()),
                    largest_factor=float(factor.max()),
                    truncated=float((factor >= limit * (1 - 1e-3)).float().mean()),
                )
            )
    return tuple(found)


def _checked(trajectory: Trajectory) -> list[int]:
    return sorted({0, trajectory.n_calls - 1})


@torch.no_grad()
def _difference(
    denoiser: nn.Module,
    found: Sequence[Site],
    choice: Choice,
    trajectory: Trajectory,
    factors: Mapping[str, Tensor],
) -> float:
    """Largest change of the full-precision output at the first and the last call, over the largest output."""
    first = next(denoiser.parameters())
    prompts = range(min(2, trajectory.n_prompts))
    rows = [
        denoiser_inputs(trajectory, call, prompts, device=first.device, dtype=first.dtype)
        for call in _checked(trajectory)
    ]
    with _without_tf32():
        before = [denoiser(**one)[0].float() for one in rows]
        with wrapped(denoiser, found, choice, CallContext(), 1, factors=factors):
            after = [denoiser(**one)[0].float() for one in rows]
    pairs = zip(before, after, strict=True)
    changes = [(new - old).abs().max() / old.abs().max().clamp(min=1e-12) for old, new in pairs]
    return float(torch.stack(changes).max())


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """A GPU may round operands of float32 products to ten bits, which is more than factors are to change."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
