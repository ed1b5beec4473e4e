"""Error of the latents against call: free-running, and with every call started from full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halftone import artefact
from halftone.cli import main
from halftone.denoiser import denoiser_of
from halftone.passes.rollout import roll, runs_of, teacher_forced
from halftone.propagation import drifts, propagation, relative_errors
from halftone.provenance import Provenance
from halftone.report.plots import Errors, errors_svg
from halftone.source import Source, load_source
from halftone.steps.record import record
from halftone.trajectory import Trajectory
from quantized import GUIDANCE, PROMPTS, RESOLUTION, STEPS, calibrated

Case = tuple[Source, Trajectory, Provenance, dict[str, Path]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Case:
    home, source = tmp_path_factory.mktemp("propagation"), load_source(tiny_model_folder)
    made = {}
    for name, bits, axes in (("wide", "w16a16", {}), ("narrow", "w4a4", {"relaxing": {"calls": [4]}})):
        found = calibrated(tiny_model_folder, home / f"{name}.safetensors", bits, **axes)
        artefact.write(home / name, found.state, found.plan, source)
        made[name] = home / name
    how: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "resolution": RESOLUTION}
    trajectory, known = record(source, PROMPTS, batch_size=2, **how)
    trajectory.save(home / "data.safetensors", known)
    return source, trajectory, known, made


def test_a_run_on_known_outputs_is_the_reference(case: Case) -> None:
    source, trajectory, known, _ = case
    runs = runs_of(source.pipeline, trajectory, known, 1)
    outputs = teacher_forced(denoiser_of(source.pipeline), trajectory, runs)
    found = roll(source.pipeline, trajectory, runs, lambda call, batch, _: outputs[call][batch])
    # what a call hands on is what the next one is given: PNDM scales nothing
    torch.testing.assert_close(found.latents[:-1], trajectory.latents[1:], atol=1e-4, rtol=1e-4)
    images = torch.cat([result.images for result in found.results])
    assert torch.equal(found.latents[-1], images)


def test_error_is_inherited_when_free_running_only(case: Case) -> None:
    source, trajectory, known, made = case
    computed: list[int] = []
    hook = denoiser_of(source.pipeline).conv_in.register_forward_hook(lambda *_: computed.append(1))
    found = propagation(source, trajectory, known, made, batch_size=2)
    hook.remove()
    wide, narrow = found.artefacts
    assert found.denoiser_calls == 5 + 2 * 2 * 5
    assert len(computed) == 5  # the artefacts' denoisers made the others
    assert max(wide.free_running) < 1e-2 < narrow.free_running[-1]
    # nothing is inherited at the first call
    assert narrow.free_running[0] == pytest.approx(narrow.teacher_forced[0], rel=1e-3)
    assert narrow.free_running[-1] > 1.5 * narrow.teacher_forced[-1]
    assert narrow.relaxed_calls == (4,)
    assert len(narrow.drift) == len(narrow.drift_error) == 5
    assert max(wide.drift) < 1e-2 < max(narrow.drift)


def test_relative_errors_are_means_of_the_prompts_own() -> None:
    reference = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    latents = torch.tensor([[[3.0, 4.5], [0.0, 1.0]]])
    assert relative_errors(latents, reference) == (0.05,)


def test_drift_is_what_all_images_share() -> None:
    reference = torch.tensor([-1.0, 1.0]).reshape(1, 2, 1, 1, 1).expand(2, 2, 1, 4, 4)
    spread = 2**0.5
    shared = reference + 0.5
    own = reference + torch.tensor([0.5, -0.5]).reshape(1, 2, 1, 1, 1)
    grain = torch.ones(4, 4)
    grain[::2] = -1
    for latents, drift, error in (
        (shared, 0.5 / spread, 0.0),
        (own, 0.0, 0.5 / spread),
        (reference + grain, 0.0, 0.0),
    ):
        found = drifts(latents, reference)
        assert found[0] == pytest.approx((drift,) * 2, abs=1e-6)
        assert found[1] == pytest.approx((error,) * 2, abs=1e-6)
    assert drifts(reference[:, :1], reference[:, :1]) == ((), ())
    alike = torch.zeros_like(reference)
    assert drifts(alike, alike) == ((), ())


def test_relaxed_calls_are_shaded_in_the_rows_colour() -> None:
    values = (0.1, 0.2, 0.3)
    plain, shaded = (errors_svg([Errors("row", values, values, values, relaxed)]) for relaxed in ((), (1, 2)))
    assert shaded.count("opacity: 0.07") == plain.count("opacity: 0.07") + 2


def test_the_verb_writes_data_and_plot(
    case: Case, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(case[3]["wide"].parent / "data.safetensors")
    arguments = ["propagation", str(tiny_model_folder), str(case[3]["narrow"]), "--data", data]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "latents off by" in printed
    assert "of the spread between images at call" in printed
    plot = (tmp_path / "out" / "propagation.svg").read_text()
    assert "narrow" in plot
    assert "teacher-forced" in plot
    assert main([*arguments, str(case[3]["narrow"]), "-o", str(tmp_path / "out")]) == 2
