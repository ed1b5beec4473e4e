"""Learned rounding of one unit's weights: AdaRound on the output error of a whole block (BRECQ).

Activations stay in float meanwhile, as in Q-Diffusion. The unit is run with substituted weights and is not
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from halftone.errors import UserError
from halftone.passes.schedule import Schedule
from halftone.passes.unit_data import UnitData, tensors_of
from halftone.quantizers.adaround import SoftRounding, beta_at, softened
from halftone.quantizers.affine import AffineParams, dequantize, quantize

TIE_NOISE = 1e-3
"""Standard deviation of the noise on alpha: weights on a half grid could not part ways without (our
choice).
"""
_CHECK_EVERY = 50


@dataclass(frozen=True)
class Learned:
    """Codes (int32) by parameter name, and how well they do.

    `mse_before` and `mse_after` are mean squared errors of the unit's output with the codes it began with,
    nearest ones in the first round, and with learned rounding; `alpha` holds the soft choices;
    `polarisation` is the mean of min(h, 1 - h) over all weights before h was made hard (0 is best).
    """

    codes: dict[str, Tensor]
    mse_before: float
    mse_after: float
    polarisation: float
    alpha: dict[str, Tensor]

    @property
    def keeps_first(self) -> bool:
        """Learning did not help, so the codes are those it began with: never worse."""
        return not self.mse_after < self.mse_before


@dataclass(frozen=True)
class Begun:
    """Where a round before left off: codes and soft choices by parameter name."""

    codes: Mapping[str, Tensor]
    alpha: Mapping[str, Tensor]


def learn(
    unit: nn.Module,
    params: Mapping[str, AffineParams],
    data: UnitData,
    schedule: Schedule,
    batch_size: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
    begun: Begun | None = None,
) -> Learned:
    """Learn how to round the weights of `unit` named in `params` (parameter name -> scale and zero point).

    The objective is the squared error to the full-precision output, summed over dimension 1 and averaged
    over the others, plus `rounding_weight` times the summed regulariser after the warm-up (BRECQ).
    `advance` is called after every iteration. `begun`: the soft choices go on from there, at least the
    schedule's softness away from 0 and 1.
    Deterministic for a seed. Raises UserError where the error is not finite.
    """
    weights = {name: unit.get_parameter(name).detach() for name in params}
    if begun is None:
        first = {name: quantize(weights[name], params[name]) for name in params}
    else:
        first = {name: begun.codes[name].to(weights[name].device, torch.int32) for name in params}
    mse_before = _mse(unit, _values(first, params, weights), data, batch_size)
    alpha = {}
    if begun is not None:
        alpha = {name: softened(begun.alpha[name], schedule.softness) for name in params}
    soft = {
        name: SoftRounding(
            weights[name], params[name], noise=TIE_NOISE, seed=seed + place, alpha=alpha.get(name)
        )
        for place, name in enumerate(params)
    }
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, schedule.batch_limit, data.count)
    optimizer = torch.optim.Adam([one.alpha for one in soft.values()], lr=schedule.learning_rate)
    order = torch.empty(0, dtype=torch.long)
    for iteration in range(1, schedule.iterations + 1):
        if len(order) < size:
            order = torch.randperm(data.count, generator=generator)
        rows, order = order[:size].tolist(), order[size:]
        arguments, targets = data.batch(rows)
        now = {name: one.soft_weight().to(weights[name].dtype) for name, one in soft.items()}
        outputs = tensors_of(functional_call(unit, now, *arguments))
        error = sum(
            (_error(out, target) for out, target in zip(outputs, targets, strict=True)), torch.zeros(())
        )
        loss = error.to(torch.float32)
        if iteration >= schedule.warm_up * schedule.iterations:
            beta = beta_at(
                iteration, schedule.iterations, schedule.warm_up, schedule.beta_start, schedule.beta_end
            )
            for one in soft.values():
                loss = loss + schedule.rounding_weight * one.regulariser(beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % _CHECK_EVERY == 0:
            _finite(float(error.detach()), data)
        advance()
    codes = {name: one.hard_codes() for name, one in soft.items()}
    mse_after = _mse(unit, _values(codes, params, weights), data, batch_size)
    total = sum(weight.numel() for weight in weights.values())
    polarisation = sum(one.polarisation() * weights[name].numel() for name, one in soft.items()) / total
    chosen = {name: one.alpha.detach().cpu() for name, one in soft.items()}
    learned = Learned(codes, mse_before, mse_after, polarisation, chosen)
    if not learned.keeps_first:
        return learned
    return replace(learned, codes=first, alpha=chosen if begun is None else dict(begun.alpha))


def _error(output: Tensor, target: Tensor) -> Tensor:
    squared = (output.float() - target).square()
    return squared.sum(1).mean() if squared.ndim > 1 else squared.mean()


def _values(
    codes: Mapping[str, Tensor], params: Mapping[str, AffineParams], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {name: dequantize(codes[name], params[name]).to(weights[name].dtype) for name in codes}


@torch.no_grad()
def _mse(unit: nn.Module, weights: dict[str, Tensor], data: UnitData, batch_size: int) -> float:
    squares, count = 0.0, 0
    for start in range(0, data.count, batch_size):
        arguments, targets = data.batch(range(start, min(start + batch_size, data.count)))
        outputs = tensors_of(functional_call(unit, weights, *arguments))
        for output, target in zip(outputs, targets, strict=True):
            squares += float((output.float() - target).square().sum(dtype=torch.float64))
            count += target.numel()
    _finite(squares, data)
    return squares / count


def _finite(value: float, data: UnitData) -> None:
    if not abs(value) < float("inf"):
        raise UserError(
            f"{data.signature.unit}: its output error is not finite with quantized weights; run the model in "
            "float32, or choose rounding nearest"
        )
