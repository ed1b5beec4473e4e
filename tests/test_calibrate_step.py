"""The step `calibrate`: what it makes of the axes beyond what each pass is tested for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halftone.passes.state import CalibrationState
from halftone.source import Source, load_source
from halftone.steps.calibrate import calibrate
from halftone.steps.choice import choose
from halftone.steps.record import record

PROMPTS = ["a red star", "a blue ring", "a green cross"]
CALLS = 4


@pytest.fixture(scope="module")
def source(tiny_model_folder: Path) -> Source:
    return load_source(tiny_model_folder)


def calibrated(source: Source, recipe: str, bits: str, **axes: Any) -> tuple[CalibrationState, int]:
    """The state, and how often the denoiser ran."""
    trajectory, known = record(source, PROMPTS, steps=3, guidance=3.0, resolution=16, batch_size=2)
    computed: list[int] = []
    hook = source.pipeline.unet.conv_in.register_forward_hook(lambda *_: computed.append(1))
    choice = choose(recipe, bits, {"rounding": "nearest", **axes})
    state = calibrate(source, trajectory, known, choice, batch_size=2)
    hook.remove()
    assert trajectory.n_calls == CALLS
    return state, len(computed)


@pytest.mark.parametrize(
    ("recipe", "axes", "per_batch"),
    [
        ("static", {}, CALLS),
        ("pcr", {}, CALLS + 2 * CALLS),
        ("pcr", {"replay_prefix": True, "refresh_noise": True, "calibrate_last": False}, CALLS + 1 + 2 + 3),
    ],
)
def test_it_says_how_often_the_denoiser_ran(source: Source, recipe: str, axes: Any, per_batch: int) -> None:
    state, computed = calibrated(source, recipe, "w8a8", **axes)
    assert state.denoiser_calls == computed == 2 * per_batch


def test_a_recipe_with_shared_parameters_is_relaxed_on_the_same_calls(source: Source) -> None:
    axes = {"step_size": "fitted", "weight_range": "minmax", "activation_range": "minmax"}
    plain, _ = calibrated(source, "qdiffusion", "w8a6", **axes)
    relaxed, _ = calibrated(source, "qdiffusion", "w8a6", **axes, relaxing="near_x0")
    assert relaxed.relaxed_calls == (3,)
    for name, site in relaxed.activations.items():
        (shared,) = plain.activations[name].scale
        assert site.scale.shape[0] == CALLS
        assert all((site.scale[call] == shared).all() for call in range(3))
        assert ((site.scale[3] * 1023 / 63 / shared - 1).abs() < 1e-5).all()
