"""A denoiser with quantizers at its sites for a while, reparameterized where the recipe asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from halftone.calls import CallContext
from halftone.denoiser import Site, denoiser_of, is_layer, sites
from halftone.errors import UserError
from halftone.folding import divisors, reparameterized, reparameterized_layers
from halftone.layers import WeightCodes, quantized_layers, set_weights, wrap
from halftone.passes.correction import check_correction
from halftone.passes.state import ActivationParameters, set_parameters
from halftone.policies import TimeAxis
from halftone.probability_quantizer import Form
from halftone.quantizers.bits import Bits
from halftone.relaxing import Relaxation
from halftone.site_quantizer import Mode, SiteQuantizer, set_divisors, set_mode
from halftone.start_token import kept_apart, tokenizers_of
from halftone.steps.choice import Choice


def sites_of(pipeline: Any, choice: Choice) -> list[Site]:
    """Sites of a pipeline's denoiser that a choice is about, also those that stay in float. Raises UserError
    where the pipeline does not go with the choice."""
    check_correction(pipeline, choice.axes)
    axes, apart = choice.axes, kept_apart(choice.axes, partial(tokenizers_of, pipeline))
    found = denoiser_of(pipeline), choice.protocol, choice.recipe, axes.shortcut, apart
    return sites(*found, bits=choice.bits)


@contextlib.contextmanager
def wrapped(
    denoiser: nn.Module,
    found: Sequence[Site],
    choice: Choice,
    context: CallContext,
    slots: int,
    *,
    factors: Mapping[str, Tensor] | None = None,
    relaxation: Relaxation | None = None,
) -> Iterator[dict[str, SiteQuantizer]]:
    """Quantizers by site name, all off; the denoiser then computes what it did, and is itself again at the
    end.

    slots: of parameters. factors: of the step `reparameterize`, for a recipe that has it. Raises UserError
    for factors of other layers than the recipe's.
    """
    factors = factors or {}
    shared = reparameterized_layers(denoiser, found, choice.axes)
    if {name for one in shared for name in one.layers} != set(factors):
        raise UserError(
            f"recipe {choice.recipe}: the factors are not those of the layers that it reparameterizes; "
            "run reparameterize, or set the axis"
        )
    dynamic = choice.axes.time_axis is TimeAxis.DYNAMIC
    with reparameterized(denoiser, shared, factors), restored(denoiser):
        form = Form.of(choice.axes)
        quantizers = wrap(denoiser, found, choice.bits, slots, context, dynamic, relaxation, form)
        set_divisors(quantizers, divisors(shared, factors))
        yield quantizers


def in_use(
    denoiser: nn.Module,
    quantizers: Mapping[str, SiteQuantizer],
    weights: Mapping[str, WeightCodes],
    activations: ActivationParameters,
    bits: Bits,
) -> Callable[[bool], None]:
    """Codes and parameters put into a wrapped denoiser, and a switch: with them, or in full precision."""
    set_weights(denoiser, weights, bits, keep_full_precision=True)
    set_parameters(quantizers, activations)
    layers = list(quantized_layers(denoiser).values())

    def use(quantized: bool) -> None:
        for layer in layers:
            layer.use_full_precision(not quantized)
        set_mode(quantizers, Mode.QUANTIZE if quantized else Mode.OFF)

    return use


@contextlib.contextmanager
def restored(denoiser: nn.Module) -> Iterator[None]:
    """Put layers, their weights and the attention processors back at the end, as they were before."""
    modules = dict(denoiser.named_modules())
    layers = [(name, module, module.weight) for name, module in modules.items() if is_layer(module)]
    processors = [(m, m.processor) for m in modules.values() if isinstance(m, Attention)]
    try:
        yield
    finally:
        for name, layer, weight in layers:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, layer)
            layer.weight = weight
        for module, processor in processors:
            module.set_processor(processor)
