"""Simulated execution: codes at every call, products of what they stand for in float.

Of whole numbers, see `halftone.runtime.whole`, in float32 and float64; where parameters are dynamic, where a
layer's input or weight is not quantized, and in 16-bit floats, of the dequantized operands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halftone.attention import QuantizedAttnProcessor
from halftone.calls import CallContext
from halftone.components import quiet
from halftone.denoiser import START_KINDS, Site, SiteKind, width_at
from halftone.errors import UserError
from halftone.layers import QuantizedLayer, WeightCodes, wrap
from halftone.plan import Plan, SitePlan
from halftone.policies import TimeAxis
from halftone.probability_quantizer import Form, ProbabilityQuantizer
from halftone.quantizers.affine import dequantize
from halftone.quantizers.bits import Bits
from halftone.runtime.operands import geometry_of, wide
from halftone.runtime.parts import Parts, parts_of
from halftone.runtime.whole import WholeLayer
from halftone.runtime.whole_attention import WholeAttnProcessor
from halftone.runtime.whole_rows import WholeRowLayer, takes_rows
from halftone.site_quantizer import Mode, Parameters, SiteQuantizer, set_divisors, set_mode

_MODULE_TYPES = ("Linear", "Conv2d", "Attention")


def build(
    denoiser: nn.Module,
    plan: Plan,
    *,
    weights: Mapping[str, WeightCodes],
    activations: Mapping[str, Parameters],
    floats: Mapping[str, Tensor],
    context: CallContext,
    divisors: Mapping[str, Tensor] | None = None,
    choices: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, SiteQuantizer]:
    """Make a denoiser without weights (on the meta device) the quantized one of `plan`, in place.

    weights: codes by module; activations: what quantizers hold, by site; floats: the rest of the state dict.
    choices: of probabilities that take either codes, by site. Together they must be the whole state.
    divisors: factors by module, of the inputs that are divided in the quantize step. The quantizers follow
    `context`, which is not attached here.
    Raises UserError where plan and denoiser do not fit.
    """
    bits = Bits.parse(plan.bits)
    sites = [site_of(site, denoiser) for site in plan.sites]
    state = dict(floats)
    for module, weight in weights.items():
        params = weight.params(width_at(module, SiteKind.WEIGHT, bits))
        state[f"{module}.weight"] = dequantize(weight.codes, params)
    denoiser.load_state_dict(state, strict=True, assign=True)
    denoiser.requires_grad_(False).eval()
    if dtype != torch.float32:
        with quiet():
            denoiser.to(dtype)
    dynamic = plan.axes.time_axis is TimeAxis.DYNAMIC
    slots, form = max(plan.slots, 1), Form.of(plan.axes)
    quantizers = wrap(denoiser, sites, bits, slots, context, dynamic, plan.relaxation, form)
    for name, quantizer in quantizers.items():
        if not quantizer.dynamic:
            quantizer.set_parameters(*activations[name])
        if isinstance(quantizer, ProbabilityQuantizer) and name in (choices or {}):
            quantizer.choose((choices or {})[name])
    set_divisors(quantizers, divisors or {})
    set_mode(quantizers, Mode.QUANTIZE)
    if wide(dtype) == dtype:
        multiply_whole_numbers(denoiser, weights)
    return quantizers


def multiply_whole_numbers(denoiser: nn.Module, weights: Mapping[str, WeightCodes]) -> None:
    """Put modules of `halftone.runtime.whole` in place of the quantized ones that they can stand for."""
    for name, module in list(denoiser.named_modules()):
        processor = getattr(module, "processor", None)
        if isinstance(processor, QuantizedAttnProcessor):
            parts: Any = (processor.query, processor.key, processor.value, processor.probabilities)
            if all(isinstance(part, SiteQuantizer) and _known(part) for part in parts):
                module.processor = WholeAttnProcessor(*parts)
        elif type(module) is QuantizedLayer and module.input is not None and name in weights:
            weight, layer = weights[name], module.layer
            by_rows = takes_rows(module.input)
            found = Parts() if by_rows else parts_of(module.input)
            if found is not None and _fits(layer, weight, found, by_rows):
                made = (WholeRowLayer if by_rows else WholeLayer)(layer, module.input, weight)
                denoiser.set_submodule(name, made.eval())


def _known(quantizer: SiteQuantizer) -> bool:
    """Whether a call has one scale, one for each row of probabilities, or groups."""
    if isinstance(quantizer, ProbabilityQuantizer) or quantizer.groups is not None:
        return True
    return not quantizer.dynamic and quantizer.scale.ndim == 1


def _fits(layer: nn.Linear | nn.Conv2d, weight: WeightCodes, parts: Parts, by_rows: bool) -> bool:
    """Whether the layer slides plainly, and can be cut, or unfolded, as its input is."""
    try:
        geometry = geometry_of(layer)
    except ValueError:
        return False
    halves = weight.scale.numel() > weight.codes.shape[0]
    whole = geometry is None or geometry.groups == 1
    return halves == parts.split and (whole or not (parts.ends or by_rows))


def site_of(plan: SitePlan, denoiser: nn.Module) -> Site:
    """The site a plan speaks of. Raises UserError where the denoiser has no such module."""
    kind = SiteKind.__members__.get(plan.kind.upper())
    try:
        module_type = type(denoiser.get_submodule(plan.module)).__name__
    except AttributeError:
        module_type = None
    if kind is None or module_type != plan.module_type or module_type not in _MODULE_TYPES:
        raise UserError(f"plan: site {plan.name[:200]!r} is not one of this {type(denoiser).__name__}")
    start = bool(plan.start_apart)
    site = Site(plan.module, kind, plan.module_type, plan.float_reason, plan.split, start)
    sound = site.name == plan.name and site.quantized == (plan.bits is not None)
    if plan.split is not None:
        weight = getattr(denoiser.get_submodule(plan.module), "weight", None)
        sound &= kind in (SiteKind.INPUT, SiteKind.WEIGHT)
        sound &= isinstance(weight, Tensor) and 0 < plan.split < weight.shape[1]
    if start:
        sound &= kind in START_KINDS and bool(denoiser.get_submodule(plan.module).is_cross_attention)
    if not sound:
        raise UserError(f"plan: site {plan.name[:200]!r} contradicts itself")
    return site
