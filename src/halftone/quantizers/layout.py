"""Where the channels and the positions of a site's tensor lie, so that their indices can be told apart.

| tensor | channels | positions |
| --- | --- | --- |
| input of a Linear (batch, ..., C) | C | tokens, all axes between |
| q, k, v (batch * heads, n, d) | d, shared by the heads | tokens, shared by the heads |
| input of a Conv2d, unfolded (batch, C * taps, n) | channel and tap | output positions |

A 1x1 convolution that visits every pixel needs no unfolding. Vectors (batch, C) have no positions and are not
grouped. (DGQ.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from halftone.quantizers.groups import Axis
from halftone.quantizers.unfolded import Window, window_of

Ends = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """channels: of a convolution, where they are axis 1 and not the last. window: of one to be unfolded."""

    channels: int | None = None
    window: Window | None = None

    @property
    def convolution(self) -> bool:
        return self.channels is not None

    @property
    def last(self) -> Axis:
        """The axis that DGQ calls the last: it is grouped only if its extremes differ strictly more."""
        return Axis.POSITION if self.convolution else Axis.CHANNEL

    def unfolded(self, axis: Axis, length: int) -> bool:
        """Whether groups of an axis of this length are groups of the unfolded tensor."""
        return self.window is not None and (axis is Axis.POSITION or length != self.channels)

    def direct(self) -> Layout:
        """The tensor as it is: all taps of a channel alike."""
        return replace(self, window=None)

    def rows(self, x: Tensor) -> Tensor:
        """x with all positions in one axis: (batch, C, n) of a convolution, else (batch, n, C)."""
        return x.flatten(2) if self.convolution else x.flatten(1, -2)

    def positions(self, x: Tensor) -> int:
        """Of a tensor that is not unfolded."""
        return self.rows(x).shape[-1 if self.convolution else -2]

    def along(self, axis: Axis, values: Tensor) -> Tensor:
        """Values of every index of an axis, in the shape that broadcasts against `rows`."""
        return values[:, None] if (axis is Axis.CHANNEL) == self.convolution else values[None]

    def extremes(self, x: Tensor) -> dict[Axis, Ends]:
        """Lowest and highest value at every channel and at every position, each (n,) float32."""
        if self.window is not None:
            channels, positions = self.window.row_extremes(x), self.window.column_extremes(x)
        else:
            rows = self.rows(x)
            inner, outer = ((0, 2), (0, 1)) if self.convolution else ((0, 1), (0, 2))
            channels = rows.amin(inner), rows.amax(inner)
            positions = rows.amin(outer), rows.amax(outer)
        return {
            axis: (lo.float(), hi.float())
            for axis, (lo, hi) in ((Axis.CHANNEL, channels), (Axis.POSITION, positions))
        }


def layout_of(layer: nn.Module) -> Layout | None:
    """Of a layer's input; None for a convolution whose input cannot be unfolded."""
    if not isinstance(layer, nn.Conv2d):
        return Layout()
    window = window_of(layer)
    if window is None:
        return None
    return Layout(layer.in_channels, None if window.plain else window)
