"""A layer whose input has parameters for every position: row scales of one product.

Groups of a Linear's tokens, or of the output positions of a convolution's unfolded input. With c the codes of
a row, z and s its zero point and scale, w the steps of an output channel and t their scale, an output is
s t (sum of (c - m) w + (m - z) x sum of w) + bias: the middle m of the codes stands in for every zero point,
so that one product serves all rows and no zero point needs to be a code. The weight is taken as it lies, so
the groups may be others at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halftone.layers import WeightCodes
from halftone.quantizers.affine import AffineParams, fake_quantize
from halftone.quantizers.groups import Axis
from halftone.quantizers.unfolded import columns_of, window_of
from halftone.runtime.layers import CodedLayer, MakeProduct
from halftone.runtime.operands import Affine, Product, Weight, encode_each
from halftone.runtime.parts import Parts
from halftone.runtime.whole_attention import EXACT_FLOAT32
from halftone.site_quantizer import SiteQuantizer


class Piece(NamedTuple):
    """Some positions of an input. values: (samples, n, channels), with parameters (n, 1); of a convolution
    (samples, channels * taps, n), with (1, n)."""

    columns: slice
    values: Tensor
    params: AffineParams


class RowLayer(CodedLayer):
    """A Linear or Conv2d (without groups of its own) over codes that have parameters for every position.

    A convolution is unfolded band by band and multiplied as a matrix. Sums are exact below 2^24, as of every
    kernel; the share of the zero points is added in float64 where float32 might not hold it exactly.
    """

    column_sums: Tensor

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, input: SiteQuantizer, weight: WeightCodes, make: MakeProduct
    ) -> None:
        super().__init__(layer, input, weight, make, Parts())
        self.window = window_of(layer) if isinstance(layer, nn.Conv2d) else None
        steps = self.matrix.steps()
        self.register_buffer("column_sums", steps.sum(1))
        self._most = int(steps.abs().sum(1).max()), int(self.column_sums.abs().max())

    @property
    def matrix(self) -> Weight:
        """The weight, (out, terms)."""
        return Weight(self.codes.flatten(1), self.weight_scale[0], self.weight_zero_point[0])

    def prepared(self) -> list[Product]:
        return [self.make(self.matrix, None)]

    def pieces(self, x: Tensor, quantizer: SiteQuantizer) -> Iterator[Piece]:
        """An input, divided by its factors, with the parameters of a quantizer of the site.

        Raises UserError for another number of positions than was calibrated.
        """
        x, layout = quantizer.divided(x), quantizer.layout
        assert layout is not None
        if self.window is None:
            yield Piece(slice(None), layout.rows(x), quantizer.index_params(layout.positions(x)))
            return
        params = quantizer.index_params(self.window.positions(x))
        for columns, unfolded in self.window.bands(x):
            part = columns_of(params, columns)
            yield from (Piece(columns, values, part) for values in unfolded)

    def codes_of(self, piece: Piece) -> Tensor:
        """(samples, n, terms)."""
        codes = encode_each(piece.values, piece.params, self.input.site.name)
        return codes if self.window is None else codes.transpose(1, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        (product,) = self.products()
        bands: dict[int, list[Tensor]] = {}
        for piece in self.pieces(x, self.input):
            out = self.multiplied(product, self.codes_of(piece), piece.params).to(x.dtype)
            if self.window is None:
                return out.unflatten(1, x.shape[1:-1])
            bands.setdefault(piece.columns.start, []).append(out.transpose(1, 2))
        assert self.window is not None
        found = torch.cat([torch.cat(band) for band in bands.values()], dim=2)
        return found.unflatten(2, (-1, self.window.output_width(x)))

    def multiplied(self, product: Product, codes: Tensor, params: AffineParams) -> Tensor:
        """Outputs (samples, n, out) for codes (samples, n, terms), float32 or float64."""
        middle = 2 ** (params.bits - 1)
        one = torch.ones((), device=codes.device)
        sums = product.accumulate(codes, Affine(one, middle, params.bits))
        offsets = middle - params.zero_point.double().reshape(-1, 1)
        most, most_of_columns = self._most
        if most * middle + float(offsets.abs().max()) * most_of_columns >= EXACT_FLOAT32:
            sums = sums.double()
        dtype = sums.dtype
        sums.addcmul_(offsets.to(dtype), self.column_sums.to(dtype))
        out = sums.mul_(params.scale.reshape(-1, 1).to(dtype) * self.weight_scale.to(dtype))
        return out if self.bias is None else out.add_(self.bias.detach().to(dtype))

    def beside(self, x: Tensor, simulated: SiteQuantizer) -> Iterator[tuple[Tensor, Tensor]]:
        for mine, its in zip(self.pieces(x, self.input), self.pieces(x, simulated), strict=True):
            values = fake_quantize(its.values, its.params).double()
            # in float64: a zero point far outside the codes leaves float32 no room behind the point
            wanted = values.div_(its.params.scale).round_().add_(its.params.zero_point).int()
            yield self.codes_of(mine), wanted if self.window is None else wanted.transpose(1, 2)


def takes_rows(quantizer: SiteQuantizer) -> bool:
    """Whether the positions of a layer's input are grouped, at every call."""
    return quantizer.groups is not None and all(axis is Axis.POSITION for axis, _ in quantizer.groups.rows())
