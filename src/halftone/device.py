"""Where models run."""

from __future__ import annotations

import torch


def best() -> torch.device:
    """A CUDA device where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
