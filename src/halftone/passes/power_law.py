"""Does a set of positive values follow a power law rather than an exponential one, or another? (DAQ's
question of a softmax output: a power law is served by a log2 quantizer, anything narrower by a uniform one.)

Both laws are fitted by maximum likelihood above the same smallest value (Clauset, Shalizi and Newman). The
paper names neither the alternative nor the smallest value: the exponential and the smallest positive value
are our choice. The alternative decides much, a lognormal would always win.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from halftone.policies import Alternative


class Fit(NamedTuple):
    """A law's one parameter (exponent or rate), and the logarithm of the likelihood of the values under
    it."""

    parameter: float
    log_likelihood: float


def fit_power_law(values: Tensor, smallest: float) -> Fit:
    """Exponent of a density that falls as x^-exponent above `smallest` > 0. values: any shape, all of them
    at or above it. Raises ValueError where all values are the smallest."""
    count = values.numel()
    logs = float((values.double() / smallest).log().sum())
    if logs <= 0:
        raise ValueError("power law: all values are the same")
    exponent = 1 + count / logs
    return Fit(exponent, count * math.log((exponent - 1) / smallest) - exponent * logs)


def fit_exponential(values: Tensor, smallest: float) -> Fit:
    """Rate of a density that falls as exp(-rate x) above `smallest`; arguments and fault as
    `fit_power_law`."""
    count = values.numel()
    beyond = float((values.double() - smallest).sum())
    if beyond <= 0:
        raise ValueError("exponential: all values are the same")
    rate = count / beyond
    return Fit(rate, count * math.log(rate) - count)


def fit_half_normal(values: Tensor, smallest: float) -> Fit:
    """Standard deviation of the normal law whose upper half begins at `smallest`, as the exponential does;
    arguments and fault as `fit_power_law`."""
    variance = float((values.double() - smallest).square().mean())
    if variance <= 0:
        raise ValueError("half-normal: all values are the same")
    likelihood = values.numel() * (math.log(2 / (math.pi * variance)) - 1) / 2
    return Fit(math.sqrt(variance), likelihood)


def fit_lognormal(values: Tensor, smallest: float) -> Fit:
    """Standard deviation of the logarithms of a lognormal law, not cut off at `smallest` (our choice); fault
    as `fit_power_law`."""
    logs = (values.double() / smallest).log()
    variance = float(logs.var(unbiased=False)) if logs.numel() else 0.0
    if variance <= 0:
        raise ValueError("lognormal: all values are the same")
    likelihood = -float(logs.sum()) - logs.numel() * (math.log(2 * math.pi * variance) + 1) / 2
    return Fit(math.sqrt(variance), likelihood - logs.numel() * math.log(smallest))


_FITS = {
    Alternative.EXPONENTIAL: fit_exponential,
    Alternative.HALF_NORMAL: fit_half_normal,
    Alternative.LOGNORMAL: fit_lognormal,
}


def likelihood_ratio(
    values: Tensor, smallest: float | None = None, alternative: Alternative = Alternative.EXPONENTIAL
) -> float:
    """Log-likelihood under the power law minus that under the alternative; above zero the power law wins.

    smallest: values below it are left out, and zeros (a softmax that underflows) always; by default the
    smallest positive value. Values that are all the same favour neither: 0. The ratio stays what it is when
    values and `smallest` are multiplied by one factor.
    """
    positive = values.detach().flatten().double()
    positive = positive[positive > 0]
    if smallest is None:
        smallest = float(positive.min()) if positive.numel() else 1.0
    kept = positive[positive >= smallest]
    try:
        return (
            fit_power_law(kept, smallest).log_likelihood - _FITS[alternative](kept, smallest).log_likelihood
        )
    except ValueError:
        return 0.0
