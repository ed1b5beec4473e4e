"""Every preset: through the whole chain on a tiny model, and read back from its artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import halftone
from halftone.artefact import info, verify
from halftone.axes import Axes
from halftone.plan import Plan
from halftone.policies import Shortcut, StepSize, TimeAxis
from halftone.recipes import PRESETS, resolve

PROMPTS = ["a small red star on a plain grey background", "a large blue ring on a plain grey background"]
HOW: dict[str, Any] = {"steps": 3, "guidance": 3.0, "resolution": 16, "budget": "smoke", "batch_size": 2}
CHEAPER: dict[str, Any] = {"tcaq": {"rounds": 2}}


@pytest.mark.parametrize("recipe", sorted(PRESETS.keys() - {"minmax", "static"}))
def test_a_preset_goes_through_the_chain_and_draws(
    recipe: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    axes = CHEAPER.get(recipe)
    folder = halftone.quantize(
        str(tiny_model_folder), recipe, PROMPTS, tmp_path / "out", bits="w4a6", axes=axes, **HOW
    )
    assert all(check.passed for check in verify(folder))
    assert info(folder)["recipe"] == recipe
    plan = Plan.load(folder / "plan.json")
    assert plan.axes == resolve(recipe, axes)
    assert plan.relaxed_calls == ((3,) if recipe == "pcr" else ())
    split = {site.kind for site in plan.sites if site.split is not None}
    assert split == ({"input", "weight"} if plan.axes.shortcut is Shortcut.SPLIT else set())
    images = halftone.load(folder)(
        PROMPTS, num_inference_steps=3, guidance_scale=3.0, height=16, width=16, output_type="np"
    ).images
    assert np.isfinite(images).all()


def test_progressive_calibration_is_an_axis_of_any_per_call_recipe(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    axes = {"calibration_inputs": "progressive", "rounding": "nearest"}
    kwargs = {"bits": "w4a4", "axes": axes, **HOW}
    folder = halftone.quantize(str(tiny_model_folder), "static", PROMPTS, tmp_path / "out", **kwargs)
    other = {**axes, "calibration_inputs": "reference"}
    plain = halftone.quantize(
        str(tiny_model_folder), "static", PROMPTS, tmp_path / "plain", **{**kwargs, "axes": other}
    )
    verify(folder)
    name = "unet/quantized.safetensors"
    assert (folder / name).read_bytes() != (plain / name).read_bytes()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"step_size": "learned", "time_axis": "per_call"}, "learns shared parameters"),
        ({"calibration_calls": "normal", "time_axis": "per_call"}, "calibration_calls: all"),
        ({"temporal_block": "apart"}, "nothing is learned"),
        ({"calibration_inputs": "progressive"}, "fits call by call"),
        ({"calibrate_last": False}, "calibration_inputs: progressive"),
        (
            {"calibration_inputs": "progressive", "time_axis": "per_call", "refresh_noise": True},
            "replay_prefix: true",
        ),
        ({"shortcut": "split", "time_axis": "dynamic"}, "needs stored parameters"),
        ({"colour": "red"}, "colour"),
        ({"rounds": True}, "valid integer"),
        ({"groups": "8"}, "valid integer"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=message):
        resolve("minmax", axes)


def test_an_axis_of_a_preset_can_be_overridden() -> None:
    axes = resolve("qdiffusion", {"step_size": "fitted"})
    assert axes.step_size is StepSize.FITTED
    assert axes.shortcut is Shortcut.SPLIT


def test_neutral_is_the_plainest_quantizer() -> None:
    assert PRESETS["minmax"] == Axes()
    assert Axes().time_axis is TimeAxis.SHARED


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"groups": 16, "time_axis": "dynamic"}, "groups: need stored parameters"),
        ({"groups": 16, "shortcut": "split"}, "write shortcut: whole"),
        ({"groups": 16, "step_size": "learned"}, "write step_size: fitted"),
        ({"groups": 33}, "less than or equal to 32"),
        ({"groups": 0}, "greater than or equal to 1"),
        ({"group_axis": "channel"}, "there is one group"),
        ({"group_layout": "aligned"}, "there is one group"),
        ({"groups": 4, "group_layout": "aligned", "group_axis": "position"}, "write group_axis: channel"),
        ({"legacy_lookup": True}, "write time_axis: per_call"),
        ({"legacy_lookup": True, "time_axis": "per_call", "relaxing": "near_x0"}, "relaxing: none"),
    ],
)
def test_groups_that_contradict_other_axes_are_refused(axes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve("minmax", axes)


def test_plans_of_recipes_without_groups_do_not_speak_of_them() -> None:
    said = resolve("static").model_dump(mode="json")
    assert not {"groups", "group_axis", "group_layout", "legacy_lookup"} & said.keys()
    assert resolve("static", {"groups": 8}).model_dump(mode="json")["groups"] == 8
