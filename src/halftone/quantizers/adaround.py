"""Learned rounding of weights: a soft choice, per weight, between the step below and the step above.

The soft choice is a stretched sigmoid h(alpha) in [0, 1]; a regulariser drives it to 0 or 1 (AdaRound; BRECQ
trains it block by block, with the output error of a whole block as the objective).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halftone.quantizers.affine import AffineParams

GAMMA, ZETA = -0.1, 1.1
"""The sigmoid is stretched to (GAMMA, ZETA) and clamped, so that 0 and 1 are reached at finite alpha."""


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha) in [0, 1], of the shape of `alpha`."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def alpha_for(rest: Tensor) -> Tensor:
    """The alpha with h(alpha) = `rest`, for `rest` in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)


def softened(alpha: Tensor, softness: float) -> Tensor:
    """`alpha` with h(alpha) kept within [softness, 1 - softness], for a softness in 0..1/2.

    A choice that has arrived at 0 or 1 lies where h is clamped and has no gradient: learned on from there, it
    stays whatever the data say. 0 leaves every alpha as it is.
    """
    if not softness:
        return alpha
    low, high = alpha_for(torch.tensor([softness, 1 - softness])).tolist()
    return alpha.clamp(low, high)


def beta_at(iteration: int, iterations: int, warmup: float, start: float = 20.0, end: float = 2.0) -> float:
    """Exponent of the regulariser: `start` during the warm-up, then falling linearly to `end` at
    `iterations`.

    `warmup` is a share of the iterations. Raises ValueError unless 0 <= warmup <= 1.
    """
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup {warmup}: must be a share in 0..1")
    begin = warmup * iterations
    if iteration <= begin:
        return start
    return end + (start - end) * max(0.0, 1 - (iteration - begin) / (iterations - begin))


class SoftRounding(nn.Module):
    """Codes of one weight with a trainable choice of rounding; `alpha`, of the weight's shape, is the only
    parameter.

    Starts at the full-precision weight: h(alpha) is the fraction that rounding down would drop, so
    `soft_weight` equals the weight wherever it lies inside the codes. Weights with equal fractions on equal
    inputs have equal gradients and cannot part ways; a positive `noise` adds that standard deviation of
    normal noise to alpha, from a generator of its own seeded with `seed`. `alpha`: to start from instead.
    """

    floor: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        params: AffineParams,
        *,
        noise: float = 0.0,
        seed: int = 0,
        alpha: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.low, self.high = params.low, params.high
        steps = weight.detach().float() / params.scale
        floor = steps.floor()
        given, alpha = alpha, alpha_for(steps - floor)
        if given is not None:
            alpha = given.to(alpha.device, copy=True)
        elif noise:
            generator = torch.Generator().manual_seed(seed)
            alpha = alpha + noise * torch.randn(alpha.shape, generator=generator).to(alpha.device)
        self.alpha = nn.Parameter(alpha)
        self.register_buffer("floor", floor)
        self.register_buffer("scale", params.scale)
        self.register_buffer("zero_point", params.zero_point)

    def soft_weight(self) -> Tensor:
        """The weight as softly rounded, float32, differentiable in alpha except where the code is clamped."""
        steps = self.floor + rectified_sigmoid(self.alpha) + self.zero_point
        return (steps.clamp(self.low, self.high) - self.zero_point) * self.scale

    @torch.no_grad()
    def hard_codes(self) -> Tensor:
        """The codes chosen, int32: the step above where alpha >= 0, that is h >= 1/2."""
        steps = self.floor + (self.alpha >= 0) + self.zero_point
        return steps.clamp(self.low, self.high).to(torch.int32)

    def regulariser(self, beta: float) -> Tensor:
        """Sum over the weights of 1 - |2h - 1|^beta: scalar; a choice costs 1 while open, 0 once made."""
        return (1 - (2 * rectified_sigmoid(self.alpha) - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def polarisation(self) -> float:
        """Mean of min(h, 1 - h): 0 when every choice is made, 1/2 when none is."""
        h = rectified_sigmoid(self.alpha)
        return float(torch.minimum(h, 1 - h).mean())
