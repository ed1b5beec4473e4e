"""Log2 quantization of non-negative values: codes are octaves below a scale.

`code = clamp(round(-log2(x / scale)), 0, 2^bits - 1)` and `value = scale * 2^-code` (DGQ, attention
probabilities). More bits extend the range downwards and add no precision: inside it a value comes back at
0.71 to 1.41 times itself.

The logarithm is never computed. Rounding log2 means comparing the mantissa with the square root of two, which
is done on the bits of the float: faster, and the same codes on every device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halftone.quantizers.affine import SMALLEST_SCALE, check_bits

_EXPONENT_BIAS = 127
LEAST_OCTAVE = 126  # the last code that stands for a float32 above 0
_MANTISSA_BITS = 23
_EXPONENT_MASK = 0xFF << _MANTISSA_BITS
# added to the bits of a float, carries into the exponent exactly where the mantissa lies above sqrt(2) =
# 0x1.6a09e6..p0
_ROUND_UP_ABOVE_ROOT = 0x800000 - 0x3504F4


@dataclass(frozen=True, eq=False)
class Log2Params:
    """`scale`, positive float32, is the value of code 0, broadcastable against the tensor; codes are
    0..2^bits-1.

    Raises ValueError for a width outside 2..16.
    """

    scale: Tensor
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def high(self) -> int:
        """Highest code."""
        return 2**self.bits - 1

    def to(self, device: torch.device | str) -> Log2Params:
        return replace(self, scale=self.scale.to(device))


def fit_log2(hi: Tensor | float, bits: int) -> Log2Params:
    """Parameters whose code 0 is `hi`, the largest value; scales are at least 1e-8.

    Raises ValueError where `hi` is negative or not finite.
    """
    scale = torch.as_tensor(hi).detach().float()
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise ValueError("range: a largest value is negative, NaN or infinite")
    return Log2Params(scale.clamp(min=SMALLEST_SCALE), bits)


def quantize_log2(x: Tensor, params: Log2Params) -> Tensor:
    """Codes of `x`, int32, of the broadcast shape. Values above the scale get code 0.

    Zero, and any ratio to the scale below float32's normal numbers (2^-126), gets the highest code, as do
    negative values. NaN has no code and must be refused before.
    """
    exponent = _rounded_exponent(x, params) >> _MANTISSA_BITS
    codes = torch.where(exponent > 0, _EXPONENT_BIAS - exponent, params.high)
    return codes.clamp_(0, params.high)


def dequantize_log2(codes: Tensor, params: Log2Params) -> Tensor:
    """Values of integer `codes`, float32, of the broadcast shape; codes above 126 give 0."""
    exponent = (_EXPONENT_BIAS - codes.to(torch.int32)).clamp_(min=0)
    return exponent.bitwise_left_shift_(_MANTISSA_BITS).view(torch.float32) * params.scale


def fake_quantize_log2(x: Tensor, params: Log2Params) -> Tensor:
    """Values of the codes of `x`, in its dtype: bit for bit `dequantize_log2(quantize_log2(x))`.

    NaN and infinite values give NaN, so that a fault upstream stays visible. Gradients pass straight through
    where the code was not clamped, to `x` alone.
    """
    plain = x.detach().float()
    exponent = _rounded_exponent(plain, params)
    lowest, highest = max(_EXPONENT_BIAS - params.high, 0) << _MANTISSA_BITS, _EXPONENT_BIAS << _MANTISSA_BITS
    inside = None
    if torch.is_grad_enabled() and x.requires_grad:
        inside = (exponent >= lowest) & (exponent <= highest) & (exponent > 0)
    # in place: fresh memory costs more than the arithmetic. Bits carry no NaN; 0 * x does, and adds no more
    values = exponent.clamp_(lowest, highest).view(torch.float32).mul_(params.scale)
    values.addcmul_(plain, values.new_zeros(()))
    if inside is not None:
        values = values + (x.float() - plain) * inside
    return values.to(x.dtype)


def _rounded_exponent(x: Tensor, params: Log2Params) -> Tensor:
    """Biased exponent of x / scale rounded to a power of two, left in its place among a float's bits."""
    ratio = (x.float() / params.scale).clamp_(min=0)
    bits = ratio.view(torch.int32)
    return bits.add_(_ROUND_UP_ABOVE_ROOT).bitwise_and_(_EXPONENT_MASK)
