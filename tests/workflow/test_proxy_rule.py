"""The proxy card is made when asked for by name, and only then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from trees import copy_workflow, edit, halftone, snakemake, with_stub

from halftone.workflow import config, proxy, sources
from halftone.workflow.paths import Rule

ROOT = Path(__file__).parents[2]


def test_a_card_is_made_on_request_and_once(tmp_path: Path) -> None:
    tree = with_stub(copy_workflow(tmp_path / "tree"))
    said = snakemake(tree, "proxy")
    assert said.returncode == 0, said.stderr
    assert (tree / "results/proxy/scenes-t2i/card.json").is_file()
    assert (tree / "logs/proxy/scenes-t2i.log").is_file()
    assert {path.name for path in (tree / "results").iterdir()} == {"calibration_data", "proxy"}
    again = snakemake(tree, "proxy", "--dry-run")
    assert "Nothing to be done" in again.stdout + again.stderr
    everything = snakemake(tree, "--dry-run")
    assert everything.returncode == 0
    assert "proxy" not in everything.stdout + everything.stderr


@pytest.mark.slow
def test_the_card_of_a_model_that_is_gone_goes_too(tmp_path: Path) -> None:
    tree = with_stub(copy_workflow(tmp_path / "tree"))
    shutil.copytree(tree / "data/models/scenes-t2i", tree / "data/models/other")
    model = "  other: {path: data/models/other, steps: 25, guidance: 2.0, resolution: 64}\n"
    edit(tree, "\nprompts:\n", f"\n{model}\nprompts:\n")
    assert snakemake(tree, "proxy").returncode == 0
    assert (tree / "results/proxy/other").is_dir()
    edit(tree, model, "")
    assert halftone(tree, "prune").returncode == 0
    assert not (tree / "results/proxy/other").exists()
    assert (tree / "results/proxy/scenes-t2i").is_dir()


def test_it_is_aside_of_the_pipeline() -> None:
    assert proxy.NAME not in set(Rule)
    options = proxy.options(config.settings(base=ROOT / "params.yaml"), "scenes-t2i")
    assert options == "data/models/scenes-t2i --batch-size 16 --name scenes-t2i"


def test_the_code_behind_it_counts() -> None:
    verbs = proxy.NAME, proxy.OUTLIERS, "image_reward"
    assert len({sources.verb_hash(ROOT, verb) for verb in verbs}) == len(verbs)


def test_outliers_are_looked_for_on_request_and_then_shown(tmp_path: Path) -> None:
    tree = with_stub(copy_workflow(tmp_path / "tree"))
    everything = snakemake(tree, "--dry-run")
    assert everything.returncode == 0
    assert "outlier_analysis" not in everything.stdout + everything.stderr
    said = snakemake(tree, "outliers")
    assert said.returncode == 0, said.stderr
    folder = tree / "results/outliers/scenes-t2i"
    assert {path.name for path in folder.iterdir()} == {"outliers.json", "outliers.svg", "worst.svg"}
    again = snakemake(tree, "outliers", "--dry-run")
    assert "Nothing to be done" in again.stdout + again.stderr
    report = snakemake(tree, "--dry-run", "--printshellcmds")
    assert "results/outliers/scenes-t2i/outliers.json" in report.stdout + report.stderr, "the page shows it"
