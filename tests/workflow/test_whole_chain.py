"""The real command line on a tiny random model, through both doors: from prompts to the page, twice the same
bytes.
"""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from trees import ROOT, copy_workflow, dvc, halftone, run, snakemake

TIMINGS = ("quantize_seconds", "sample_seconds", "peak_mib")
STATIC, FP = "tiny_static_w4a8_small", "tiny_fp_small"
JOBS = Counter(
    calibration_data=1,
    reconstruct=1,
    calibrate=1,
    analyze=1,
    export=1,
    sample=2,
    metrics=2,
    summary=1,
    report=1,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Path]:
    tree = copy_workflow(tmp_path_factory.mktemp("chain") / "tree")
    shutil.copy(ROOT / "tests/workflow/params-small.yaml", tree / "params.yaml")
    shutil.copytree(ROOT / "data/models/scenes-metrics", tree / "data/models/scenes-metrics")
    shutil.copytree(tiny_model_folder, tree / "data/models/tiny")
    yield tree
    shutil.rmtree(tree)


@pytest.fixture(scope="module")
def by_snakemake(tree: Path) -> dict[str, bytes]:
    said = halftone(tree, "run", "--cores", "2")
    assert said.returncode == 0, said.stderr
    assert "11/11 jobs" in said.stderr
    assert "static w4a8" in said.stdout
    return results(tree)


@pytest.fixture(scope="module")
def by_dvc(tree: Path, by_snakemake: dict[str, bytes]) -> dict[str, bytes]:
    for name in ("results", ".snakemake", "logs", "scratch"):
        shutil.rmtree(tree / name)
    said = dvc(tree, "repro", "report")
    assert said.returncode == 0, said.stderr + said.stdout
    return results(tree)


def results(tree: Path) -> dict[str, bytes]:
    """What the rules have made, without what DVC keeps beside it."""
    files = (path for path in tree.glob("results/**/*") if path.is_file() and path.name != ".gitignore")
    return {str(path.relative_to(tree)): path.read_bytes() for path in sorted(files)}


def rows(table: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(table.decode().splitlines()))


def untimed(table: bytes) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows(table)]


def runs_logged(tree: Path) -> Counter[str]:
    with sqlite3.connect(tree / "mlflow.db") as store:
        query = (
            "select t.value from runs r join tags t on t.run_uuid = r.run_uuid"
            " where t.key = 'rule' and r.status = 'FINISHED'"
        )
        return Counter(value for (value,) in store.execute(query))


def test_the_table_has_full_precision_the_floor_and_the_row(by_snakemake: dict[str, bytes]) -> None:
    table = rows(by_snakemake["results/summary.csv"])
    assert [(row["scenario"], row["recipe"]) for row in table] == [
        (FP, "fp"),
        (f"{FP}-floor", "fp-floor"),
        (STATIC, "static"),
    ]
    row = table[-1]
    assert (row["execution"], row["weight_bits"], row["act_bits"], row["n_images"]) == (
        "simulated",
        "4",
        "8",
        "4",
    )
    assert float(row["quantize_seconds"]) > 0
    assert float(row["sample_seconds"]) > 0
    assert float(row["peak_mib"]) > 100


def test_the_page_stands_alone_and_is_dated_by_nothing(by_snakemake: dict[str, bytes], tree: Path) -> None:
    page = by_snakemake["results/report.html"].decode()
    assert "static w4a8" in page
    assert str(tree) not in page
    assert by_snakemake["results/grid.png"].startswith(b"\x89PNG")


def test_no_output_names_this_machine_or_this_folder(by_snakemake: dict[str, bytes], tree: Path) -> None:
    for name, content in by_snakemake.items():
        assert str(tree).encode() not in content, name


def test_every_job_left_a_run_in_mlflow(by_snakemake: dict[str, bytes], tree: Path) -> None:
    # looked at before the other door adds its own
    assert runs_logged(tree) == JOBS


def test_images_come_from_the_artefact_on_disk(by_dvc: dict[str, bytes], tree: Path) -> None:
    row = rows(by_dvc["results/summary.csv"])[-1]
    facts = json.loads(halftone(tree, "info", f"results/export/{STATIC}", "--json").stdout)
    assert row["artefact_sha256"] == facts["artefact_sha256"]


def test_both_doors_give_the_same_bytes(by_snakemake: dict[str, bytes], by_dvc: dict[str, bytes]) -> None:
    assert by_snakemake.keys() == by_dvc.keys()
    timed = ("results/summary.csv", "results/report.html")
    different = [name for name in by_dvc if name not in timed and by_dvc[name] != by_snakemake[name]]
    assert not different
    assert untimed(by_dvc["results/summary.csv"]) == untimed(by_snakemake["results/summary.csv"])


def test_both_doors_log_to_mlflow(by_dvc: dict[str, bytes], tree: Path) -> None:
    assert runs_logged(tree) == JOBS + JOBS


def test_afterwards_neither_door_finds_anything_to_do(by_dvc: dict[str, bytes], tree: Path) -> None:
    said = snakemake(tree, "--dry-run")
    assert "Nothing to be done" in said.stderr + said.stdout
    assert "missing provenance" not in said.stderr + said.stdout
    assert "up to date" in dvc(tree, "repro", "report").stdout
    said = halftone(tree, "run")
    assert (said.returncode, "jobs" in said.stderr) == (0, False)
    assert results(tree) == by_dvc


def test_the_artefact_is_whole_and_says_what_it_is(by_dvc: dict[str, bytes], tree: Path) -> None:
    artefact = f"results/export/{STATIC}"
    said = halftone(tree, "verify", artefact)
    assert said.returncode == 0, said.stdout
    facts = json.loads(halftone(tree, "info", artefact, "--json").stdout)
    assert (facts["recipe"], facts["weight_bits"], facts["provenance"]["steps"]) == ("static", 4, 3)
    assert facts["provenance"]["model_path"] == "data/models/tiny"


def test_compare_pairs_two_rows_prompt_by_prompt(by_dvc: dict[str, bytes], tree: Path) -> None:
    said = halftone(tree, "compare", FP, STATIC)
    assert said.returncode == 0, said.stderr
    lines = {line.split()[0]: line for line in said.stdout.splitlines()[1:]}
    assert {"clip_score", "lpips", "psnr", "ssim"} <= set(lines)
    assert " to " in lines["lpips"]


def test_git_would_not_take_results_or_stores(by_dvc: dict[str, bytes], tree: Path) -> None:
    run(tree, ["git", "add", "-A"])
    names = run(tree, ["git", "ls-files"]).stdout.splitlines()
    assert not [name for name in names if name.startswith(("results/", "logs/", "scratch/", "mlartifacts/"))]
    assert "mlflow.db" not in names
