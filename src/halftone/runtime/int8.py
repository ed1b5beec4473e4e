"""Products of 8-bit integers by PyTorch's own oneDNN operators. Nothing else calls these operators.

They are private to PyTorch and promise nothing, so they are tried once on extreme values before they are
used. CPUs without VNNI instructions add two products in 16 bits and saturate without a word: 255 x 127 twice
is too much for them. What never saturates, on any CPU, is weights of magnitude 64 or less (all weights up to
6 bits), or 7-bit codes. There, wider codes against wider weights are taken apart into parts of 7 bits.

Codes wider than a byte are taken apart in the same way: c = c0 + 256 c1, one product each, exactly.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halftone.runtime.operands import Affine, Geometry, Weight, spread
from halftone.runtime.reference import ReferenceProduct

MOST_TERMS = 65_000  # 255 x 128 x terms must fit an int32
_HARMLESS = 64  # 2 x 255 x 64 fits 16 bits
_NARROW = 7
_MIDDLE = 128


@dataclass(frozen=True)
class Ability:
    """What the operators of this machine can be trusted with.

    usable: exact with weights up to 64, and with 7-bit codes. wide: exact with 8-bit codes and any weight.
    reason: what is missing, None if nothing.
    """

    usable: bool
    wide: bool
    reason: str | None = None


@functools.cache
def ability() -> Ability:
    """Tries the operators on the largest values there are: linear, convolution, grouped, with zero points."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        return Ability(False, False, "this PyTorch has no 8-bit operators")
    try:
        if not _exact(255, (64, -64)) or not _exact(127, (127, -128)):
            return Ability(False, False, "the 8-bit operators of this machine give wrong sums")
        if not _exact(255, (127, -128)):
            return Ability(
                True, False, "this CPU adds products in 16 bits: weights over 6 bits take two products"
            )
    except (RuntimeError, TypeError, AttributeError) as fault:
        return Ability(
            False, False, f"the 8-bit operators of this PyTorch cannot be used ({str(fault)[:80]})"
        )
    return Ability(True, True)


class Int8Product:
    """A Linear (no geometry) or Conv2d over codes of up to 16 bits and weights of up to 8; float32 out.

    See `halftone.runtime.operands.Product`. Sums are made in int32, become float32, and are scaled, then
    biased. Weights go in as code - zero point where that fits a byte. Where it does not (8-bit
    weights), they go in as code - 128, and what is missing, (128 - zero point) x the sum of (code - zero
    point), is taken from an output channel of ones. Zero points must be codes. Raises ValueError for weights
    that are too wide or too long.
    """

    def __init__(self, weight: Weight, geometry: Geometry | None = None) -> None:
        steps = weight.steps()
        if weight.terms > MOST_TERMS:
            raise ValueError(f"sums of {weight.terms} products do not fit 32 bits")
        self.geometry, self.groups = geometry, 1 if geometry is None else geometry.groups
        self.scale = weight.scale.float()
        self.rest: Tensor | None = None
        if not _fits_byte(steps):
            self.rest = (_MIDDLE - weight.zero_point).float()
            steps = weight.codes.to(torch.int32) - _MIDDLE
            if not _fits_byte(steps):
                raise ValueError("weights of more than 8 bits")
            steps = _append(steps, self.groups, 1)
        harmless = int(steps.abs().max()) <= _HARMLESS
        self.part_bits = 8 if ability().wide or harmless else _NARROW
        self._packed = _pack(steps.to(torch.int8).contiguous(), geometry)

    def accumulate(self, codes: Tensor, affine: Affine) -> Tensor:
        """float32: exact below 2^24; beyond it the nearest float32, where one product was enough."""
        return self._run(codes, affine, torch.ones_like(self.scale), None)

    def __call__(self, codes: Tensor, affine: Affine, bias: Tensor | None = None) -> Tensor:
        # one scale, made here: given two, the operator multiplies them in an order that depends on the CPU
        scale = affine.scale * self.scale
        if self.rest is None and affine.bits <= self.part_bits:
            return self._run(codes, affine, scale, bias)
        out, along = self.accumulate(codes, affine), spread(self.geometry)
        out = out.mul_(scale.reshape(along))
        return out if bias is None else out.add_(bias.reshape(along))

    def _run(self, codes: Tensor, affine: Affine, scales: Tensor, bias: Tensor | None) -> Tensor:
        if not 0 <= affine.zero_point <= affine.high:
            raise ValueError(f"zero point {affine.zero_point} is no code of {affine.bits} bits")
        if self.rest is not None:
            scales = _append(scales, self.groups, 1)  # the ones' channel comes out as its sum
        mask, total = 2**self.part_bits - 1, None
        for shift in range(0, affine.bits, self.part_bits):
            part = codes if affine.bits <= self.part_bits else (codes >> shift & mask).to(torch.uint8)
            zero_point = affine.zero_point >> shift & mask
            out = _apply(part, 2.0**shift, zero_point, self._packed, self.geometry, scales, bias)
            total = out if total is None else total.add_(out)
        return total if self.rest is None else self._corrected(total, self.rest)

    def _corrected(self, out: Tensor, factor: Tensor) -> Tensor:
        """Adds factor (out,) x the channel of ones of each group to the group's own channels."""
        if self.geometry is None:
            return torch.addcmul(out[..., :-1], out[..., -1:], factor)
        grouped = out.unflatten(1, (self.groups, -1))
        factor = factor.reshape(self.groups, -1, 1, 1)
        return torch.addcmul(grouped[:, :, :-1], grouped[:, :, -1:], factor).flatten(1, 2)


