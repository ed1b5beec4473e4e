"""Relaxed calls of a recipe whose activation parameters are shared over the calls."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from halftone.passes.state import ActivationParameters
from halftone.probability_quantizer import ProbabilityQuantizer
from halftone.quantizers.affine import fit_affine
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
        if quantizer.dynamic:
            found[name] = shared
            continue
        params = quantizer.params(0)
        wide = relaxation.width(params.bits, relaxation.calls[0])
        lo, hi = (params.scale * (code - params.zero_point) for code in (params.low, params.high))
        if isinstance(quantizer, ProbabilityQuantizer) and quantizer.log2:
            hi = params.scale  # the value of code 0, at any width
        if shared.groups is None:
            relaxed = quantizer.fitted(lo, hi, wide)
        else:  # the same groups, whose ranges need not hold zero
            fitted = fit_affine(lo, hi, wide, include_zero=False)
            relaxed = fitted.scale, fitted.zero_point
        narrow = params.scale, params.zero_point
        rows = [relaxed if call in relaxation.calls else narrow for call in range(n_calls)]
        scale, zero_point = (torch.stack([row[part].cpu() for row in rows]) for part in range(2))
        found[name] = shared._replace(scale=scale, zero_point=zero_point)
    return found
