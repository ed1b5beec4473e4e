"""`quantize`, from a pipeline or a folder to an artefact, in one call."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import halftone
from halftone.artefact import info
from halftone.cli import main
from halftone.errors import UserError
from halftone.files import sha256
from halftone.plan import Plan
from halftone.recipes import resolve

PROMPTS = ["a small red star on a plain grey background", "a large blue ring on a plain grey background"]
HOW: dict[str, Any] = {"steps": 3, "guidance": 3.0, "resolution": 16, "budget": "smoke", "batch_size": 2}


@pytest.fixture(scope="module")
def artefact(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("chain") / "artefact"
    return halftone.quantize(str(tiny_model_folder), "static", PROMPTS, output, bits="w4a8", **HOW)


def test_the_artefact_loads_and_draws(artefact: Path) -> None:
    pipeline = halftone.load(artefact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = pipeline(
            PROMPTS, num_inference_steps=3, guidance_scale=3.0, height=16, width=16, output_type="np"
        ).images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


def test_it_says_how_it_was_made(artefact: Path, tiny_model_folder: Path) -> None:
    facts = info(artefact)
    known = facts["provenance"]
    assert (facts["recipe"], facts["weight_bits"], facts["act_bits"]) == ("static", 4, 8)
    assert (known["n_prompts"], known["steps"], known["model_path"]) == (2, 3, str(tiny_model_folder))


def test_what_the_command_line_switches_off_stays_off(
    artefact: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"reparameterization": "none", "probabilities": "uniform", "rounds": 1}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["quantize", str(tiny_model_folder), "--recipe", "tcaq", "--bits", "w6a6"]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--n-prompts", "2", "--axes", json.dumps(axes)]
    words += ["--steps", "2", "--resolution", "16", "--budget", "smoke", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    assert Plan.load(tmp_path / "out/plan.json").axes == resolve("tcaq", axes)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^budget +smoke$", said, re.M)
    departs = "reparameterization none, reparameterization_floor 0.0, rounds 1, probabilities uniform"
    assert re.search(rf"^axes +{departs}$", said, re.M)
    assert main(["compare", str(artefact), str(tmp_path / "out")]) == 0
    differs = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("differs")]
    assert {"recipe", "axes/activation_range", "provenance/steps"} <= set(differs)
    assert not {"axes/rounds", "protocol", "provenance/seed"} & set(differs)


@pytest.mark.parametrize(("place", "message"), [("taken", "is not an artefact"), ("taken/x", "cannot write")])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_spent(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr("halftone.chain.record", None)
    with pytest.raises(UserError, match=message):
        halftone.quantize(str(tiny_model_folder), "static", PROMPTS, tmp_path / place, **HOW)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_nothing_is_left_beside_it(artefact: Path) -> None:
    assert [path.name for path in artefact.parent.iterdir()] == ["artefact"]


def test_the_same_call_gives_the_same_bytes(artefact: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    again = halftone.quantize(
        str(tiny_model_folder), "static", PROMPTS, tmp_path / "again", bits="w4a8", **HOW
    )
    assert sha256(again) == sha256(artefact)


def test_a_pipeline_in_memory_is_handed_back_as_it_was(fresh_pipeline: Any, tmp_path: Path) -> None:
    before = copy.deepcopy(fresh_pipeline.unet.state_dict())
    processors = {name: type(p) for name, p in fresh_pipeline.unet.attn_processors.items()}
    output = halftone.quantize(fresh_pipeline, "minmax", PROMPTS, tmp_path / "artefact", bits="w8a8", **HOW)
    after = fresh_pipeline.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: type(p) for name, p in fresh_pipeline.unet.attn_processors.items()} == processors
    assert info(output)["recipe"] == "minmax"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "magic"}, "recipe 'magic' is unknown"),
        ({"bits": "w1a8"}, "must lie in 2..16"),
        ({"axes": {"time_axis": "sometimes"}}, "axes: time_axis"),
        ({"axes": {"nothing": 1}}, "axes: nothing"),
        ({"n_prompts": 3}, "3 calibration prompts were asked for, 2 are there"),
        ({"prompts": [PROMPTS[0] + " very" * 200]}, "tokens"),
        ({"components": "reference"}, "is not on the hub at a commit"),
        ({"model": "gone"}, "gone: no such folder or file"),
    ],
)
def test_what_cannot_be_done_is_said(
    tiny_model_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"model": str(tiny_model_folder), "recipe": "minmax", "prompts": PROMPTS}
    arguments |= {"output": tmp_path / "a", **HOW}
    with pytest.raises(UserError, match=message):
        halftone.quantize(**{**arguments, **changes})
    assert not list(tmp_path.iterdir())
