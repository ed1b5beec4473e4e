"""Simulated execution: weights dequantized once, activations fake-quantized at every call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from halftone.calls import CallContext
from halftone.components import quiet
from halftone.denoiser import Site, SiteKind
from halftone.errors import UserError
from halftone.layers import Mode, SiteQuantizer, WeightCodes, set_mode, wrap
from halftone.plan import Plan, SitePlan
from halftone.quantizers.affine import dequantize
from halftone.quantizers.bits import Bits
from halftone.recipes import TimeAxis

_MODULE_TYPES = ("Linear", "Conv2d", "Attention")


def build(
    denoiser: nn.Module,
    plan: Plan,
    *,
    weights: Mapping[str, WeightCodes],
    activations: Mapping[str, tuple[Tensor, Tensor]],
    floats: Mapping[str, Tensor],
    context: CallContext,
    dtype: torch.dtype = torch.float32,
) -> dict[str, SiteQuantizer]:
    """Make a denoiser without weights (on the meta device) the quantized one of `plan`, in place.

    weights: codes by module; activations: (scale, zero_point) by site; floats: the rest of the state dict.
    Together they must be the whole state. The quantizers follow `context`, which is not attached here.
    Raises UserError where plan and denoiser do not fit.
    """
    bits = Bits.parse(plan.bits)
    sites = [site_of(site, denoiser) for site in plan.sites]
    state = dict(floats)
    for module, weight in weights.items():
        state[f"{module}.weight"] = dequantize(weight.codes, weight.params(bits.weight))
    denoiser.load_state_dict(state, strict=True, assign=True)
    denoiser.requires_grad_(False).eval()
    if dtype != torch.float32:
        with quiet():
            denoiser.to(dtype)
    dynamic = plan.axes.time_axis is TimeAxis.DYNAMIC
    quantizers = wrap(denoiser, sites, bits, max(plan.slots, 1), context, dynamic, plan.relaxation)
    for name, quantizer in quantizers.items():
        if not dynamic:
            quantizer.set_parameters(*activations[name])
    set_mode(quantizers, Mode.QUANTIZE)
    return quantizers


def site_of(plan: SitePlan, denoiser: nn.Module) -> Site:
    """The site a plan speaks of. Raises UserError where the denoiser has no such module."""
    kind = SiteKind.__members__.get(plan.kind.upper())
    try:
        module_type = type(denoiser.get_submodule(plan.module)).__name__
    except AttributeError:
        module_type = None
    if kind is None or module_type != plan.module_type or module_type not in _MODULE_TYPES:
        raise UserError(f"plan: site {plan.name[:200]!r} is not one of this {type(denoiser).__name__}")
    site = Site(plan.module, kind, plan.module_type, plan.float_reason, plan.split)
    sound = site.name == plan.name and site.quantized == (plan.bits is not None)
    if plan.split is not None:
        weight = getattr(denoiser.get_submodule(plan.module), "weight", None)
        sound &= kind in (SiteKind.INPUT, SiteKind.WEIGHT)
        sound &= isinstance(weight, Tensor) and 0 < plan.split < weight.shape[1]
    if not sound:
        raise UserError(f"plan: site {plan.name[:200]!r} contradicts itself")
    return site
