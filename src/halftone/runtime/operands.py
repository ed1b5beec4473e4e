"""What an integer product is made of: codes of an activation, codes of a weight, the geometry of a layer.

Every kernel computes the same thing: sums of (code - zero point) x (weight code - its zero point) in
integers, times both scales, plus the bias. Codes are those of `halftone.quantizers.affine`, division and
rounding alike, so that simulated and integer execution of one tensor hold the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from halftone.errors import UserError
from halftone.quantizers.affine import AffineParams

EXACT_FLOAT32 = 2**24
"""Below it float32 holds every whole number."""
BAND = 24
"""Octaves of one exact product: 2^24, times 16 bits of a value, over 2^13 keys adds up to 2^53."""
_BYTE_SHIFT = 128  # a cast to int8 is several times faster than one to uint8


class Affine(NamedTuple):
    """Parameters of one activation tensor: float32 scale of no dimensions, zero point, width of the codes."""

    scale: Tensor
    zero_point: int
    bits: int

    @property
    def high(self) -> int:
        """Highest code; the lowest is 0."""
        return 2**self.bits - 1

    @property
    def reach(self) -> int:
        """Largest magnitude of code - zero point."""
        return max(abs(self.zero_point), abs(self.high - self.zero_point))


@dataclass(frozen=True, eq=False)
class Weight:
    """Integer codes (out, in, ...) with a float32 scale and a whole zero point per output channel, (out,)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def steps(self) -> Tensor:
        """Codes minus zero points, int32, of the shape of the codes."""
        shape = (-1,) + (1,) * (self.codes.ndim - 1)
        return self.codes.to(torch.int32) - self.zero_point.to(torch.int32).reshape(shape)

    @property
    def terms(self) -> int:
        """Products in one sum."""
        return self.codes[0].numel()


@dataclass(frozen=True)
class Geometry:
    """How a Conv2d slides; padding stands for the real value 0, so for the code that is the zero point."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def geometry_of(layer: nn.Module) -> Geometry | None:
    """None for a Linear. Raises ValueError for a convolution that pads with anything but zeros."""
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"padding {layer.padding!r} of mode {layer.padding_mode!r}")
    return Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)


def spread(how: Geometry | None) -> tuple[int, ...]:
    """Shape that lays values of output channels along those of a layer's output."""
    return (-1,) if how is None else (-1, 1, 1)


class Operand(NamedTuple):
    """Whole numbers of a batched product, and what they stand for: values are scale x steps.

    scale: float32, () or (rows, 1, 1); of an axis that the product keeps, (n, 1) or (1, n). reach: largest
    magnitude of a step. most: bound of the sum of a row's. octaves: how many, of steps that are powers of
    two; 0 of others. In every `BAND` of them steps are whole multiples of the smallest. inner: further
    factors, of the axis that the product sums over, (k,).
    """

    steps: Tensor
    scale: Tensor
    reach: int
    most: float
    octaves: int = 0
    inner: Tensor | None = None

    def turned(self) -> Operand:
        """The two last axes exchanged."""
        scale = self.scale if self.scale.ndim == 0 else self.scale.transpose(-2, -1)
        return self._replace(steps=self.steps.transpose(1, 2), scale=scale)


class Product(Protocol):
    """One weight, made ready for a kernel."""

    def __call__(self, codes: Tensor, affine: Affine, bias: Tensor | None = None) -> Tensor:
        """Both scales times the sums of `accumulate`, plus bias (out,): the layer's output, as a float.

        codes: (..., in) for a Linear, (batch, in, height, width) for a Conv2d.
        """
        ...

    def accumulate(self, codes: Tensor, affine: Affine) -> Tensor:
        """Sums of (code - zero point) x (weight code - its zero point): whole numbers in a float type."""
        ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a type are computed in: float32 at least, float64 where they are."""
    return torch.promote_types(dtype, torch.float32)


def whole(x: Tensor, affine: Affine) -> Tensor:
    """Code - zero point of every value: whole numbers in float32 (of float64: in float64). NaN stays NaN."""
    low, high = -affine.zero_point, affine.high - affine.zero_point
    values = x.detach().to(wide(x.dtype))
    # in the type of the values: a scale without dimensions would not widen a quotient by itself
    return values.div(affine.scale.to(values.dtype)).round_().clamp_(low, high)


def check_nan(steps: Tensor, site: str) -> None:
    """Raises UserError for NaN among what `whole` gave."""
    # the clamp has taken infinities, as the codes are defined; only NaN is left to spoil a sum
    if steps.sum().isnan():
        raise UserError(f"{site}: holds NaN, which has no code; try more bits, or run the model in float32")


def encode(x: Tensor, affine: Affine, site: str = "tensor") -> Tensor:
    """Codes of `x`: uint8 up to 8 bits, int32 above. Raises UserError for NaN."""
    steps = whole(x, affine)
    check_nan(steps, site)
    return _stored(steps, affine.zero_point, affine.bits)


def encode_each(x: Tensor, params: AffineParams, site: str) -> Tensor:
    """The same with parameters that broadcast against `x`, of any whole zero points."""
    codes = codes_each(x, params)
    check_nan(codes, site)
    return _stored(codes, 0, params.bits)


def codes_each(x: Tensor, params: AffineParams) -> Tensor:
    """Codes as whole numbers in the type that `x` is computed in. NaN stays NaN."""
    values = x.detach().to(wide(x.dtype))
    steps = values.div(params.scale.to(values.dtype)).round_()
    return steps.add_(params.zero_point.to(values.dtype)).clamp_(params.low, params.high)


def _stored(steps: Tensor, zero_point: int, bits: int) -> Tensor:
    """Steps, which are lost, + zero point as integers."""
    if bits > 8:
        return steps.add_(zero_point).to(torch.int32)
    return steps.add_(zero_point - _BYTE_SHIFT).to(torch.int8).view(torch.uint8).bitwise_xor_(_BYTE_SHIFT)
