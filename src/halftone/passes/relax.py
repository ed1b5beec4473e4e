"""Relaxed calls of a recipe whose activation parameters are shared over the calls."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from halftone.passes.calibrate import fit
from halftone.passes.state import ActivationParameters
from halftone.relaxing import Relaxation
from halftone.site_quantizer import SiteQuantizer


def relax_shared(
    activations: ActivationParameters,
    quantizers: Mapping[str, SiteQuantizer],
    relaxation: Relaxation,
    n_calls: int,
) -> ActivationParameters:
    """Shared parameters, (1, ...), as those of every call, (n_calls, ...): relaxed calls divide the same
    range into more codes (our choice: such recipes are relaxed here only to compare at equal bits)."""
    found: ActivationParameters = {}
    for name, shared in activations.items():
        quantizer = quantizers[name]
        params = quantizer.params(0)
        wide = relaxation.width(params.bits, relaxation.calls[0])
        lo, hi = (params.scale * (code - params.zero_point) for code in (params.low, params.high))
        relaxed = fit(lo, hi, wide, quantizer.non_negative)
        rows = [relaxed if call in relaxation.calls else params for call in range(n_calls)]
        scale, zero_point = (
            torch.stack([getattr(row, part).cpu() for row in rows]) for part in ("scale", "zero_point")
        )
        found[name] = shared._replace(scale=scale, zero_point=zero_point)
    return found
