"""What calibration found of a site, compared field by field."""

from __future__ import annotations

import torch
from torch import Tensor

from halftone.passes.state import SiteParameters


def held(parameters: SiteParameters) -> dict[str, Tensor]:
    """The fields that this site has."""
    return {name: value for name, value in parameters._asdict().items() if value is not None}


def equal(one: SiteParameters, other: SiteParameters) -> bool:
    first, second = held(one), held(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
