"""A scenario that leaves the configuration leaves nothing behind; what others still name stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from trees import edit, halftone, snakemake

STATIC = "scenes-t2i_static_w4a8_demo"
ROW = f"  {STATIC}: {{model: scenes-t2i, recipe: static, bits: w4a8, tier: demo}}\n"


def traces(tree: Path, name: str) -> list[str]:
    folders = ("results", "logs", "scratch")
    return [
        str(p.relative_to(tree))
        for f in folders
        for p in (tree / f).glob("**/*")
        if p.name.split(".")[0] == name
    ]


@pytest.fixture
def without_static(copy: Callable[[], Path]) -> Path:
    tree = copy()
    assert traces(tree, STATIC)
    edit(tree, ROW, "")
    return tree


@pytest.mark.parametrize("door", [lambda tree: halftone(tree, "run"), lambda tree: snakemake(tree)])
def test_a_run_removes_what_is_no_longer_configured(without_static: Path, door: Callable) -> None:  # type: ignore[type-arg]
    said = door(without_static)
    assert said.returncode == 0, said.stderr
    assert not traces(without_static, STATIC)
    assert (
        f"removed results/export/{STATIC}: its scenario or model is no longer configured"
        in said.stdout + said.stderr
    )
    assert STATIC not in (without_static / "results/summary.csv").read_text()


def test_a_dry_run_removes_nothing(without_static: Path) -> None:
    assert snakemake(without_static, "--dry-run").returncode == 0
    assert traces(without_static, STATIC)


def test_rows_that_an_overlay_names_stay(without_static: Path) -> None:
    (without_static / "experiments/mine.yaml").write_text(f"scenarios:\n{ROW}")
    assert halftone(without_static, "run").returncode == 0
    assert traces(without_static, STATIC)


def test_rows_of_other_configuration_files_stay(copy: Callable[[], Path]) -> None:
    """Results of `snakemake --configfile elsewhere.yaml` are not this configuration's to remove."""
    tree = copy()
    shutil.copytree(tree / f"results/export/{STATIC}", tree / "results/export/someone-elses")
    edit(tree, "n_prompts: 16", "n_prompts: 8")
    assert halftone(tree, "run").returncode == 0
    assert (tree / "results/export/someone-elses").exists()
    # asked outright, prune does remove what no known configuration names, and says so first
    said = halftone(tree, "prune", "--dry-run")
    assert said.stdout == "would remove results/export/someone-elses\n"
    assert (tree / "results/export/someone-elses").exists()
    assert halftone(tree, "prune").stdout == "removed results/export/someone-elses\n"
    assert not (tree / "results/export/someone-elses").exists()
    assert "nothing to remove" in halftone(tree, "prune").stdout


def test_its_stages_leave_dvc_lock(without_static: Path) -> None:
    stages = {f"calibrate@{STATIC}": {"cmd": "x"}, "train@other": {"cmd": "y"}, "summary": {"cmd": "z"}}
    (without_static / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    assert halftone(without_static, "run").returncode == 0
    assert set(yaml.safe_load((without_static / "dvc.lock").read_text())["stages"]) == {
        "train@other",
        "summary",
    }
