"""A convolution as a matrix product: its input unfolded into rows (channel and tap) and columns (output
positions), a value once for every tap that reads it.

A group of rows or of columns has a scale of its own (DGQ groups the unfolded input), so one pixel has as many
scales as taps read it, and the tensor must be unfolded before it is quantized. That is done chunk by chunk:
kernel x kernel copies of a batch are never in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from halftone.quantizers.affine import AffineParams, fake_quantize

CHUNK = 2**19
"""Unfolded values made at a time, unless one row of output pixels has more: as a processor's cache holds."""


@dataclass(frozen=True)
class Window:
    """What a convolution reads for each of its output positions. Padding adds zeros, which take part."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def plain(self) -> bool:
        """Whether unfolding changes nothing but the shape."""
        return self == Window((1, 1), (1, 1), (0, 0), (1, 1))

    def pad(self, x: Tensor) -> Tensor:
        high, wide = self.padding
        return functional.pad(x, (wide, wide, high, high)) if high or wide else x

    def output_size(self, high: int, wide: int) -> tuple[int, int]:
        """Rows and columns of the output for a padded input of this size."""
        sizes = zip((high, wide), self.kernel, self.stride, self.dilation, strict=True)
        rows, columns = (
            (size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in sizes
        )
        return rows, columns

    def positions(self, x: Tensor) -> int:
        """Columns of x (batch, channels, height, width) unfolded."""
        rows, columns = self.output_size(x.shape[-2] + 2 * self.padding[0], x.shape[-1] + 2 * self.padding[1])
        return rows * columns

    def output_width(self, x: Tensor) -> int:
        """Output positions in a row of pixels."""
        return self.output_size(x.shape[-2] + 2 * self.padding[0], x.shape[-1] + 2 * self.padding[1])[1]

    def row_extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of every row of x (batch, channels, height, width) unfolded, each
        (channels * taps,), without unfolding it."""
        padded = self.pad(x)
        return self._rows(padded.amin(0), torch.amin), self._rows(padded.amax(0), torch.amax)

    def column_extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same of every column, (output positions,) each."""
        padded = self.pad(x)
        return -self._columns(-padded.amin((0, 1))), self._columns(padded.amax((0, 1)))

    def _rows(self, extremes: Tensor, reduce: object) -> Tensor:
        assert callable(reduce)
        high, wide = self.output_size(*extremes.shape[-2:])
        found = []
        for row in range(self.kernel[0]):
            for column in range(self.kernel[1]):
                top, left = row * self.dilation[0], column * self.dilation[1]
                read = extremes[
                    :,
                    top : top + (high - 1) * self.stride[0] + 1 : self.stride[0],
                    left : left + (wide - 1) * self.stride[1] + 1 : self.stride[1],
                ]
                found.append(reduce(read, (1, 2)))
        return torch.stack(found, dim=1).flatten()

    def _columns(self, highest: Tensor) -> Tensor:
        pooled = functional.max_pool2d(
            highest[None, None].float(), self.kernel, self.stride, dilation=self.dilation
        )
        return pooled.flatten()

    def bands(self, x: Tensor) -> Iterator[tuple[slice, Iterator[Tensor]]]:
        """x (batch, channels, height, width) unfolded piece by piece: for each band of output positions which
        these are, and (samples, channels * taps, positions) until the batch is through."""
        padded = self.pad(x)
        high, wide = self.output_size(*padded.shape[-2:])
        line = x.shape[1] * self.taps * wide
        lines = min(high, max(1, CHUNK // line))
        samples = max(1, CHUNK // (line * high)) if lines == high else 1
        for top in range(0, high, lines):
            stop = min(top + lines, high)
            # input rows that these output rows read
            first = top * self.stride[0]
            last = (stop - 1) * self.stride[0] + self.dilation[0] * (self.kernel[0] - 1) + 1
            pieces = padded[:, :, first:last].split(samples)
            yield (
                slice(top * wide, stop * wide),
                (functional.unfold(piece, self.kernel, self.dilation, 0, self.stride) for piece in pieces),
            )

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, params: AffineParams
    ) -> Tensor:
        """The convolution of x (batch, channels, height, width), quantized as it is unfolded, with `weight`
        (out, channels / groups, *kernel): (batch, out, height, width).

        params: per row, (channels * taps, 1), or per column, (1, output positions).
        """
        out = weight.shape[0]
        matrix = weight.reshape(groups, out // groups, -1).to(x.dtype)
        bands = []
        for columns, pieces in self.bands(x):
            part = columns_of(params, columns)
            band = []
            for unfolded in pieces:
                whole = fake_quantize(unfolded, part).unflatten(1, (groups, -1))
                band.append(torch.matmul(matrix, whole).flatten(1, 2))
            bands.append(torch.cat(band).unflatten(2, (-1, self.output_width(x))))
        result = torch.cat(bands, dim=2)
        return result if bias is None else result + bias.to(x.dtype).reshape(-1, 1, 1)


def columns_of(params: AffineParams, columns: slice) -> AffineParams:
    """Of some output positions; parameters of rows, (..., 1), are those of all."""
    if params.scale.shape[-1] == 1:
        return params
    return AffineParams(params.scale[..., columns], params.zero_point[..., columns], params.bits)


def window_of(layer: nn.Conv2d) -> Window | None:
    """None for a convolution that pads with anything but zeros."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    kernel: tuple[int, int] = (layer.kernel_size[0], layer.kernel_size[1])
    return Window(kernel, layer.stride, layer.padding, layer.dilation)
