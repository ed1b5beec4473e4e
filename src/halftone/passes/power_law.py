"""Does a set of positive values follow a power law rather than an exponential one? (DAQ's question of a
softmax output: a power law is served by a log2 quantizer, anything narrower by a uniform one.)

Both laws are fitted by maximum likelihood above the same smallest value (Clauset, Shalizi and Newman). The
paper names neither the alternative nor the smallest value: the exponential and the smallest positive value
are our choice. The alternative decides much, a lognormal would always win.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


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


def likelihood_ratio(values: Tensor, smallest: float | None = None) -> float:
    """Log-likelihood under the power law minus that under the exponential; above zero the power law wins.

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
        return fit_power_law(kept, smallest).log_likelihood - fit_exponential(kept, smallest).log_likelihood
    except ValueError:
        return 0.0
