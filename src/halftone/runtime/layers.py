"""Modules that compute in integers: a layer over codes, and attention as two products of whole numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from halftone.attention import QuantizedAttnProcessor
from halftone.errors import UserError
from halftone.layers import SiteQuantizer, WeightCodes
from halftone.runtime.operands import Affine, Geometry, Product, Weight, encode, geometry_of, steps
from halftone.runtime.reference import batched

_EXACT_FLOAT32 = 2**24
_EXACT_BFLOAT16 = 2**8  # a float32 product may round its operands to this, where PyTorch is told to
_KEPT = ("weight_scale",)  # float32, whatever the model is cast to

MakeProduct = Callable[[Weight, Geometry | None], Product]


def affine_of(quantizer: SiteQuantizer) -> list[Affine]:
    """Parameters that serve the present call: one, or one for each half of a split site."""
    params = quantizer.params()
    split = quantizer.site.split
    if split is None:
        return [Affine(params.scale, int(params.zero_point), params.bits)]
    scales, zero_points = params.scale.flatten(), params.zero_point.flatten()
    return [Affine(scales[k], int(zero_points[k]), params.bits) for k in (0, split)]


class IntegerLayer(nn.Module):
    """A Linear or Conv2d over codes: its input is encoded, its weight is codes, its sums are integers.

    The contracted axis may fall into halves with parameters of their own: one product each, added as floats.
    Buffers: codes as stored, (out, in, ...); weight_scale float32 and weight_zero_point, (halves, out).
    Raises UserError on another device than a CPU, and for inputs that hold NaN.
    """

    codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, input: SiteQuantizer, weight: WeightCodes, make: MakeProduct
    ) -> None:
        super().__init__()
        self.input, self.make, self.bias = input, make, layer.bias
        self.geometry = geometry_of(layer)
        self.split = input.site.split
        starts = [0] if self.split is None else [0, self.split]
        self.register_buffer("codes", weight.codes)
        for name, values in (("weight_scale", weight.scale), ("weight_zero_point", weight.zero_point)):
            per_channel = values.reshape(weight.codes.shape[0], -1)
            self.register_buffer(name, torch.stack([per_channel[:, start] for start in starts]))
        self._products: list[Product] = []

    def products(self) -> list[Product]:
        """Ready for their kernel, one for each half; made at the first call."""
        if not self._products:
            if self.codes.device.type != "cpu":
                raise UserError("integer execution runs on the CPU; leave the pipeline there")
            for k, codes in enumerate(self._cut(self.codes, 1)):
                weight = Weight(codes, self.weight_scale[k], self.weight_zero_point[k])
                self._products.append(self.make(weight, self.geometry))
        return self._products

    def encoded(self, x: Tensor) -> list[tuple[Tensor, Affine]]:
        """Codes of the input, and what they stand for, for each half."""
        halves = zip(self.halves(x), affine_of(self.input), strict=True)
        return [(encode(part, affine, self.input.site.name), affine) for part, affine in halves]

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().float()
        total: Tensor | None = None
        for product, (codes, affine) in zip(self.products(), self.encoded(x), strict=True):
            out = product(codes, affine, bias)
            total, bias = out if total is None else total.add_(out), None
        assert total is not None
        return total.to(x.dtype)

    def halves(self, x: Tensor) -> list[Tensor]:
        """An input as the parts that have parameters of their own."""
        return self._cut(x, -1 if self.geometry is None else 1)

    def _cut(self, x: Tensor, axis: int) -> list[Tensor]:
        if self.split is None:
            return [x]
        return list(x.split([self.split, x.shape[axis] - self.split], dim=axis))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLayer:
        kept = {name: self._buffers[name] for name in _KEPT}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        self._products = []
        return self

    def __getstate__(self) -> dict[str, object]:
        # prepared weights cannot be copied, and are made again
        return {**super().__getstate__(), "_products": []}


class IntegerAttnProcessor(QuantizedAttnProcessor):
    """Attention whose products q kᵀ and probabilities x v are sums of integers.

    The integers lie in float32 where every sum of magnitudes stays below 2^24, which makes the products
    exact, and in float64 beyond. The first bound follows from the widths of the codes. The second uses that
    probabilities add up to 1, so that the codes of n of them add up to 1 / scale + n / 2 at most. Scales,
    mask and softmax are float.
    """

    query: SiteQuantizer
    key: SiteQuantizer
    value: SiteQuantizer
    probabilities: SiteQuantizer

    def weights(self, attn: Attention, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        (of_query,), (of_key,) = affine_of(self.query), affine_of(self.key)
        left = steps(query, of_query, self.query.site.name)
        right = steps(key, of_key, self.key.site.name).transpose(1, 2)
        sums = _product(left, right, of_query.reach, of_key.reach, of_query.reach * query.shape[-1])
        scores = sums.mul_(of_query.scale * of_key.scale * attn.scale)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)

    def mix(self, probabilities: Tensor, value: Tensor) -> Tensor:
        (of_value,), (of_probabilities,) = affine_of(self.value), affine_of(self.probabilities)
        left = steps(probabilities, of_probabilities, self.probabilities.site.name)
        right = steps(value, of_value, self.value.site.name)
        n_keys = value.shape[1]
        most = min(of_probabilities.reach * n_keys, 1.001 / float(of_probabilities.scale) + n_keys / 2)
        sums = _product(left, right, of_probabilities.reach, of_value.reach, most)
        return sums.mul_(of_probabilities.scale * of_value.scale).to(value.dtype)


def _product(left: Tensor, right: Tensor, reach_left: int, reach_right: int, most: float) -> Tensor:
    """Exact batched product of whole numbers; `most` bounds the summed magnitudes of a row of `left`."""
    if max(reach_left, reach_right) <= _EXACT_BFLOAT16 and most * reach_right < _EXACT_FLOAT32:
        return torch.bmm(left, right)
    return batched(left, right, most * reach_right).float()
