"""A layer over codes that have parameters for every position, see `halftone.runtime.whole_rows`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from halftone.layers import WeightCodes
from halftone.quantizers.affine import fake_quantize
from halftone.runtime.layers import CodedLayer, MakeProduct
from halftone.runtime.operands import Affine, Product, Weight, encode_each
from halftone.runtime.parts import Parts
from halftone.runtime.whole_rows import Piece, Rows, middle_of
from halftone.site_quantizer import SiteQuantizer


class RowLayer(CodedLayer):
    """A Linear or Conv2d (without groups of its own) over codes that have parameters for every position.

    Multiplied as a matrix; sums are exact below 2^24, as of every kernel.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, input: SiteQuantizer, weight: WeightCodes, make: MakeProduct
    ) -> None:
        super().__init__(layer, input, weight, make, Parts())
        self.rows = Rows(layer, self.matrix)

    @property
    def matrix(self) -> Weight:
        """The weight, (out, terms)."""
        return Weight(self.codes.flatten(1), self.weight_scale[0], self.weight_zero_point[0])

    def prepared(self) -> list[Product]:
        return [self.make(self.matrix, None)]

    def codes_of(self, piece: Piece) -> Tensor:
        """(samples, n, terms)."""
        return self.rows.turned(encode_each(piece.values, piece.params, self.input.site.name))

    def forward(self, x: Tensor) -> Tensor:
        (product,) = self.products()
        pieces = self.rows.pieces(x, self.input)
        return self.rows.joined(x, ((piece, self._multiplied(product, piece)) for piece in pieces))

    def _multiplied(self, product: Product, piece: Piece) -> Tensor:
        codes = self.codes_of(piece)
        affine = Affine(torch.ones((), device=codes.device), middle_of(piece.params), piece.params.bits)
        return self.rows.scaled(product.accumulate(codes, affine), piece.params, self.bias)

    def beside(self, x: Tensor, simulated: SiteQuantizer) -> Iterator[tuple[Tensor, Tensor]]:
        for mine, its in zip(self.rows.pieces(x, self.input), self.rows.pieces(x, simulated), strict=True):
            values = fake_quantize(its.values, its.params).double()
            # in float64: a zero point far outside the codes leaves float32 no room behind the point
            wanted = values.div_(its.params.scale).round_().add_(its.params.zero_point).int()
            yield self.codes_of(mine), self.rows.turned(wanted)
