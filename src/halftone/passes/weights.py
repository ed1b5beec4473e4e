"""Weights rounded to nearest, per output channel."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.denoiser import Site, SiteKind, width_at
from halftone.errors import UserError
from halftone.layers import WeightCodes, fit_weight, nearest_codes
from halftone.progress import track
from halftone.quantizers.bits import Bits


def quantize_weights(
    denoiser: nn.Module, sites: Iterable[Site], axes: Axes, bits: Bits
) -> dict[str, WeightCodes]:
    """Nearest codes of every quantized weight, by module name; the denoiser, wrapped or not, stays as it is.

    Raises UserError naming the weight that holds NaN or infinite values.
    """
    chosen = [site for site in sites if site.kind is SiteKind.WEIGHT and site.quantized]
    found: dict[str, WeightCodes] = {}
    for site in track(chosen, "weights"):
        weight = denoiser.get_submodule(site.module).weight
        assert isinstance(weight, Tensor)
        check_weight(site.module, weight)
        params = fit_weight(weight, width_at(site.module, site.kind, bits), axes.weight_range, site.split)
        found[site.module] = nearest_codes(weight, params)
    return found


def check_weight(module: str, weight: Tensor) -> None:
    """Raises UserError where the weight of `module` holds NaN or infinite values."""
    wrong = int((~torch.isfinite(weight)).sum())
    if wrong:
        raise UserError(
            f"{module}.weight: {wrong} of {weight.numel()} values are NaN or infinite; the model's file is "
            "damaged or was saved in too narrow a type; get it again"
        )
