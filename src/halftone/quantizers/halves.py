"""Parameters of two halves of an axis, each half with its own: compact (one entry a half) and expanded (one
an index, which broadcasts). Q-Diffusion's split of concatenated shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor

from halftone.quantizers.granularity import PerGroup


def labels(split: int, size: int) -> PerGroup:
    """Groups of an activation's channels (axis 1): 0 before `split`, 1 from there on.

    Raises ValueError unless 0 < split < size.
    """
    _check(split, size)
    return PerGroup(1, (0,) * split + (1,) * (size - split))


def expand(pair: Tensor, split: int, size: int) -> Tensor:
    """(n, 2, ...) -> (n, size, ...): the first entry `split` times, then the second.

    Raises ValueError unless 0 < split < size.
    """
    _check(split, size)
    return pair.repeat_interleave(torch.tensor([split, size - split], device=pair.device), dim=1)


def compact(values: Tensor, split: int, axis: int = 1) -> Tensor:
    """The inverse of `expand`: one entry of each half."""
    return values.index_select(axis, torch.tensor([0, split], device=values.device))


def _check(split: int, size: int) -> None:
    if not 0 < split < size:
        raise ValueError(f"split {split}: must fall inside the {size} channels")
