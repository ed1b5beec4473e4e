"""Simulated execution on whole numbers: float products of code - zero point, scaled afterwards.

Float32 holds every sum below 2^24 exactly, whatever the order of its terms. So these modules give the same
bits for any batch shape and thread count, and the same as integer execution, which makes the sums in integers
and then scales and adds in the same order. Beyond 2^24 a sum is rounded, as in any float product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from halftone.attention import QuantizedAttnProcessor
from halftone.layers import QuantizedLayer, WeightCodes
from halftone.runtime.operands import Affine, Weight, geometry_of, spread, whole, wide
from halftone.site_quantizer import Mode, SiteQuantizer

_KEPT = ("weight_scale",)  # float32, whatever the model is cast to


class Affines:
    """Parameters of an activation site as numbers, read from its quantizer once and not at every call."""

    def __init__(self, quantizer: SiteQuantizer) -> None:
        self.quantizer = quantizer
        self._read: list[list[Affine]] = []
        self._scale: Tensor | None = None

    def now(self) -> list[Affine]:
        """Those that serve the present call: one, or one for each half of a split site."""
        if self._scale is not self.quantizer.scale:  # it has been set again, or has moved
            self._read = [self._at(slot) for slot in range(self.quantizer.n_calls)]
            self._scale = self.quantizer.scale
        return self._read[self.quantizer.context.slot if len(self._read) > 1 else 0]

    def _at(self, slot: int) -> list[Affine]:
        params, split = self.quantizer.params(slot), self.quantizer.site.split
        if split is None:
            return [Affine(params.scale.reshape(()), int(params.zero_point), params.bits)]
        scales, zero_points = params.scale.flatten(), params.zero_point.flatten()
        return [Affine(scales[k], int(zero_points[k]), params.bits) for k in (0, split)]


def cut(x: Tensor, split: int | None, axis: int) -> list[Tensor]:
    """A tensor as the parts along `axis` that have parameters of their own."""
    return [x] if split is None else list(x.split([split, x.shape[axis] - split], dim=axis))


def halves_of(weight: WeightCodes, split: int | None) -> list[Weight]:
    """A weight as its parts along the input channels (axis 1), each with one scale per output channel."""
    starts = [0] if split is None else [0, split]
    flat = [values.reshape(weight.codes.shape[0], -1) for values in (weight.scale, weight.zero_point)]
    codes = cut(weight.codes, split, 1)
    return [
        Weight(part, *(values[:, start] for values in flat))
        for part, start in zip(codes, starts, strict=True)
    ]


class WholeLayer(QuantizedLayer):
    """A simulated Linear or Conv2d: both operands are whole numbers in a float type.

    Its `weight` holds code - zero point. Buffer: weight_scale float32, (halves, out).
    """

    weight_scale: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, input: SiteQuantizer, weight: WeightCodes) -> None:
        super().__init__(layer, input)
        self.split, self.geometry, self.affines = input.site.split, geometry_of(layer), Affines(input)
        halves = halves_of(weight, self.split)
        steps = torch.cat([half.steps() for half in halves], dim=1).to(layer.weight.dtype)
        layer.weight = nn.Parameter(steps, requires_grad=False)
        self.register_buffer("weight_scale", torch.stack([half.scale for half in halves]))

    def forward(self, x: Tensor) -> Tensor:
        if not _plain(x, self.input):
            return self._dequantized(x)
        dtype = wide(x.dtype)
        along = spread(self.geometry)
        weight, bias = self.layer.weight.to(dtype), self.layer.bias
        total: Tensor | None = None
        parts = cut(x, self.split, -1 if self.geometry is None else 1), cut(weight, self.split, 1)
        for part, steps, affine, scale in zip(*parts, self.affines.now(), self.weight_scale, strict=True):
            out = self._product(whole(part, affine), steps, None)
            out = out.mul_((affine.scale.to(dtype) * scale.to(dtype)).reshape(along))
            if bias is not None:
                out, bias = out.add_(bias.to(dtype).reshape(along)), None
            total = out if total is None else total.add_(out)
        assert total is not None
        return total.to(x.dtype)

    def _dequantized(self, x: Tensor) -> Tensor:
        """As `QuantizedLayer` does it: the same to float rounding, with gradients, in any mode."""
        out_first = (-1,) + (1,) * (self.layer.weight.ndim - 1)
        halves = zip(cut(self.layer.weight, self.split, 1), self.weight_scale, strict=True)
        values = [steps.to(x.dtype) * scale.to(x.dtype).reshape(out_first) for steps, scale in halves]
        assert self.input is not None
        return self._product(self.input(x), torch.cat(values, dim=1), self.layer.bias)

    def _product(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        how = self.geometry
        if how is None:
            return functional.linear(left, right, bias)
        if left.device.type == "cpu":
            # the layout that 8-bit convolutions leave: norms after them add in the order of memory
            left = left.contiguous(memory_format=torch.channels_last)
        return functional.conv2d(left, right, bias, how.stride, how.padding, how.dilation, how.groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WholeLayer:
        keep_float32(self, _KEPT, lambda: super(WholeLayer, self)._apply(fn, recurse))
        return self


def keep_float32(module: nn.Module, names: tuple[str, ...], move: Callable[[], object]) -> None:
    """Let `move` take a module to another device or type, with some of its buffers to the device alone."""
    kept = {name: module._buffers[name] for name in names}
    move()
    for name, buffer in kept.items():
        moved = module._buffers[name]
        if buffer is not None and moved is not None:
            module._buffers[name] = buffer.to(moved.device)


def _plain(x: Tensor, quantizer: nn.Module | None) -> bool:
    """Whether a tensor is to be quantized and no more: not observed, not differentiated."""
    assert isinstance(quantizer, SiteQuantizer)
    learned = quantizer.soft_params is not None or (x.requires_grad and torch.is_grad_enabled())
    return quantizer.mode is Mode.QUANTIZE and not learned


class WholeAttnProcessor(QuantizedAttnProcessor):
    """Simulated attention: q kᵀ and probabilities x v are products of whole numbers, scaled afterwards."""

    query: SiteQuantizer
    key: SiteQuantizer
    value: SiteQuantizer
    probabilities: SiteQuantizer

    def __init__(
        self, query: SiteQuantizer, key: SiteQuantizer, value: SiteQuantizer, probabilities: SiteQuantizer
    ) -> None:
        super().__init__(query, key, value, probabilities)
        sites = {"query": query, "key": key, "value": value, "probabilities": probabilities}
        self.affines = {name: Affines(quantizer) for name, quantizer in sites.items()}

    def affine(self, name: str) -> Affine:
        """Of `query`, `key`, `value` or `probabilities`, at the present call."""
        (found,) = self.affines[name].now()
        return found

    def weights(self, attn: Attention, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        if not _plain(query, self.query) or not _plain(key, self.key):
            return super().weights(attn, query, key, mask)
        of_query, of_key = self.affine("query"), self.affine("key")
        left = self.steps(query, of_query, self.query)
        right = self.steps(key, of_key, self.key).transpose(1, 2)
        sums = self.product(left, right, of_query, of_key)
        scores = sums.mul_(of_query.scale.to(sums.dtype) * of_key.scale.to(sums.dtype) * attn.scale)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1, dtype=sums.dtype).to(query.dtype)

    def mix(self, probabilities: Tensor, value: Tensor) -> Tensor:
        if not _plain(probabilities, self.probabilities) or not _plain(value, self.value):
            return super().mix(probabilities, value)
        of_probabilities, of_value = self.affine("probabilities"), self.affine("value")
        left = self.steps(probabilities, of_probabilities, self.probabilities)
        right = self.steps(value, of_value, self.value)
        sums = self.product(left, right, of_probabilities, of_value)
        scale = of_probabilities.scale.to(sums.dtype) * of_value.scale.to(sums.dtype)
        return sums.mul_(scale).to(value.dtype)

    def steps(self, x: Tensor, affine: Affine, site: SiteQuantizer) -> Tensor:
        """Code - zero point of every value."""
        return whole(x, affine)

    def product(self, left: Tensor, right: Tensor, of_left: Affine, of_right: Affine) -> Tensor:
        """Batched product of whole numbers, in their type."""
        return torch.bmm(left, right)
