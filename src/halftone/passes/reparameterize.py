"""Factors per input channel that move range from activations to weights (TCR of TCAQ-DM; SmoothQuant).

A channel's factor multiplies its weights and divides its activation, which changes no output. One factor
serves all calls, since the weight does. Statistics are largest magnitudes per call and channel, of the
full-precision denoiser on the reference trajectory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.errors import UserError
from halftone.folding import Shared
from halftone.passes.call_groups import group_of
from halftone.policies import Reparameterization
from halftone.progress import Progress
from halftone.trajectory import Trajectory, denoiser_inputs

_DEAD = 1e-6  # of the largest channel: what is quieter has no range worth dividing by (our choice)


def tcr_factors(maxima: Tensor, limit: float = 10.0, floor: float = 0.0) -> Tensor:
    """Factors (channels,) from largest magnitudes (calls or groups of calls, channels).

    At every call each channel's factor takes it down to the quietest channel; over the calls they are
    averaged, weighted by the channel's range, and truncated at `limit` (TCAQ-DM, Eqs. 3 to 5). floor: the
    quantile that stands for the quietest channel; those below it keep factor 1 (our choice, the paper is
    silent). Scaling all maxima changes nothing. Channels that are zero at every call get factor 1 where all
    are.
    """
    alive = _alive(maxima)
    if alive is None:
        return torch.ones(maxima.shape[1])
    target = torch.quantile(alive, floor, dim=1, keepdim=True)
    at_calls = (alive / target).clamp(min=1)
    return ((alive * at_calls).sum(0) / alive.sum(0)).clamp(1, limit).float()


def smooth_factors(
    maxima: Tensor, weights: Tensor, exponent: float = 0.5, limit: float = 10.0, floor: float = 0.0
) -> Tensor:
    """Factors (channels,) from largest magnitudes of activations (calls, channels) and weights (channels,).

    m^exponent / w^(1 - exponent), over the same of the channel at quantile `floor`, in 1..limit (SmoothQuant;
    scaled so that the smallest is 1, which changes no code, and truncated as TCR is: our choices).
    """
    alive, of_weights = _alive(maxima), _alive(weights[None])
    if alive is None or of_weights is None:
        return torch.ones(maxima.shape[1])
    ratio = alive.amax(0) ** exponent / of_weights[0] ** (1 - exponent)
    return (ratio / torch.quantile(ratio, floor)).clamp(1, limit).float()


def grouped(maxima: Tensor, groups: int | None) -> Tensor:
    """(calls, channels) -> (groups, channels): uniform runs of calls, the largest of each; None: as it is."""
    calls = len(maxima)
    runs = itertools.groupby(range(calls), key=lambda call: group_of(call, calls, groups))
    return torch.stack([maxima[list(run)].amax(0) for _, run in runs])


def factors_of(
    denoiser: nn.Module, shared: Iterable[Shared], maxima: Mapping[str, Tensor], axes: Axes
) -> dict[str, Tensor]:
    """Factors (channels,) float32 of every layer, by module, from largest magnitudes (calls, channels).

    Layers that share an input share its factors. A factor is one that float16 holds, so that an artefact
    stores it in two bytes (our choice: any positive factor keeps the output). Raises UserError for magnitudes
    that are not finite.
    """
    found: dict[str, Tensor] = {}
    for one in shared:
        seen = maxima[one.layers[0]]
        if not torch.isfinite(seen).all():
            raise UserError(f"{one.layers[0]}: its input is not finite; run the model in float32")
        limit, floor = axes.reparameterization_limit, axes.reparameterization_floor
        if axes.reparameterization is Reparameterization.SMOOTH:
            weights = torch.stack([_largest(denoiser, layer) for layer in one.layers]).amax(0)
            factor = smooth_factors(seen, weights, axes.smooth_exponent, limit, floor)
        else:
            factor = tcr_factors(grouped(seen, axes.reparameterization_groups), limit, floor)
        found |= {layer: factor.half().float() for layer in one.layers}
    return found


@torch.no_grad()
def channel_maxima(
    denoiser: nn.Module, layers: Iterable[str], trajectory: Trajectory, *, batch_size: int
) -> dict[str, Tensor]:
    """Largest magnitude of every layer's input at every call and channel: (calls, channels) by module.

    batch_size: prompts per forward, which changes no value but through the denoiser's own rounding. Raises
    UserError for a layer that does not run.
    """
    first = next(denoiser.parameters())
    seen: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}

    def observe(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if isinstance(getattr(module, "layer", module), nn.Conv2d):
                largest = x.flatten(2).abs().amax(2).amax(0).float().cpu()
            else:
                largest = x.flatten(0, -2).abs().amax(0).float().cpu()
            seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

        return before

    hooks = [denoiser.get_submodule(name).register_forward_pre_hook(observe(name)) for name in layers]
    progress = Progress("reparameterize", trajectory.n_calls)
    try:
        for call in range(trajectory.n_calls):
            seen.clear()
            for start in range(0, trajectory.n_prompts, batch_size):
                batch = range(trajectory.n_prompts)[start : start + batch_size]
                denoiser(**denoiser_inputs(trajectory, call, batch, device=first.device, dtype=first.dtype))
            for name in layers:
                if name not in seen:
                    raise UserError(
                        f"{name}: the denoiser does not run this module, so nothing can be reparameterized"
                    )
                rows.setdefault(name, []).append(seen[name])
            progress.advance()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(found) for name, found in rows.items()}


def _alive(maxima: Tensor) -> Tensor | None:
    """Magnitudes in float64, dead channels lifted off zero; None where all are zero."""
    largest = float(maxima.max())
    return maxima.double().clamp(min=_DEAD * largest) if largest > 0 else None


def _largest(denoiser: nn.Module, name: str) -> Tensor:
    """Largest magnitude of a layer's weight at every input channel."""
    weight: Any = denoiser.get_submodule(name).weight
    return weight.detach().float().abs().transpose(0, 1).flatten(1).amax(1).cpu()
