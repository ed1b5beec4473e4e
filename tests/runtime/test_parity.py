"""The parity certificate: measured at export, kept in the artefact, shown, and sharp."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from halftone import artefact
from halftone.artefact import certify
from halftone.artefact.load import describe
from halftone.errors import UserError
from halftone.plan import Execution
from halftone.runtime.integer import execution_of
from halftone.runtime.layers import CodedLayer, IntegerLayer
from halftone.runtime.parity import FILE, CallParity, ModuleParity, Parity
from halftone.runtime.rows import RowLayer
from halftone.source import load_source
from halftone.trajectory import Trajectory, record
from quantized import GUIDANCE, PROMPTS, RESOLUTION, STEPS, Calibrated, calibrated, shared_artefact


@pytest.fixture(scope="module")
def trajectory(tiny_model_folder: Path) -> Trajectory:
    how = {"steps": STEPS, "guidance": GUIDANCE, "resolution": RESOLUTION, "seed": 0, "batch_size": 2}
    return record(load_source(tiny_model_folder).pipeline, PROMPTS, **how)


@pytest.fixture(scope="module")
def certified(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, trajectory: Trajectory
) -> tuple[Calibrated, Path, Path]:
    """The calibration, its artefact without a certificate, and one with it."""
    found, plain = shared_artefact(tmp_path_factory, tiny_model_folder)
    folder = tmp_path_factory.mktemp("certified") / "tiny"
    artefact.write(folder, found.state, found.plan, load_source(tiny_model_folder), trajectory=trajectory)
    return found, plain, folder


def test_modules_agree_and_calls_are_close(certified: tuple[Calibrated, Path, Path]) -> None:
    found, _, folder = certified
    parity = describe(folder).parity
    assert parity is not None
    modules = {site.module for site in found.plan.quantized}
    assert {part.module for part in parity.modules} == modules
    assert all(part.passed for part in parity.modules)
    assert all(part.codes > 0 and part.far_code == 0 for part in parity.modules)
    assert [call.call for call in parity.calls] == list(range(found.plan.calls))
    assert all(part.next_code == 0 == part.difference for part in parity.modules)
    assert all(call.simulated_to_full > 0 == call.integer_to_simulated for call in parity.calls)
    # and both are a last bit of a float away from exact arithmetic, or a few steps at ties
    assert all(0 < call.integer_to_exact < 0.5 * call.simulated_to_full for call in parity.calls)


def test_it_is_in_the_manifest_and_in_no_identity(certified: tuple[Calibrated, Path, Path]) -> None:
    _, plain, folder = certified
    assert FILE in json.loads((folder / "manifest.json").read_text())["files"]
    assert artefact.artefact_sha256(folder) == artefact.artefact_sha256(plain)
    assert artefact.info(plain)["parity"] == {}
    assert artefact.info(folder)["parity"]["far_codes"] == 0
    assert all(check.passed for check in artefact.verify(folder))


@pytest.mark.parametrize("axes", [{"group_axis": "position"}, {"group_layout": "aligned"}])
def test_groups_run_in_integers_and_agree(
    axes: dict[str, str],
    trajectory: Trajectory,
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Free groups of positions, and aligned ones of either axis, within the bounds of all modules."""
    monkeypatch.setattr(certify, "measure", partial(certify.measure, calls=2, prompts=1))
    groups = {"groups": 4, "relaxing": {"calls": [0]}, **axes}
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", **groups)
    source = load_source(tiny_model_folder)
    artefact.write(tmp_path / "made", found.state, found.plan, source, trajectory=trajectory)
    parity = describe(tmp_path / "made").parity
    assert parity is not None
    modules = {site.module for site in found.plan.quantized}
    assert {part.module for part in parity.modules} == modules
    assert all(part.passed for part in parity.modules)
    assert all(part.codes > 0 for part in parity.modules)
    layers = [part for part in parity.modules if not part.module.endswith(("attn1", "attn2"))]
    assert all(part.next_code == 0 for part in layers)
    assert all(call.integer_to_simulated < 0.5 * call.simulated_to_full for call in parity.calls)
    assert not artefact.info(tmp_path / "made")["integer"]["fallbacks"]
    pipeline = artefact.load(tmp_path / "made", execution="integer")
    assert execution_of(pipeline.unet) is Execution.INTEGER
    kernels = {type(module) for module in pipeline.unet.modules() if isinstance(module, CodedLayer)}
    assert "group_layout" in axes or kernels == {RowLayer, IntegerLayer}, "vectors have no positions"


def test_a_wrong_kernel_is_caught(
    certified: tuple[Calibrated, Path, Path],
    trajectory: Trajectory,
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = IntegerLayer.forward
    monkeypatch.setattr(IntegerLayer, "forward", lambda self, x: forward(self, x) * (1 + 1e-3))
    monkeypatch.setattr(certify, "measure", partial(certify.measure, calls=1))
    source = load_source(tiny_model_folder)
    artefact.write(tmp_path / "wrong", certified[0].state, certified[0].plan, source, trajectory=trajectory)
    parity = describe(tmp_path / "wrong").parity
    assert parity is not None
    assert not parity.passed
    assert "outputs 0.001 apart" in capsys.readouterr().out


def test_the_trajectory_of_another_schedule_is_refused(
    certified: tuple[Calibrated, Path, Path], trajectory: Trajectory, tmp_path: Path, tiny_model_folder: Path
) -> None:
    other = replace(trajectory, timesteps=trajectory.timesteps + 1)
    source = load_source(tiny_model_folder)
    with pytest.raises(UserError, match="other timesteps"):
        artefact.write(tmp_path / "made", certified[0].state, certified[0].plan, source, trajectory=other)
    assert not (tmp_path / "made").exists()


def test_bounds() -> None:
    good = {"module": "a", "kernel": "k", "codes": 10_000, "next_code": 10, "far_code": 0, "difference": 1e-6}
    assert ModuleParity(**good).passed
    for worse in ({"next_code": 11}, {"far_code": 1}, {"difference": 1e-4}):
        assert not ModuleParity(**{**good, **worse}).passed
    changed = {"call": 0, "simulated_to_full": 1.0, "integer_to_exact": 0.5}
    assert CallParity(**changed, integer_to_simulated=0.1).passed
    assert not CallParity(**changed, integer_to_simulated=0.11).passed


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"format": 1}')
    with pytest.raises(UserError, match="not a parity certificate"):
        Parity.load(tmp_path / FILE)
