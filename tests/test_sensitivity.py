"""Windows of calls restored and disturbed, and the calls that are relaxed for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import halftone
from halftone.artefact import info, verify
from halftone.cli import main
from halftone.errors import UserError
from halftone.plan import Plan
from halftone.sensitivity import Measured, Sensitivity, capacity, chosen, gains, windows
from halftone.source import Source, load_source
from halftone.steps.calibrate import calibrate
from halftone.steps.choice import Choice, choose
from halftone.steps.record import record
from halftone.steps.sensitivity import sensitivity

PROMPTS = ["a small red star on a plain grey background", "a large blue ring on a plain grey background"]
HOW: dict[str, Any] = {"steps": 3, "guidance": 3.0, "resolution": 16}
AXES = {"rounding": "nearest", "weight_range": "minmax", "relaxing": "auto"}


class Brightness:
    """Stands for a CLIP: the brighter an image, the better it fits."""

    name = "brightness"

    def cosines(self, images: Any, prompts: Sequence[str]) -> Tensor:
        assert images.dtype == np.uint8
        assert len(images) == len(prompts)
        return torch.from_numpy(images.mean(axis=(1, 2, 3)) / 255)


@pytest.fixture(scope="module")
def source(tiny_model_folder: Path) -> Source:
    return load_source(tiny_model_folder)


def measured(source: Source, n_windows: int, batch_size: int = 2, **options: Any) -> tuple[Sensitivity, int]:
    trajectory, known = record(source, PROMPTS, **HOW, batch_size=batch_size)
    computed: list[int] = []
    hook = source.pipeline.unet.conv_in.register_forward_hook(lambda *_: computed.append(1))
    choice: Choice = choose("static", "w4a4", AXES)
    found = sensitivity(
        source, trajectory, known, choice, batch_size=batch_size, n_windows=n_windows, **options
    )
    hook.remove()
    return found, len(computed)


def test_windows_cover_the_run_in_runs_of_like_length() -> None:
    assert windows(7, 3) == [(0, 1), (2, 3), (4, 5, 6)]
    assert windows(2, 9) == [(0,), (1,)]


@pytest.mark.parametrize(
    ("budget", "base", "n_calls", "calls"),
    [(None, 8, 51, 11), (None, 4, 26, 6), (0.4, 8, 50, 10), (0.41, 8, 50, 10), (0.4, 4, 50, 3), (9, 8, 5, 5)],
)
def test_a_budget_of_bits_buys_calls(budget: float | None, base: int, n_calls: int, calls: int) -> None:
    assert capacity(budget, base, 10, n_calls) == calls


def test_the_windows_that_give_back_most_are_chosen() -> None:
    cost, whole = Measured(latent_error=0.4, text_match=0.2), Measured(latent_error=0, text_match=0.3)
    restored = [
        Measured(latent_error=0.3, text_match=0.2),
        Measured(latent_error=0.38, text_match=0.28),
        Measured(latent_error=0.44, text_match=0.2),
    ]
    fidelity = gains(cost, whole, restored, text=False)
    both = gains(cost, whole, restored, text=True)
    assert fidelity == pytest.approx([0.25, 0.05, -0.1])
    assert both == pytest.approx([0.25, 0.85, -0.1])
    parts = [(0, 1), (2,), (3, 4)]
    assert chosen(parts, fidelity, 2) == (0, 1)
    assert chosen(parts, both, 2) == (2,)
    assert chosen(parts, both, 5) == (0, 1, 2)  # what harms is left out, budget or not


def test_restoring_every_call_gives_everything_back_and_no_batch_changes_it(source: Source) -> None:
    found, computed = measured(source, 1)
    (window,) = found.windows
    assert window.calls == (0, 1, 2, 3)
    assert window.restored.latent_error < 1e-4 < found.quantized.latent_error
    assert window.gain == pytest.approx(1, abs=1e-3)
    assert window.perturbed.latent_error > 0.1 * found.quantized.latent_error
    assert found.clip is None
    # calibration; both models on the reference, the quantized run, and two runs of the window
    assert computed == 4 + found.denoiser_calls == 4 + 5 * 4
    (apart,) = measured(source, 1, batch_size=1)[0].windows
    assert window.perturbed.latent_error == pytest.approx(apart.perturbed.latent_error, rel=0.05)


def test_a_window_costs_the_calls_from_its_first_on(source: Source) -> None:
    found, _ = measured(source, 4, prompts=PROMPTS, clip=Brightness())
    assert found.denoiser_calls == 3 * 4 + 2 * (4 + 3 + 2 + 1)
    assert len(found.relaxed_calls) == 1  # as many as near_x0 holds
    assert found.average_bits == pytest.approx(4 + 6 / 4)
    assert all(window.restored.text_match is not None for window in found.windows)


def test_auto_needs_a_choice_and_only_auto_takes_one(source: Source) -> None:
    trajectory, known = record(source, PROMPTS, **HOW, batch_size=2)
    with pytest.raises(UserError, match="auto needs a choice; run sensitivity"):
        calibrate(source, trajectory, known, choose("static", "w4a4", AXES))
    plain = choose("static", "w4a4", {**AXES, "relaxing": "none"})
    with pytest.raises(UserError, match="takes no choice"):
        calibrate(source, trajectory, known, plain, relaxed=(1,))
    with pytest.raises(UserError, match="relaxed_bits 10: activations have 12 already"):
        sensitivity(source, trajectory, known, choose("static", "w4a12", AXES))


def test_from_measurement_to_artefact_by_hand(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    model, data = str(tiny_model_folder), str(tmp_path / "data.safetensors")
    sampler = [f"--{name}={value}" for name, value in HOW.items()]
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--n-prompts=2"]
    assert main(["calibration-data", model, *prompts, *sampler, "-o", data]) == 0
    row = [model, "--data", data, "--recipe", "static", "--bits", "w4a4", "--axes", json.dumps(AXES)]
    measured, state = str(tmp_path / "sensitivity"), str(tmp_path / "state.safetensors")
    assert main(["sensitivity", *row, "--windows", "4", "-o", measured]) == 0
    found = Sensitivity.load(Path(measured) / "sensitivity.json")
    assert f"relax calls {found.relaxed_calls[0]}" in capsys.readouterr().out
    assert "window in float" in (Path(measured) / "sensitivity.svg").read_text()
    assert main(["calibrate", *row, "-o", state]) == 2
    assert "add --sensitivity" in capsys.readouterr().err
    other = [*row[:-1], json.dumps({**AXES, "relaxed_bits": 12})]
    file = ["--sensitivity", f"{measured}/sensitivity.json"]
    assert main(["calibrate", *other, *file, "-o", state]) == 2
    assert "was made for another" in capsys.readouterr().err
    assert main(["calibrate", *row, *file, "-o", state]) == 0
    assert main(["analyze", state, "-o", str(tmp_path / "analysis")]) == 0
    assert Plan.load(tmp_path / "analysis" / "plan.json").relaxed_calls == found.relaxed_calls


def test_in_one_call_the_choice_is_in_the_artefact(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = halftone.quantize(
        str(tiny_model_folder), "static", PROMPTS, tmp_path / "out", bits="w4a4", axes=AXES, **HOW
    )
    assert all(check.passed for check in verify(folder))
    assert len(Plan.load(folder / "plan.json").relaxed_calls) == 1
    assert info(folder)["avg_act_bits"] == 5.5
