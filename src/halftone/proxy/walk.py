"""The walk: the full-precision denoiser along its own trajectory, with a watch at every activation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind, concat_shortcuts, sites
from halftone.errors import UserError
from halftone.layers import wrap
from halftone.progress import Progress
from halftone.proxy.watch import ActivationWatch, Place, ProbabilityWatch
from halftone.quantizers.bits import Bits
from halftone.site_quantizer import Mode, set_mode
from halftone.steps.wrapped import restored
from halftone.trajectory import Trajectory, denoiser_inputs

_NONE = Bits(8, 8, 8)  # nothing is quantized here; the sites want a width


@dataclass(frozen=True)
class Seen:
    """What was seen at every site that `protocol: equal` quantizes, by name, in forward order."""

    activations: dict[str, ActivationWatch] = field(default_factory=dict)
    probabilities: dict[str, ProbabilityWatch] = field(default_factory=dict)
    n_prompts: int = 0

    @property
    def ranges(self) -> dict[str, list[float]]:
        """hi - lo of every site at every call."""
        watches: dict[str, ActivationWatch | ProbabilityWatch] = {**self.activations, **self.probabilities}
        return {name: watch.ranges for name, watch in watches.items()}

    @property
    def cross(self) -> list[ProbabilityWatch]:
        """Softmax outputs over the tokens of a text."""
        return [watch for watch in self.probabilities.values() if watch.first]


def walk(denoiser: nn.Module, trajectory: Trajectory, *, batch_size: int) -> Seen:
    """Run the denoiser at every call of the trajectory, as the sampler does, and watch every site.

    The denoiser is wrapped meanwhile, with all quantizers off, and handed back as it was. batch_size:
    prompts per forward. Raises UserError naming site and call where a tensor holds NaN or infinite values.
    """
    starts = range(0, trajectory.n_prompts, batch_size)
    place = Place(batches=len(starts))
    found = [site for site in sites(denoiser) if site.quantized and site.kind is not SiteKind.WEIGHT]
    seen = _watches(denoiser, found, place, trajectory.n_prompts)
    watches: dict[str, Any] = {**seen.activations, **seen.probabilities}
    parameter = next(denoiser.parameters())
    context = CallContext(trajectory.timesteps, trajectory.noise_levels)
    progress = Progress("watch activations", trajectory.n_calls * len(starts))
    with restored(denoiser):
        quantizers = wrap(denoiser, found, _NONE, 1, context)
        for name, watch in watches.items():
            quantizers[name].observer = watch
        set_mode(quantizers, Mode.OBSERVE)
        for place.call in range(trajectory.n_calls):
            for first in starts:
                prompts = range(trajectory.n_prompts)[first : first + batch_size]
                place.prompts = len(prompts)
                inputs = denoiser_inputs(
                    trajectory, place.call, prompts, device=parameter.device, dtype=parameter.dtype
                )
                with torch.no_grad(), context.at(place.call):
                    denoiser(**inputs)
                progress.advance()
            for name, watch in watches.items():
                _finish(name, watch)
    return seen


def _watches(denoiser: nn.Module, found: list[Site], place: Place, n_prompts: int) -> Seen:
    seen = Seen(n_prompts=n_prompts)
    halves = {f"{name}.{SiteKind.INPUT}": split for name, split in concat_shortcuts(denoiser).items()}
    for site in found:
        module: Any = denoiser.get_submodule(site.module)
        if site.kind is SiteKind.PROBABILITIES:
            seen.probabilities[site.name] = ProbabilityWatch(
                site.name, place, heads=module.heads, cross=module.is_cross_attention
            )
        elif site.kind is SiteKind.INPUT:
            seen.activations[site.name] = ActivationWatch(
                site.name, place, convolution=site.module_type == "Conv2d", split=halves.get(site.name)
            )
        else:
            seen.activations[site.name] = ActivationWatch(site.name, place, heads=module.heads)
    return seen


def _finish(name: str, watch: Any) -> None:
    try:
        watch.finish_call()
    except RuntimeError:  # nothing to concatenate
        raise UserError(f"{name}: the denoiser does not run this module") from None