def _fits_byte(values: Tensor) -> bool:
    return int(values.min()) >= -128 and int(values.max()) <= 127


def _append(values: Tensor, groups: int, value: int) -> Tensor:
    """One more output channel (axis 0) at the end of each group, filled with `value`."""
    grouped = values.reshape(groups, -1, *values.shape[1:])
    more = grouped.new_full((groups, 1, *values.shape[1:]), value)
    return torch.cat([grouped, more], dim=1).flatten(0, 1)


def _pack(weight: Tensor, how: Geometry | None) -> Any:
    """int8 (out, in, ...) -> the operators' own layout, which cannot be copied or stored."""
    if how is None:
        return torch.ops.onednn.qlinear_prepack(weight, None)
    ones = torch.ones(weight.shape[0])
    geometry = list(how.stride), list(how.padding), list(how.dilation), how.groups
    return torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *geometry, None)


def _apply(
    codes: Tensor, scale: float, zero_point: int, packed: Any, how: Geometry | None, scales: Tensor, bias: Any
) -> Tensor:
    """Sums of (code - zero point) x weight, times scale and scales (out,), plus bias, as float32."""
    zeros = torch.zeros(scales.shape[0], dtype=torch.int64)
    begin = codes, scale, zero_point, packed, scales, zeros, bias
    end: Any = (
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )  # output scale and zero point, type, and nothing after it
    if how is None:
        return torch.ops.onednn.qlinear_pointwise(*begin, *end)
    geometry = list(how.stride), list(how.padding), list(how.dilation), how.groups
    return torch.ops.onednn.qconv2d_pointwise(*begin, *geometry, *end)


def _exact(code: int, weights: tuple[int, int]) -> bool:
    """Whether sums of `code` times either weight come out right, in kernels that differ by shape."""
    shapes = [(17, 64, 1, 0), (16, 64, 1, 3), (8, 16, 1, 1), (32, 32, 32, 3), (16, 32, 2, 3)]
    for (out, inputs, groups, size), weight, zero_point in itertools.product(shapes, weights, (0, 3)):
        pad = (size // 2, size // 2)
        how = None if size == 0 else Geometry((1, 1), pad, (1, 1), groups)
        codes = torch.full((33, inputs) if how is None else (2, inputs, 6, 6), code, dtype=torch.uint8)
        window = () if how is None else (size, size)
        filters = torch.full((out, inputs // groups, *window), weight, dtype=torch.int8)
        ones = torch.ones(out)
        found = _apply(codes, 1.0, zero_point, _pack(filters, how), how, ones, None)
        oracle = ReferenceProduct(Weight(filters, ones, torch.zeros(out)), how)
        if not torch.equal(found.double(), oracle.accumulate(codes, Affine(ones[0], zero_point, 8))):
            return False
    return True
