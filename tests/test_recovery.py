"""How much of one row's loss another gives back, from synthetic rows whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halftone.cli import main
from halftone.compare import changes
from halftone.errors import UserError
from halftone.files import write_json
from halftone.recovery import recoveries

COUNT = 600


def row(folder: Path, name: str, shift: float, right: float, count: int = COUNT, **other: Any) -> Path:
    """A row whose features lie `shift` from full precision's, with `right` of its images aligned."""
    noise = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, count, 4, generator=noise)
    alignment = (torch.arange(count) < right * count).float()
    alignment = alignment[torch.randperm(count, generator=noise)]
    tensors = {"features_a": a + shift, "features_b": b + shift, "alignment": alignment}
    tensors["latent_error"] = torch.full((count,), shift)
    if name == "fp":
        tensors["features_real"] = torch.randn(count, 4, generator=noise) - 1
    save_file(tensors, folder / f"{name}.safetensors")
    facts = {"model": "m", "tier": "t", "n_images": count, "prompts_sha256": "0", "features": "scenes"}
    write_json(folder / f"{name}.json", {"rows": [{**facts, **other}]})
    return folder / f"{name}.json"


def test_shares_and_ratios(tmp_path: Path) -> None:
    full = row(tmp_path, "fp", 0.0, 1.0)
    first, second = row(tmp_path, "first", 1.0, 0.4), row(tmp_path, "second", 0.5, 0.85)
    found = recoveries(first, second, full)
    assert found["alignment, of the loss"].value == pytest.approx(0.75)
    assert found["alignment, of the loss"].lo < 0.75 < found["alignment, of the loss"].hi
    # equal covariances: the distance is the square of the shift, up to the floor
    assert found["fid_to_fp_unpaired, excess over the floor"].value == pytest.approx(0.25, abs=0.03)
    assert found["fid_to_fp_unpaired, ratio"].value > found["fid_to_fp_unpaired, excess over the floor"].value
    # to images one below: 4 x (1.5^2 - 1) over 4 x (2^2 - 1)
    assert found["fid_to_real, excess"].value == pytest.approx(1.25 / 3, abs=0.03)


def test_a_row_against_itself_is_one_and_gives_nothing_back(tmp_path: Path) -> None:
    full, first = row(tmp_path, "fp", 0.0, 1.0), row(tmp_path, "first", 1.0, 0.4)
    found = recoveries(first, first, full)
    assert found["alignment, of the loss"].value == 0
    assert "fid_to_real, excess" in found
    assert found["fid_to_real, excess"].value == found["fid_to_fp_unpaired, ratio"].value == 1


def test_few_images_and_no_loss_leave_figures_out(tmp_path: Path) -> None:
    full = row(tmp_path, "fp", 0.0, 1.0, count=100)
    first, second = row(tmp_path, "first", 1.0, 0.5, count=100), row(tmp_path, "second", 0.5, 1.0, count=100)
    assert set(recoveries(first, second, full)) == {"alignment, of the loss"}
    assert recoveries(full, second, full) == {}


def test_shares_of_no_loss_are_left_out(tmp_path: Path) -> None:
    full = row(tmp_path, "fp", 0.0, 1.0)
    found = recoveries(full, row(tmp_path, "second", 0.5, 0.9), full)
    assert set(found) == {"fid_to_fp_unpaired, ratio"}


def test_paired_figures_are_compared(tmp_path: Path) -> None:
    first, second = row(tmp_path, "first", 1.0, 0.4), row(tmp_path, "second", 0.5, 0.85)
    found = {change.name: change for change in changes(first, second)}
    assert found["latent_error"].change == pytest.approx(-0.5)
    assert found["latent_error"].clear


def test_rows_measured_otherwise_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, first = row(tmp_path, "fp", 0.0, 1.0), row(tmp_path, "first", 1.0, 0.4)
    other = row(tmp_path, "other", 1.0, 0.4, tier="u")
    with pytest.raises(UserError, match="tier is u"):
        recoveries(first, other, full)
    assert main(["compare", str(first), str(other), "--full", str(full)]) == 2
    (tmp_path / "first.safetensors").write_bytes(b"no")
    assert main(["compare", str(full), str(first), "--full", str(full)]) == 2
    assert "run halftone metrics again" in capsys.readouterr().err
