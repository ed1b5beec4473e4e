"""Modules that compute in integers: a layer over codes, and attention as two products of whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from halftone.errors import UserError
from halftone.layers import WeightCodes
from halftone.runtime.operands import (
    BAND,
    Affine,
    Geometry,
    Operand,
    Product,
    Weight,
    check_nan,
    encode,
    geometry_of,
    wide,
)
from halftone.runtime.parts import Parts, parts_of
from halftone.runtime.reference import batched
from halftone.runtime.whole import Affines, keep_float32
from halftone.runtime.whole_attention import WholeAttnProcessor
from halftone.site_quantizer import SiteQuantizer

_EXACT_BFLOAT16 = 2**8  # a float32 product may round its operands to this, where PyTorch is told to
_KEPT = ("weight_scale", "weight_zero_point")  # float32, whatever the model is cast to

MakeProduct = Callable[[Weight, Geometry | None], Product]


class CodedLayer(nn.Module):
    """A Linear or Conv2d whose weight is codes, and whose input becomes codes.

    Buffers: codes as stored, (out, in, ...); weight_scale float32 and weight_zero_point, (parts, out).
    """

    codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        input: SiteQuantizer,
        weight: WeightCodes,
        make: MakeProduct,
        parts: Parts,
    ) -> None:
        super().__init__()
        self.input, self.make, self.bias, self.parts = input, make, layer.bias, parts
        weights = parts.of_weight(weight)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("weight_scale", torch.stack([part.scale for part in weights]))
        self.register_buffer("weight_zero_point", torch.stack([part.zero_point for part in weights]))
        self._products: list[Product] = []

    def products(self) -> list[Product]:
        """Ready for their kernel, one for each part; made at the first call. Raises UserError elsewhere than
        on a CPU."""
        if not self._products:
            if self.codes.device.type != "cpu":
                raise UserError("integer execution runs on the CPU; leave the pipeline there")
            self._products = self.prepared()
        return self._products

    def prepared(self) -> list[Product]:
        """The products, made anew."""
        raise NotImplementedError

    def beside(self, x: Tensor, simulated: SiteQuantizer) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes of an input, and those of what a simulated quantizer makes of it, piece by piece."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedLayer:
        keep_float32(self, _KEPT, lambda: super(CodedLayer, self)._apply(fn, recurse))
        self._products = []
        return self

    def __getstate__(self) -> dict[str, object]:
        # prepared weights cannot be copied, and are made again
        return {**super().__getstate__(), "_products": []}


class IntegerLayer(CodedLayer):
    """A layer over codes: its input is encoded, its weight is codes, its sums are integers.

    The contracted axis may fall into parts with parameters of their own: one product each, added as floats.
    Raises UserError for inputs that hold NaN.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, input: SiteQuantizer, weight: WeightCodes, make: MakeProduct
    ) -> None:
        parts = parts_of(input)
        assert parts is not None
        super().__init__(layer, input, weight, make, parts)
        self.geometry, self.affines = geometry_of(layer), Affines(input)

    def prepared(self) -> list[Product]:
        parts = enumerate(self.parts.cut(self.parts.ordered(self.codes, 1), 1))
        weights = (Weight(codes, self.weight_scale[k], self.weight_zero_point[k]) for k, codes in parts)
        return [self.make(weight, self.geometry) for weight in weights]

    def encoded(self, x: Tensor) -> list[tuple[Tensor, Affine]]:
        """Codes of the input, and what they stand for, for each part."""
        parts = zip(self.in_parts(self.input.divided(x)), self.affines.now(), strict=True)
        return [(encode(part, affine, self.input.site.name), affine) for part, affine in parts]

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().to(wide(x.dtype))
        total: Tensor | None = None
        for product, (codes, affine) in zip(self.products(), self.encoded(x), strict=True):
            out = product(codes, affine, bias)
            total, bias = out if total is None else total.add_(out), None
        assert total is not None
        return total.to(x.dtype)

    def in_parts(self, x: Tensor) -> list[Tensor]:
        """A tensor like the input as the parts that have parameters of their own."""
        axis = -1 if self.geometry is None else 1
        return self.parts.cut(self.parts.ordered(x, axis), axis)

    def beside(self, x: Tensor, simulated: SiteQuantizer) -> Iterator[tuple[Tensor, Tensor]]:
        parts = self.in_parts(simulated(x))
        for (codes, affine), values in zip(self.encoded(x), parts, strict=True):
            yield codes, values.float().div(affine.scale).round_().add_(affine.zero_point).int()


class IntegerAttnProcessor(WholeAttnProcessor):
    """Attention whose products q kᵀ and probabilities x v are sums of integers.

    The integers lie in float32 where every sum of magnitudes stays below 2^24, which makes the products
    exact, and in float64 beyond. Scales, mask and softmax are float.
    """

    def operand(self, x: Tensor, quantizer: SiteQuantizer) -> Operand:
        found = super().operand(x, quantizer)
        check_nan(found.steps, quantizer.site.name)
        return found

    def product(self, left: Operand, right: Operand) -> Tensor:
        narrow = (left.octaves > 0 or left.reach <= _EXACT_BFLOAT16) and right.reach <= _EXACT_BFLOAT16
        if narrow or left.octaves > BAND:
            return super().product(left, right)
        return batched(left.steps, right.steps, left.most * right.reach).to(left.steps.dtype)
