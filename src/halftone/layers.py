"""Layers that hold quantizers at their sites, put into a denoiser in place.

Everything here is simulated execution: weights are dequantized once, activations are quantized and
dequantized in float at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple, Protocol

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from halftone.attention import QuantizedAttnProcessor, install
from halftone.calls import CallContext
from halftone.denoiser import ATTENTION_KINDS, Site, SiteKind
from halftone.errors import UserError
from halftone.quantizers.affine import (
    AffineParams,
    dequantize,
    fake_quantize,
    fit_affine,
    fit_non_negative,
    quantize,
)
from halftone.quantizers.bits import Bits
from halftone.quantizers.granularity import Granularity, PerChannel, reduce_minmax
from halftone.quantizers.halves import expand, labels
from halftone.quantizers.ranges import PER_TENSOR, lp_range
from halftone.recipes import Range
from halftone.relaxing import Relaxation


class Mode(StrEnum):
    """What a site quantizer does with a tensor: nothing, show it to its observer, quantize it, or both."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"
    OBSERVE_QUANTIZED = "observe and quantize"


class Observer(Protocol):
    """Anything that sees a site's tensors, such as the estimators of `halftone.quantizers.ranges`."""

    def update(self, x: Tensor) -> None: ...


class SiteQuantizer(nn.Module):
    """The quantizer of one activation site, with parameters per call or shared over the calls.

    `widths`: bits of every slot; all are `bits` unless calls are relaxed. `scale` and `zero_point` are
    float32 of shape (n_calls, ...) or (1, ...): entry `context.slot` (or 0) broadcasts against the tensor.
    They are NaN until set, and stay float32 when the model is cast. A `dynamic` quantizer has none: it takes
    those of every row (index of the first axis: a sample, or a head of one) from the row itself, so a row
    depends on no other. `soft_params`, when set, is called at every forward for the parameters to use
    instead, with gradients (step-size learning).
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        site: Site,
        bits: int,
        n_calls: int,
        context: CallContext,
        granularity: Granularity = PER_TENSOR,
        dynamic: bool = False,
        relaxation: Relaxation | None = None,
    ) -> None:
        super().__init__()
        self.site, self.bits, self.context = site, bits, context
        self.widths = [bits] * n_calls if relaxation is None else relaxation.widths(bits, n_calls)
        self.granularity, self.dynamic = granularity, dynamic
        self.non_negative = site.kind is SiteKind.PROBABILITIES
        self.mode = Mode.OFF
        self.observer: Observer | None = None
        self.soft_params: Callable[[], AffineParams] | None = None
        self.register_buffer("scale", torch.full((n_calls,), torch.nan))
        self.register_buffer("zero_point", torch.full((n_calls,), torch.nan))
        self._fast: list[tuple[Tensor, float, float] | None] = []

    @property
    def n_calls(self) -> int:
        """Number of parameter slots; 1 where they are shared."""
        return self.scale.shape[0]

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Parameters of every call at once, (n_calls, ...) or (1, ...)."""
        if scale.shape != zero_point.shape or scale.shape[0] not in (1, self.n_calls):
            raise ValueError(
                f"{self.site.name}: scale {tuple(scale.shape)} and zero point {tuple(zero_point.shape)} "
                f"do not fit {self.n_calls} calls"
            )
        device = self.scale.device
        # copies: `set_call` writes into them
        self.scale = scale.detach().to(device, torch.float32, copy=True)
        self.zero_point = zero_point.detach().to(device, torch.float32, copy=True)
        self._fast = []

    def set_call(self, call: int, params: AffineParams) -> None:
        """Parameters of one call (of all, where they are shared)."""
        slot = call if self.n_calls > 1 else 0
        if self.scale[slot].shape != params.scale.shape:
            if params.scale.shape != params.zero_point.shape:
                raise ValueError(f"{self.site.name}: scale and zero point differ in shape")
            room = self.scale.new_full((self.n_calls, *params.scale.shape), torch.nan)
            self.scale, self.zero_point = room, room.clone()
        self.scale[slot] = params.scale.to(self.scale.device)
        self.zero_point[slot] = params.zero_point.to(self.scale.device)
        self._fast = []

    def params(self, slot: int | None = None) -> AffineParams:
        """Parameters in use, or those of a slot."""
        slot = self.context.slot if slot is None else slot
        slot = slot if self.n_calls > 1 else 0
        return AffineParams(self.scale[slot], self.zero_point[slot], self.widths[slot])

    def width(self, call: int) -> int:
        """Bits at a call."""
        return self.widths[call if self.n_calls > 1 else 0]

    def forward(self, x: Tensor) -> Tensor:
        """x, of its own shape and dtype. Raises RuntimeError when quantizing without parameters."""
        if self.mode is Mode.OFF:
            return x
        if self.mode is not Mode.QUANTIZE:
            if self.observer is None:
                raise RuntimeError(f"{self.site.name}: asked to observe, but no observer was set")
            self.observer.update(x)
            if self.mode is Mode.OBSERVE:
                return x
        if self.soft_params is not None:
            return fake_quantize(x, self.soft_params())
        if self.dynamic:
            return fake_quantize(x, self.params_of(x))
        if not self._fast:
            self._prepare()
        fast = self._fast[self.context.slot if len(self._fast) > 1 else 0]
        if fast is None or (x.requires_grad and torch.is_grad_enabled()):
            return fake_quantize(x, self.params())
        # `fake_quantize` for one parameter: the same values, without reading the zero point back from the
        # device
        scale, low, high = fast
        values = x.detach().float().div(scale).round_().clamp_(low, high).mul_(scale)
        return values.to(x.dtype)

    def params_of(self, x: Tensor) -> AffineParams:
        """Parameters of a dynamic quantizer for this tensor, one per row.

        Raises UserError where the tensor holds NaN or infinite values.
        """
        try:
            lo, hi = reduce_minmax(x, PerChannel(0))
        except ValueError as fault:
            raise UserError(f"{self.site.name}: {fault}; run the model in float32") from None
        if self.non_negative:
            return fit_non_negative(hi, self.bits)
        return fit_affine(lo, hi, self.bits)

    def _prepare(self) -> None:
        if self.scale.isnan().any() or self.zero_point.isnan().any():
            raise RuntimeError(
                f"{self.site.name}: asked to quantize, but parameters are not set for every call"
            )
        if self.scale.ndim > 1:
            self._fast = [None] * self.n_calls
            return
        slots = (self.params(slot) for slot in range(self.n_calls))
        offsets = self.zero_point.tolist()
        self._fast = [(p.scale, p.low - z, p.high - z) for p, z in zip(slots, offsets, strict=True)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteQuantizer:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        self._fast = []
        return self


class WeightCodes(NamedTuple):
    """A quantized weight: integer codes in the weight's shape, parameters per output channel (axis 0)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def params(self, bits: int) -> AffineParams:
        return AffineParams(self.scale, self.zero_point, bits)


def fit_weight(weight: Tensor, bits: int, weight_range: Range, split: int | None = None) -> AffineParams:
    """Parameters per output channel (axis 0) of a weight (out, in) or (out, in, height, width).

    With `split` the input channels before it and those from it on have parameters of their own, given per
    input channel: (out, in, ...). Raises ValueError for NaN or infinite weights, UserError for a range that
    is not `minmax` or `lp`.
    """
    if split is not None:
        parts = [fit_weight(half, bits, weight_range) for half in (weight[:, :split], weight[:, split:])]
        scale, zero_point = (
            expand(torch.cat([getattr(part, name) for part in parts], dim=1), split, weight.shape[1])
            for name in ("scale", "zero_point")
        )
        return AffineParams(scale, zero_point, bits)
    if weight_range is Range.MINMAX:
        lo, hi = reduce_minmax(weight.float(), PerChannel(0))
    elif weight_range is Range.LP:
        lo, hi = lp_range(weight.float(), bits, PerChannel(0))
    else:
        raise UserError(f"weight_range {weight_range}: weights are all there at once; choose minmax or lp")
    return fit_affine(lo, hi, bits)


def store_codes(codes: Tensor, params: AffineParams) -> WeightCodes:
    """Integer codes as uint8 (up to 8 bits) or int32, with their parameters."""
    return WeightCodes(
        codes.to(torch.uint8 if params.bits <= 8 else torch.int32), params.scale, params.zero_point
    )


def nearest_codes(weight: Tensor, params: AffineParams) -> WeightCodes:
    """Each weight rounded to its nearest code."""
    return store_codes(quantize(weight.detach(), params), params)


class QuantizedLayer(nn.Module):
    """A Linear or Conv2d with a quantizer at its input, and a weight that is its codes, dequantized once.

    Until `set_weight_codes` the weight is the full-precision one. `soft_weight`, when set, is called at every
    forward for the weight to use instead, with gradients (block reconstruction).
    """

    full_precision_weight: Tensor | None
    quantized_weight: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, input: SiteQuantizer | None) -> None:
        super().__init__()
        self.layer, self.input = layer, input
        self.soft_weight: Callable[[], Tensor] | None = None
        self.register_buffer("full_precision_weight", None, persistent=False)
        self.register_buffer("quantized_weight", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight in use."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    @torch.no_grad()
    def set_weight_codes(
        self, codes: Tensor, params: AffineParams, *, keep_full_precision: bool = False
    ) -> None:
        """Use the weight that `codes` stand for. The full-precision one is dropped unless it is to be
        kept."""
        weight = self.layer.weight
        if codes.shape != weight.shape:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} for a weight of shape {tuple(weight.shape)}"
            )
        value = dequantize(codes.to(weight.device), params.to(weight.device)).to(weight.dtype)
        if keep_full_precision:
            if self.full_precision_weight is None:
                self.full_precision_weight = weight.detach()
            self.quantized_weight = value
        else:
            self.full_precision_weight = self.quantized_weight = None
        self.layer.weight = nn.Parameter(value, requires_grad=False)

    def use_full_precision(self, yes: bool) -> None:
        """Switch between the full-precision weight and the codes', where both were kept."""
        chosen = self.full_precision_weight if yes else self.quantized_weight
        if chosen is not None:
            self.layer.weight = nn.Parameter(chosen, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.input is not None:
            x = self.input(x)
        if self.soft_weight is None:
            return self.layer(x)
        weight = self.soft_weight()
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return functional.linear(x, weight, self.layer.bias)


def wrap(
    denoiser: nn.Module,
    sites: Iterable[Site],
    bits: Bits,
    n_calls: int,
    context: CallContext,
    dynamic: bool = False,
    relaxation: Relaxation | None = None,
) -> dict[str, SiteQuantizer]:
    """Put quantizers at the quantized sites of a denoiser, in place, all of them off; returns them by site
    name.

    n_calls: parameter slots of every activation site, 1 where parameters are shared over the calls;
    dynamic: there are no parameters, every tensor brings its own. relaxation: calls with other widths, of
    slots that are calls. Off everywhere, the denoiser computes
    bit for bit what it did with diffusers' materialising `AttnProcessor`.
    Raises ValueError for a denoiser that is wrapped already.
    """
    chosen: dict[str, list[Site]] = {}
    for site in sites:
        if site.quantized:
            chosen.setdefault(site.module, []).append(site)
    quantizers: dict[str, SiteQuantizer] = {}

    def make(site: Site) -> SiteQuantizer:
        width = bits.softmax if site.kind is SiteKind.PROBABILITIES else bits.activation
        shared = PER_TENSOR if site.split is None else labels(site.split, _channels(denoiser, site.module))
        made = SiteQuantizer(site, width, n_calls, context, shared, dynamic, relaxation)
        quantizers[site.name] = made.to(_device(denoiser))
        return quantizers[site.name]

    for name, its_sites in chosen.items():
        module = denoiser.get_submodule(name)
        if isinstance(module, QuantizedLayer) or isinstance(
            getattr(module, "processor", None), QuantizedAttnProcessor
        ):
            raise ValueError(f"{name} is wrapped already")
        kinds = {site.kind: site for site in its_sites}
        if isinstance(module, Attention):
            install(
                module,
                QuantizedAttnProcessor(*(make(kinds[k]) if k in kinds else None for k in ATTENTION_KINDS)),
            )
        else:
            assert isinstance(module, nn.Linear | nn.Conv2d)
            wrapped = QuantizedLayer(module, make(kinds[SiteKind.INPUT]) if SiteKind.INPUT in kinds else None)
            denoiser.set_submodule(name, wrapped.train(module.training))
    return quantizers


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLayer]:
    """The wrapped layers of a denoiser by module name."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, QuantizedLayer)}


def set_mode(quantizers: Mapping[str, SiteQuantizer] | Iterable[SiteQuantizer], mode: Mode) -> None:
    """Put all of them into one mode."""
    for quantizer in quantizers.values() if isinstance(quantizers, Mapping) else quantizers:
        quantizer.mode = mode


def set_weights(denoiser: nn.Module, weights: Mapping[str, WeightCodes], bits: int, **options: bool) -> None:
    """`set_weight_codes` for every layer named in `weights`. Raises KeyError for a name that is no wrapped
    layer."""
    layers = quantized_layers(denoiser)
    for name, weight in weights.items():
        layers[name].set_weight_codes(weight.codes, weight.params(bits), **options)


def _channels(denoiser: nn.Module, module: str) -> int:
    weight = denoiser.get_submodule(module).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


def _device(denoiser: nn.Module) -> torch.device:
    first = next(denoiser.parameters(), None)
    return torch.device("cpu") if first is None else first.device
