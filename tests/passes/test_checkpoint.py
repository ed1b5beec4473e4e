"""The mark of a checkpoint: everything that a result depends on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halftone.passes import checkpoint
from halftone.trajectory import Trajectory


def test_code_and_packages_are_part_of_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    trajectory = Trajectory(torch.randn(2, 1, 3, 4, 4), torch.tensor([9, 1]), torch.tensor([2.0, 0.1]), {})
    given = nn.Linear(2, 2), trajectory, {"seed": 0}
    marks = {checkpoint.fingerprint(*given)}
    assert checkpoint.fingerprint(*given) in marks
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "code_hash", lambda start: f"another {start}")
        marks.add(checkpoint.fingerprint(*given))
    with monkeypatch.context() as patch:
        patch.setattr("diffusers.__version__", "0.0.0")
        marks.add(checkpoint.fingerprint(*given))
    assert len(marks) == 3
