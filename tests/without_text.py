"""A tiny, untrained model without text, which is smaller than one with."""

from __future__ import annotations

from pathlib import Path

import torch

from halftone.scenes import uncond


def tiny(home: Path) -> Path:
    """Its folder, in `home`; seeded, 32x32 images."""
    torch.manual_seed(0)
    folder = home / "tiny"
    uncond.save(uncond.assemble(uncond.build((8, 8, 8))), folder)
    return folder
