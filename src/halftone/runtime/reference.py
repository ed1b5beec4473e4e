"""Exact integer products, the oracle of every other kernel: slow, on any device, at any width.

Sums run in float64 over whole numbers. A product of two 16-bit codes lies below 2^32, so a sum of up to
2^21 of them stays below 2^53 at every step and in every order: each partial sum is exact, and float64 is an
integer type that every device has fast kernels for. Scales and bias are applied in float64 after the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from halftone.runtime.operands import Affine, Geometry, Weight, spread

EXACT_FLOAT64 = 2**53


class ReferenceProduct:
    """A Linear (no geometry) or Conv2d over codes, see `halftone.runtime.operands.Product`; float64 out.

    Any zero point will do, also one outside the codes. Raises ValueError where a sum could leave 2^53.
    """

    def __init__(self, weight: Weight, geometry: Geometry | None = None) -> None:
        self.weight, self.geometry = weight, geometry
        self._largest = int(weight.steps().abs().max()) * weight.terms

    def accumulate(self, codes: Tensor, affine: Affine) -> Tensor:
        if self._largest * affine.reach >= EXACT_FLOAT64:
            raise ValueError(f"sums of {self.weight.terms} products could exceed 2^53")
        whole = codes.double() - affine.zero_point
        weight = self.weight.steps().double()
        if self.geometry is None:
            return functional.linear(whole, weight)
        how = self.geometry
        return functional.conv2d(whole, weight, None, how.stride, how.padding, how.dilation, how.groups)

    def __call__(self, codes: Tensor, affine: Affine, bias: Tensor | None = None) -> Tensor:
        along = spread(self.geometry)
        scale = self.weight.scale.double() * affine.scale.double()
        out = self.accumulate(codes, affine).mul_(scale.reshape(along))
        return out if bias is None else out.add_(bias.double().reshape(along))


def batched(left: Tensor, right: Tensor, largest: float) -> Tensor:
    """Exact (batch, m, k) x (batch, k, n) of whole numbers in a float type; `largest` bounds every sum of
    magnitudes.

    Raises ValueError where the sums could leave 2^53.
    """
    if largest >= EXACT_FLOAT64:
        raise ValueError("sums of products could exceed 2^53")
    return torch.bmm(left.double(), right.double())
