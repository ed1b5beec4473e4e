"""A simulated layer whose input has parameters for every position: row scales of one product.

Groups of a Linear's tokens, or of the output positions of a convolution's unfolded input. With c the codes of
a row, z and s its zero point and scale, w the steps of an output channel and t their scale, an output is
s t (sum of (c - m) w + (m - z) x sum of w) + bias: the middle m of the codes stands in for every zero point,
so that one product serves all rows and no zero point needs to be a code. The weight is taken as it lies, so
the groups may be others at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from halftone.layers import QuantizedLayer, WeightCodes
from halftone.quantizers.affine import AffineParams
from halftone.quantizers.groups import Axis
from halftone.quantizers.unfolded import columns_of, window_of
from halftone.runtime.operands import EXACT_FLOAT32, Weight, codes_each
from halftone.runtime.whole import keep_float32, plain
from halftone.site_quantizer import SiteQuantizer

_KEPT = ("weight_scale", "column_sums")  # of their own types, whatever the model is cast to


class Piece(NamedTuple):
    """Some positions of an input. values: (samples, n, channels), with parameters (n, 1); of a convolution
    (samples, channels * taps, n), with (1, n)."""

    columns: slice
    values: Tensor
    params: AffineParams


class Rows(nn.Module):
    """The positions of a layer's input, and its output put together from theirs, for any kernel between.

    A convolution is unfolded band by band. The share of the zero points is added in float64 where float32
    might not hold it exactly. Buffers: weight_scale float32 and column_sums int64, (out,).
    """

    weight_scale: Tensor
    column_sums: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight: Weight) -> None:
        super().__init__()
        self.window = window_of(layer) if isinstance(layer, nn.Conv2d) else None
        steps = weight.steps().flatten(1)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("column_sums", steps.sum(1))
        self.most = int(steps.abs().sum(1).max())
        self._most_of_columns = int(self.column_sums.abs().max())

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

    def turned(self, codes: Tensor) -> Tensor:
        """What was made of the values of a piece, as (samples, n, terms)."""
        return codes if self.window is None else codes.transpose(1, 2).contiguous()

    def scaled(self, sums: Tensor, params: AffineParams, bias: Tensor | None) -> Tensor:
        """Outputs (samples, n, out), float32 or float64, of the sums of (code - middle) x step, which are
        lost."""
        middle = middle_of(params)
        offsets = middle - params.zero_point.double().reshape(-1, 1)
        if self.most * middle + float(offsets.abs().max()) * self._most_of_columns >= EXACT_FLOAT32:
            sums = sums.double()
        dtype = sums.dtype
        sums.addcmul_(offsets.to(dtype), self.column_sums.to(dtype))
        out = sums.mul_(params.scale.reshape(-1, 1).to(dtype) * self.weight_scale.to(dtype))
        return out if bias is None else out.add_(bias.detach().to(dtype))

    def joined(self, x: Tensor, outputs: Iterable[tuple[Piece, Tensor]]) -> Tensor:
        """The output for the input `x`, of its type: each piece's (samples, n, out)."""
        bands: dict[int, list[Tensor]] = {}
        for piece, out in outputs:
            out = out.to(x.dtype)
            if self.window is None:
                return out.unflatten(1, x.shape[1:-1])
            bands.setdefault(piece.columns.start, []).append(out.transpose(1, 2))
        assert self.window is not None
        found = torch.cat([torch.cat(band) for band in bands.values()], dim=2)
        return found.unflatten(2, (-1, self.window.output_width(x)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rows:
        keep_float32(self, _KEPT, lambda: super(Rows, self)._apply(fn, recurse))
        return self


class WholeRowLayer(QuantizedLayer):
    """A simulated Linear or Conv2d (without groups of its own) whose positions are grouped at every call.

    Both operands are whole numbers in a float type; its `weight` holds code - zero point.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, input: SiteQuantizer, weight: WeightCodes) -> None:
        super().__init__(layer, input)
        whole = Weight(weight.codes, weight.scale.flatten(), weight.zero_point.flatten())
        self.rows = Rows(layer, whole)
        layer.weight = nn.Parameter(whole.steps().to(layer.weight.dtype), requires_grad=False)
        self.soft_weight = self._dequantized

    def forward(self, x: Tensor) -> Tensor:
        if not plain(x, self.input):
            return super().forward(x)
        assert self.input is not None
        pieces = self.rows.pieces(x, self.input)
        return self.rows.joined(x, ((piece, self._multiplied(piece)) for piece in pieces))

    def _multiplied(self, piece: Piece) -> Tensor:
        middle = middle_of(piece.params)
        steps = self.rows.turned(codes_each(piece.values, piece.params).sub_(middle))
        exact = torch.float64 if self.rows.most * middle >= EXACT_FLOAT32 else steps.dtype
        sums = functional.linear(steps.to(exact), self.layer.weight.flatten(1).to(exact)).to(steps.dtype)
        return self.rows.scaled(sums, piece.params, self.bias)

    def _dequantized(self) -> Tensor:
        weight = self.layer.weight
        along = (-1,) + (1,) * (weight.ndim - 1)
        return weight * self.rows.weight_scale.to(weight.dtype).reshape(along)


def middle_of(params: AffineParams) -> int:
    """The code that stands in for every zero point."""
    return int(2 ** (params.bits - 1))


def takes_rows(quantizer: SiteQuantizer) -> bool:
    """Whether the positions of a layer's input are grouped, at every call."""
    return quantizer.groups is not None and all(axis is Axis.POSITION for axis, _ in quantizer.groups.rows())
