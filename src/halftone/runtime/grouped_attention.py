"""Grouped q, k and v as whole numbers.

Groups of the axis that a product keeps (tokens of q and k, channels of v) are factors of its rows or columns,
those of the axis it sums over (channels of q and k, tokens of v) inner factors, which cut it into parts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from halftone.denoiser import SiteKind
from halftone.quantizers.groups import Axis
from halftone.runtime.operands import Operand, codes_each
from halftone.runtime.reference import EXACT_FLOAT64
from halftone.site_quantizer import SiteQuantizer

_MOST_REACH = 2**22 + 2**16  # of a 16-bit step, as far from zero as `fit_affine` lets a range lie
WIDEST_HEAD = EXACT_FLOAT64 // _MOST_REACH**2
"""Channels of a head whose sums float64 holds, whatever the ranges of its groups."""


def grouped_operand(x: Tensor, quantizer: SiteQuantizer) -> Operand:
    """q, k or v (rows, tokens, channels) at the present call; factors along its own axes.

    Raises UserError for another number of tokens than was calibrated.
    """
    assert quantizer.layout is not None
    assert quantizer.groups is not None
    params = quantizer.index_params(quantizer.layout.positions(x))
    steps = codes_each(x, params).sub_(params.zero_point)
    axis, _ = quantizer.groups.row(quantizer.context.slot)
    summed = Axis.POSITION if quantizer.site.kind is SiteKind.VALUE else Axis.CHANNEL
    reach = _reach(params.zero_point, params.high)
    most = float(reach * x.shape[-1])
    if axis is summed:
        return Operand(steps, params.scale.new_ones(()), reach, most, inner=params.scale.flatten())
    return Operand(steps, params.scale, reach, most)


def by_factor(left: Operand, right: Operand, product: Callable[[Operand, Operand], Tensor]) -> Tensor:
    """Product cut into parts wherever the inner factors of both operands stay the same: their whole numbers
    are multiplied, scaled by the factor of the part and added as floats."""
    inner = right.inner if left.inner is None else left.inner
    assert inner is not None
    if left.inner is not None and right.inner is not None:
        inner = inner * right.inner
    total: Tensor | None = None
    for factor in inner.unique():
        inside = (inner == factor).nonzero().flatten()
        parts = left.steps.index_select(2, inside), right.steps.index_select(1, inside)
        out = product(left._replace(steps=parts[0]), right._replace(steps=parts[1]))
        out = out.mul_(factor.to(out.dtype))
        total = out if total is None else total.add_(out)
    assert total is not None
    return total


def _reach(zero_point: Tensor, high: int) -> int:
    return int(torch.maximum(zero_point.abs(), (high - zero_point).abs()).max())
