"""Integer execution: codes at every call, sums in integers, nothing dequantized that need not be.

It runs on the CPU. What has no integer kernel stays simulated, see `halftone.runtime.choose`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halftone.attention import QuantizedAttnProcessor
from halftone.calls import CallContext
from halftone.layers import QuantizedLayer, WeightCodes
from halftone.plan import Execution, Plan
from halftone.runtime import simulated
from halftone.runtime.choose import Decision, Kernel, choose
from halftone.runtime.int8 import Int8Product
from halftone.runtime.layers import IntegerAttnProcessor, IntegerLayer, MakeProduct
from halftone.runtime.reference import ReferenceProduct
from halftone.runtime.rows import RowLayer
from halftone.runtime.whole_rows import takes_rows
from halftone.site_quantizer import Parameters, SiteQuantizer

_PRODUCTS: dict[Kernel, MakeProduct] = {Kernel.INT8: Int8Product, Kernel.REFERENCE: ReferenceProduct}


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
    decisions: Mapping[str, Decision] | None = None,
) -> dict[str, Decision]:
    """Make a denoiser without weights (on the meta device) the integer one of `plan`, in place.

    Arguments are those of `halftone.runtime.simulated.build`; decisions: by default those of `choose`.
    Returns the kernel of every module that was quantized. Raises UserError where plan and denoiser do not
    fit.
    """
    chosen = dict(choose(plan, denoiser) if decisions is None else decisions)
    denoiser.requires_grad_(False)
    layers = {name for name in weights if name in chosen and chosen[name].integer}
    # in place of the weights of integer layers, their codes: no float weight of theirs is ever made
    codes = {f"{name}.weight": weights[name].codes for name in layers}
    quantizers = simulated.build(
        denoiser,
        plan,
        weights={name: weight for name, weight in weights.items() if name not in layers},
        activations=activations,
        floats={**floats, **codes},
        context=context,
        divisors=divisors,
        choices=choices,
        dtype=dtype,
    )
    for name, quantizer in quantizers.items():
        module = name.removesuffix(f".{quantizer.site.kind}")
        if module in layers and not takes_rows(quantizer) and not _zero_points_are_codes(quantizer):
            chosen[module] = Decision(Kernel.REFERENCE, "a zero point lies outside the codes")
    for name, decision in chosen.items():
        if decision.integer:
            _replace(denoiser, name, weights, decision)
    return chosen


def build_exact(denoiser: nn.Module, plan: Plan, **parts: Any) -> dict[str, Decision]:
    """`build`, slow, as the oracle of both executions: exact integer sums, everything else in float64."""
    decisions = {
        name: Decision(Kernel.REFERENCE) if decision.kernel is Kernel.INT8 else decision
        for name, decision in choose(plan, denoiser).items()
    }
    return build(denoiser, plan, **parts, dtype=torch.float64, decisions=decisions)


def simulated_modules(denoiser: nn.Module) -> list[str]:
    """Quantized modules of a denoiser that are run in float."""
    found = []
    for name, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, QuantizedAttnProcessor):
            in_float = processor.query is not None and not isinstance(processor, IntegerAttnProcessor)
        else:
            in_float = isinstance(module, QuantizedLayer)
        if in_float:
            found.append(name)
    return found


def execution_of(denoiser: nn.Module) -> Execution:
    """How a denoiser made here or by `simulated` runs: integer only if nothing quantized is simulated."""
    return Execution.SIMULATED if simulated_modules(denoiser) else Execution.INTEGER


def _replace(denoiser: nn.Module, name: str, weights: Mapping[str, WeightCodes], decision: Decision) -> None:
    module = denoiser.get_submodule(name)
    if isinstance(module, QuantizedLayer):
        assert module.input is not None
        made = (RowLayer if takes_rows(module.input) else IntegerLayer)(
            module.layer, module.input, weights[name], _PRODUCTS[decision.kernel]
        )
        denoiser.set_submodule(name, made.eval())
        return
    before = module.processor
    assert isinstance(before, QuantizedAttnProcessor)
    parts: Any = (before.query, before.key, before.value, before.probabilities)
    # set as it is: the guard that `install` put before other processors stays
    module.processor = IntegerAttnProcessor(*parts)


def _zero_points_are_codes(quantizer: SiteQuantizer) -> bool:
    zero_point = quantizer.zero_point
    codes = torch.tensor([2**bits for bits in quantizer.widths]).reshape(-1, *(1,) * (zero_point.ndim - 1))
    return bool((zero_point >= 0).all() and (zero_point < codes).all())
