"""The contracted axis of a layer in parts with parameters of their own, one product each: the halves of a
concatenated shortcut, or groups of channels that all calls share.

Sums over parts are added as floats, in the order of the parts, whoever makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halftone.layers import WeightCodes
from halftone.quantizers.groups import Axis
from halftone.runtime.operands import Weight
from halftone.site_quantizer import SiteQuantizer


@dataclass(frozen=True, eq=False)
class Parts:
    """Where an axis is cut, () for nowhere, after its indices were put into `order` (n,), None as they lie.

    columns: of the parameters as their quantizer holds them, the one of each part; split: whether the weight
    has parameters for each part as well.
    """

    ends: tuple[int, ...] = ()
    order: Tensor | None = None
    columns: tuple[int, ...] = (0,)
    split: bool = False

    def ordered(self, x: Tensor, axis: int) -> Tensor:
        return x if self.order is None else x.index_select(axis, self.order.to(x.device))

    def cut(self, x: Tensor, axis: int) -> list[Tensor]:
        """A tensor whose indices are in order already, in its parts."""
        return [x] if not self.ends else list(x.tensor_split(self.ends, dim=axis))

    def of_weight(self, weight: WeightCodes) -> list[Weight]:
        """A weight as its parts along the input channels (axis 1), each with one scale per output channel."""
        flat = [values.reshape(weight.codes.shape[0], -1) for values in (weight.scale, weight.zero_point)]
        codes = self.cut(self.ordered(weight.codes, 1), 1)
        columns = self.columns if self.split else (0,) * len(codes)
        return [
            Weight(part, *(values[:, column] for values in flat))
            for part, column in zip(codes, columns, strict=True)
        ]


def parts_of(quantizer: SiteQuantizer) -> Parts | None:
    """The parts of a layer's input; None where its parameters are no matter of parts: dynamic, of positions,
    of taps, or another partition at every call."""
    if quantizer.dynamic:
        return None
    if (split := quantizer.site.split) is not None:
        return Parts((split,), None, (0, split), split=True)
    groups = quantizer.groups
    if groups is None:
        return Parts() if quantizer.scale.ndim == 1 else None
    axis, labels = groups.row(0)
    if len(groups.axis) > 1 or axis is not Axis.CHANNEL or quantizer.unfolds:
        return None
    if bool((quantizer.zero_point < 0).any()):
        return None  # ranges without zero, whose steps may be any number
    sizes = torch.bincount(labels)
    ends = tuple(int(end) for end in sizes.cumsum(0)[:-1])
    return Parts(ends, labels.argsort(stable=True), tuple(range(len(sizes))))
