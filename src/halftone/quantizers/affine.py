"""Uniform affine quantization: codes are whole steps of a scale, shifted by a zero point.

One definition, kept by every runtime: `code = clamp(round(x / scale) + zero_point, low, high)` with a true
division and round-half-to-even, and `value = scale * (code - zero_point)`. Multiplying by the reciprocal of
the scale, as torch's fused `fake_quantize_*` kernels do, gives other codes at ties; on a CPU those kernels
are also several times slower than the in-place passes here, so they are not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halftone.quantizers.bits import HIGHEST, LOWEST

SMALLEST_SCALE = 1e-8
# float32 must hold x / scale with a binary place behind the point, or rounding means nothing
_MOST_STEPS = 2**22


@dataclass(frozen=True, eq=False)
class AffineParams:
    """Scale and zero point, each broadcastable against the tensor they quantize.

    `scale` is positive float32; `zero_point` is float32 holding whole numbers, and may lie outside the codes
    when zero lies outside the range. Codes run over 0..2^bits-1, or -2^(bits-1)..2^(bits-1)-1 when `signed`.
    Raises ValueError for a width outside 2..16.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    signed: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def low(self) -> int:
        """Lowest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Highest code."""
        return self.low + 2**self.bits - 1

    def to(self, device: torch.device | str) -> AffineParams:
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device))


def check_bits(bits: int) -> None:
    """Raises ValueError unless `bits` is a whole number in 2..16."""
    if not isinstance(bits, int) or not LOWEST <= bits <= HIGHEST:
        raise ValueError(f"bits {bits!r}: must be a whole number in {LOWEST}..{HIGHEST}")


def fit_affine(
    lo: Tensor | float, hi: Tensor | float, bits: int, *, include_zero: bool = True
) -> AffineParams:
    """Parameters whose codes span [lo, hi]; `lo` and `hi` have one shape, which the parameters keep.

    With `include_zero` the range is widened to hold zero, so that zero is exact. Scales are at least 1e-8,
    and at least max(|lo|, |hi|) / 2^22 (our choice: a narrower range far from zero cannot be told apart in
    float32), so constant and all-zero ranges give usable parameters. Values inside [lo, hi] come back within
    half a scale. Raises ValueError where a bound is not finite or lo > hi.
    """
    check_bits(bits)
    low, high = _bound(lo), _bound(hi)
    if bool((low > high).any()):
        raise ValueError("range: lo lies above hi")
    if include_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    steps = 2**bits - 1
    least = (torch.maximum(low.abs(), high.abs()) / _MOST_STEPS).clamp(min=SMALLEST_SCALE)
    span = torch.maximum(high - low, least * steps)
    # in float64 and without the rounded scale: -lo * steps / span is exact where -lo / scale would miss a tie
    zero_point = torch.round(-low * steps / span)
    return AffineParams((span / steps).float(), zero_point.float(), bits)


def fit_symmetric(absmax: Tensor | float, bits: int) -> AffineParams:
    """Signed parameters with zero point 0 and scale absmax / (2^(bits-1) - 1) (Q-Diffusion, symmetric).

    Codes clamp to the full signed range. Raises ValueError where `absmax` is negative or not finite.
    """
    check_bits(bits)
    scale = (_non_negative(absmax) / (2 ** (bits - 1) - 1)).clamp(min=SMALLEST_SCALE).float()
    return AffineParams(scale, torch.zeros_like(scale), bits, signed=True)


def fit_non_negative(hi: Tensor | float, bits: int) -> AffineParams:
    """Parameters for values in [0, hi], such as probabilities: zero point 0, scale hi / (2^bits - 1).

    Raises ValueError where `hi` is negative or not finite.
    """
    check_bits(bits)
    scale = (_non_negative(hi) / (2**bits - 1)).clamp(min=SMALLEST_SCALE).float()
    return AffineParams(scale, torch.zeros_like(scale), bits)


def quantize(x: Tensor, params: AffineParams) -> Tensor:
    """Codes of `x`, int32, of the broadcast shape.

    Infinities saturate. NaN has no code and must be refused before: it becomes an int32 outside the codes.
    """
    steps = (x.detach().float() / params.scale).round_()
    return steps.add_(params.zero_point).clamp_(params.low, params.high).to(torch.int32)


def dequantize(codes: Tensor, params: AffineParams) -> Tensor:
    """Values of integer `codes`, float32, of the broadcast shape."""
    return (codes.float() - params.zero_point).mul_(params.scale)


def fake_quantize(x: Tensor, params: AffineParams) -> Tensor:
    """Values of the codes of `x`, in its dtype: those of `dequantize(quantize(x))`, with NaN kept as NaN.

    Gradients pass straight through the rounding, and through the clamp only where the code lies inside
    (bounds included); a scale that requires gradient receives its own.
    """
    if torch.is_grad_enabled() and (x.requires_grad or params.scale.requires_grad):
        return _fake_quantize_with_gradient(x, params)
    values = (x.float() / params.scale).round_()
    zero_point = params.zero_point
    if zero_point.numel() == 1 and zero_point.device.type == "cpu":
        # clamping before the shift saves two passes; the same, for these whole numbers are exact in float32
        offset = zero_point.item()
        values.clamp_(params.low - offset, params.high - offset)
    else:
        values.add_(zero_point).clamp_(params.low, params.high).sub_(zero_point)
    return values.mul_(params.scale).to(x.dtype)


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def _fake_quantize_with_gradient(x: Tensor, params: AffineParams) -> Tensor:
    steps = _RoundStraightThrough.apply(x.float() / params.scale)
    codes = steps + params.zero_point
    # torch.clamp stops gradients at the bounds themselves, where the code was not changed
    inside = (codes >= params.low) & (codes <= params.high)
    codes = torch.where(inside, codes, codes.detach().clamp(params.low, params.high))
    return ((codes - params.zero_point) * params.scale).to(x.dtype)


def _bound(value: Tensor | float) -> Tensor:
    bound = torch.as_tensor(value).detach().double()
    if not bool(torch.isfinite(bound).all()):
        raise ValueError("range: a bound is NaN or infinite")
    return bound


def _non_negative(value: Tensor | float) -> Tensor:
    bound = _bound(value)
    if bool((bound < 0).any()):
        raise ValueError("range: a largest magnitude is negative")
    return bound
