"""Layers that hold quantizers at their sites, put into a denoiser in place.

Everything here is simulated execution: weights are dequantized once, activations are quantized and
dequantized in float at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from halftone.attention import QuantizedAttnProcessor, install
from halftone.calls import CallContext
from halftone.denoiser import ATTENTION_KINDS, START_KINDS, Site, SiteKind, width_at
from halftone.errors import UserError
from halftone.policies import Range
from halftone.probability_quantizer import PLAIN, Form, ProbabilityQuantizer
from halftone.quantizers.affine import (
    AffineParams,
    dequantize,
    fit_affine,
    quantize,
)
from halftone.quantizers.bits import Bits
from halftone.quantizers.granularity import PerChannel, reduce_minmax
from halftone.quantizers.halves import expand, labels
from halftone.quantizers.layout import Layout, layout_of
from halftone.quantizers.ranges import PER_TENSOR, lp_range
from halftone.relaxing import Relaxation
from halftone.site_quantizer import SiteQuantizer


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
        if self.input is not None and self.input.unfolds:
            x = self.input.divided(x)
            if self.input.observe(x):
                return self._unfolded(x)
        elif self.input is not None:
            x = self.input(x)
        if self.soft_weight is None:
            return self.layer(x)
        weight = self.soft_weight()
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return functional.linear(x, weight, self.layer.bias)

    def _unfolded(self, x: Tensor) -> Tensor:
        """A convolution whose input is quantized as it is unfolded: a pixel has a scale for each tap."""
        assert isinstance(self.layer, nn.Conv2d)
        assert self.input is not None
        assert self.input.layout is not None
        window = self.input.layout.window
        assert window is not None
        weight = self.layer.weight if self.soft_weight is None else self.soft_weight()
        params = self.input.index_params(window.positions(x))
        return window.convolve(x, weight, self.layer.bias, self.layer.groups, params)


def wrap(
    denoiser: nn.Module,
    sites: Iterable[Site],
    bits: Bits,
    n_calls: int,
    context: CallContext,
    dynamic: bool = False,
    relaxation: Relaxation | None = None,
    probabilities: Form = PLAIN,
) -> dict[str, SiteQuantizer]:
    """Put quantizers at the quantized sites of a denoiser, in place, all of them off; returns them by site
    name.

    n_calls: parameter slots of every activation site, 1 where parameters are shared over the calls;
    dynamic: there are no parameters, every tensor brings its own. relaxation: calls with other widths, of
    slots that are calls. probabilities: how those of attention are quantized. Off everywhere, the denoiser
    computes bit for bit what it did with diffusers' materialising `AttnProcessor`.
    Raises ValueError for a denoiser that is wrapped already.
    """
    chosen: dict[str, list[Site]] = {}
    for site in sites:
        if site.quantized:
            chosen.setdefault(site.module, []).append(site)
    quantizers: dict[str, SiteQuantizer] = {}

    def make(site: Site) -> SiteQuantizer:
        width = width_at(site.module, site.kind, bits)
        if site.kind is SiteKind.PROBABILITIES and probabilities != PLAIN:
            heads = int(denoiser.get_submodule(site.module).heads)
            own = ProbabilityQuantizer(site, width, n_calls, context, probabilities, heads, relaxation)
            quantizers[site.name] = own.to(_device(denoiser))
            return quantizers[site.name]
        shared = PER_TENSOR if site.split is None else labels(site.split, _channels(denoiser, site.module))
        layout = (
            Layout() if site.kind is not SiteKind.INPUT else layout_of(denoiser.get_submodule(site.module))
        )
        made = SiteQuantizer(site, width, n_calls, context, shared, dynamic, relaxation, layout)
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
            if len({kinds[k].start for k in START_KINDS if k in kinds}) > 1:
                raise ValueError(f"{name}: its start token is apart in one of keys and probabilities only")
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


def set_weights(denoiser: nn.Module, weights: Mapping[str, WeightCodes], bits: Bits, **options: bool) -> None:
    """`set_weight_codes` for every layer named in `weights`. Raises KeyError for a name that is no wrapped
    layer."""
    layers = quantized_layers(denoiser)
    for name, weight in weights.items():
        params = weight.params(width_at(name, SiteKind.WEIGHT, bits))
        layers[name].set_weight_codes(weight.codes, params, **options)


def _channels(denoiser: nn.Module, module: str) -> int:
    weight = denoiser.get_submodule(module).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


def _device(denoiser: nn.Module) -> torch.device:
    first = next(denoiser.parameters(), None)
    return torch.device("cpu") if first is None else first.device
