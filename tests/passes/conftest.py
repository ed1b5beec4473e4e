"""A short guided trajectory of the tiny pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from halftone.trajectory import Trajectory, record


@pytest.fixture(scope="session")
def trajectory(tiny_pipeline: Any) -> Trajectory:
    prompts = ["a red star", "a blue ring"]
    return record(tiny_pipeline, prompts, steps=3, guidance=5.0, resolution=16, seed=0, batch_size=2)
