"""DVC and Snakemake side by side: each accepts what the other has made, neither what is of unknown making."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from trees import dvc, edit, halftone, run, snakemake
from workflow_dag import plan

STATIC = "scenes-t2i_static_w4a8_demo"


@pytest.fixture(scope="module")
def recorded(finished: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by Snakemake that DVC has been told of."""
    tree = tmp_path_factory.mktemp("doors") / "recorded"
    shutil.copytree(finished[0], tree, symlinks=True)
    said = halftone(tree, "record")
    assert said.returncode == 0, said.stderr
    return tree


@pytest.fixture
def checked_out(recorded: Path, tmp_path: Path) -> Path:
    """A fresh clone after `dvc checkout`: results, and no record of what made them."""
    tree = tmp_path / "clone"
    shutil.copytree(
        recorded, tree, symlinks=True, ignore=shutil.ignore_patterns("results", ".snakemake", "logs")
    )
    assert dvc(tree, "checkout", "--quiet").returncode == 0
    assert (tree / "results/report.html").exists()
    return tree


def test_record_enters_every_stage(recorded: Path) -> None:
    stages = yaml.safe_load((recorded / "dvc.lock").read_text())["stages"]
    assert len(stages) == 1 + 3 * 8 + 2
    assert dvc(recorded, "status", "--quiet").returncode == 0
    assert not [job.name for job in plan(recorded) if job.runs]


def test_record_refuses_unfinished_work(copy: Callable[[], Path]) -> None:
    tree = copy()
    edit(tree, "n_prompts: 16", "n_prompts: 8")
    said = halftone(tree, "record")
    assert said.returncode == 2
    assert "not up to date" in said.stderr
    assert "calibration_data" in said.stderr
    assert not (tree / "dvc.lock").exists()


def test_results_without_a_record_are_refused(checked_out: Path) -> None:
    edit(checked_out, "n_prompts: 16", "n_prompts: 8")
    for said in (halftone(checked_out, "run"), snakemake(checked_out), snakemake(checked_out, "--dry-run")):
        assert said.returncode != 0
        assert "no record of what made this" in said.stderr + said.stdout
        assert "make trust" in said.stderr + said.stdout


def test_trust_accepts_what_dvc_has_verified(checked_out: Path) -> None:
    said = halftone(checked_out, "trust")
    assert said.returncode == 0, said.stderr
    assert not [job.name for job in plan(checked_out) if job.runs]
    # and settings changed afterwards are noticed, on every job (a plain --touch would have missed some)
    edit(checked_out, "bootstrap: 1000", "bootstrap: 500")
    assert {job.rule for job in plan(checked_out) if job.runs} == {"metrics", "summary", "report"}


@pytest.mark.parametrize("what", ["settings", "results", "code"])
def test_trust_refuses_what_has_changed_since(checked_out: Path, what: str) -> None:
    if what == "settings":
        edit(checked_out, "n_prompts: 16", "n_prompts: 8")
    elif what == "results":
        path = checked_out / f"results/calibrate/{STATIC}/state.safetensors"
        path.unlink()
        path.write_text("another")
    else:
        with (checked_out / "src/halftone/sampling.py").open("a") as file:
            file.write("\n# edited\n")
    said = halftone(checked_out, "trust")
    assert said.returncode == 2
    assert "differ from dvc.lock" in said.stderr
    assert not (checked_out / ".snakemake/metadata").exists()


def test_dvc_runs_one_scenarios_chain_when_its_bits_change(recorded: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(recorded, tree, symlinks=True)
    edit(tree, "recipe: static, bits: w4a8", "recipe: static, bits: w8a8")
    said = dvc(tree, "repro", f"sample@{STATIC}")
    assert said.returncode == 0, said.stderr + said.stdout
    ran = [line.split("'")[1] for line in said.stdout.splitlines() if line.startswith("Running stage")]
    steps = ("reparameterize", "reconstruct", "sensitivity", "calibrate", "analyze", "export", "sample")
    assert ran == [f"{step}@{STATIC}" for step in steps]
    left = {job.name for job in plan(tree) if job.runs}
    assert left == {f"metrics {STATIC}", "summary", "report"}


def test_a_failing_job_fails_its_stage_with_the_jobs_words(recorded: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(recorded, tree, symlinks=True)
    shutil.rmtree(tree / f"results/export/{STATIC}")
    (tree / "stub.json").write_text('{"fail": {"export": "halftone: the disk is full: free some space"}}')
    said = halftone(tree, "stage", "export", STATIC)
    assert said.returncode == 2
    assert "halftone: export failed: the disk is full: free some space (log: logs/export/" in said.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "data/prompts/unseen.txt",
            "elsewhere/unseen.txt",
            "prompts.unseen: elsewhere/",
        ),
        (
            "path: data/models/scenes-t2i",
            "path: mine",
            "models.scenes-t2i.path: mine lies outside",
        ),
        (
            "  scenes-t2i_fp_demo:",
            "  plain:",
            "looks for this full-precision row as scenes-t2i_fp",
        ),
    ],
)
def test_what_dvc_could_not_see_change_is_refused(
    copy: Callable[[], Path], old: str, new: str, message: str
) -> None:
    tree = copy()
    shutil.copytree(tree / "data/models/scenes-t2i", tree / "mine")
    edit(tree, old, new)
    said = halftone(tree, "stage", "summary")
    assert said.returncode == 2
    assert message in said.stderr


def test_a_stage_that_does_not_apply_leaves_an_empty_folder(copy: Callable[[], Path]) -> None:
    tree = copy()
    assert halftone(tree, "stage", "calibrate", "scenes-t2i_fp_demo").returncode == 0
    assert not list((tree / "results/calibrate/scenes-t2i_fp_demo").iterdir())


@pytest.mark.parametrize("words", [["calibrat", "x"], ["calibrate", "nothing"], ["summary", "x"]])
def test_an_unknown_stage_is_refused(copy: Callable[[], Path], words: list[str]) -> None:
    said = halftone(copy(), "stage", *words)
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)


def test_git_sees_no_results(recorded: Path) -> None:
    run(recorded, ["git", "add", "-A"])
    names = run(recorded, ["git", "ls-files"]).stdout
    assert "dvc.yaml" in names
    assert "results/" not in names
    assert "mlflow.db" not in names
