"""`halftone run`: one command, one line of progress, and what the user sees when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from trees import ROOT, edit, environment, halftone, snakemake

Finished = tuple[Path, "subprocess.CompletedProcess[str]"]


def results(tree: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(tree)): p.read_bytes() for p in sorted(tree.glob("results/**/*")) if p.is_file()
    }


def clear(tree: Path, *rules: str) -> None:
    """Remove the results of rules and the page, so that their jobs have to run.

    (A file in between alone is not missed.)
    """
    (tree / "results/report.html").unlink()
    for rule in rules:
        for path in (tree / "results" / rule).glob("**/*"):
            if path.is_file():
                path.unlink()


def stub(tree: Path, **behaviour: dict[str, object]) -> None:
    (tree / "stub.json").write_text(json.dumps(behaviour))


def test_the_demo_is_sixteen_jobs_and_ends_with_what_to_look_at(finished: Finished) -> None:
    tree, said = finished
    assert "16/16 jobs, took" in said.stderr
    assert f"report  {tree / 'results/report.html'}" in said.stdout
    assert f"images  {tree / 'results/grid.png'}" in said.stdout
    assert f"mlflow server --backend-store-uri sqlite:///{tree / 'mlflow.db'}" in said.stdout
    assert "minmax" in said.stdout


def test_a_second_run_does_nothing_and_says_the_same(copy: Callable[[], Path]) -> None:
    tree = copy()
    before = results(tree)
    said = halftone(tree, "run")
    assert said.returncode == 0, said.stderr
    assert "jobs" not in said.stderr
    assert "minmax" in said.stdout
    assert results(tree) == before


def test_plain_snakemake_finds_nothing_to_do_either(finished: Finished) -> None:
    said = snakemake(finished[0], "--dry-run")
    assert "Nothing to be done" in said.stderr + said.stdout
    assert "missing provenance" not in said.stderr + said.stdout


def test_every_job_leaves_a_log_and_a_timing(finished: Finished) -> None:
    tree = finished[0]
    for made in tree.glob("results/*/*"):
        name, rule = made.name.split(".")[0], made.parent.name
        for pattern in (f"logs/{rule}/{name}*", f"logs/benchmark/{rule}/{name}*"):
            assert list(tree.glob(pattern)), pattern


def test_a_users_mistake_in_a_job_is_told_in_its_words(copy: Callable[[], Path]) -> None:
    tree = copy()
    clear(tree, "sample")
    stub(tree, fail={"sample": "halftone: data/prompts: 3 images need as many prompts; add some"})
    said = halftone(tree, "run")
    assert said.returncode == 2
    assert "halftone: sample failed: data/prompts: 3 images need as many prompts; add some" in said.stderr
    assert "logs/sample/" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_fault_of_ours_is_told_with_its_log(copy: Callable[[], Path]) -> None:
    tree = copy()
    clear(tree, "metrics")
    stub(tree, fail={"metrics": "ZeroDivisionError: division by zero"})
    said = halftone(tree, "run")
    assert said.returncode == 1
    assert "metrics failed: ZeroDivisionError: division by zero (log: logs/metrics/" in said.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_prompts: 16", "n_prompts: 0", "params.yaml: calibration.n_prompts"),
        ("budget: fast", "budgt: fast", "params.yaml: reconstruction.budgt: unknown key"),
        ("minmax, bits: w4a8", "minmax, bits: w1a8", "weight width must lie in 2..16"),
        (
            "data/prompts/validation.txt",
            "data/prompts/gone.txt",
            "data/prompts/gone.txt: no such prompt",
        ),
        ("path: data/models/scenes-t2i", "path: data/models/gone", "data/models/gone: no such"),
    ],
)
def test_settings_are_checked_before_anything_runs(
    copy: Callable[[], Path], old: str, new: str, message: str
) -> None:
    tree = copy()
    edit(tree, old, new)
    said = halftone(tree, "run")
    assert said.returncode == 2
    assert said.stderr.startswith("halftone: ")
    assert said.stderr.count("\n") == 1
    assert message in said.stderr


def test_an_overlay_runs_its_own_rows(copy: Callable[[], Path]) -> None:
    tree = copy()
    (tree / "experiments/bits.yaml").write_text(
        "tier: bits\n"
        "tiers: {bits: {prompts: validation, n_images: 8}}\n"
        "scenarios:\n"
        "  scenes-t2i_fp_bits: {model: scenes-t2i, recipe: fp, tier: bits}\n"
        "  scenes-t2i_minmax_w8a8_bits: {model: scenes-t2i, recipe: minmax, bits: w8a8, tier: bits}\n"
    )
    said = halftone(tree, "run", "bits")
    assert said.returncode == 0, said.stderr
    table = (tree / "results/summary.csv").read_text()
    assert "scenes-t2i_minmax_w8a8_bits" in table
    assert "demo" not in [line.split(",")[1] for line in table.splitlines()]
    # back to the demo: its rows are still there, so that only the table and the page are made again
    said = halftone(tree, "run")
    assert "2/2 jobs" in said.stderr
    assert (tree / "results/metrics/scenes-t2i_minmax_w8a8_bits.json").exists()


def test_an_unknown_overlay_is_refused(finished: Finished) -> None:
    said = halftone(finished[0], "run", "nothing")
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert "experiments/nothing.yaml: no such overlay; known are " in said.stderr
    assert "headline" in said.stderr


def test_an_error_in_a_frame_is_read_without_it(tmp_path: Path) -> None:
    from halftone.workflow.invoke import Event, failure

    log = tmp_path / "job.log"
    log.write_text("╭─ Error ───╮\n│ Missing argument 'metrics'.   │\n╰───────────╯\n", encoding="utf-8")
    said = failure(Event("error", rule="summary", log=(str(log),)))
    assert str(said) == f"summary failed: Missing argument 'metrics'. (log: {log})"


@contextmanager
def running(tree: Path) -> Iterator[subprocess.Popen[str]]:
    """`halftone run` that is in the middle of sampling, which takes a minute."""
    clear(tree, "sample")
    stub(tree, sleep={"sample": 60})
    child = subprocess.Popen(
        [sys.executable, "-m", "halftone", "run"],
        cwd=tree,
        env=environment(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not jobs_of(tree, "sample"):
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield child
    finally:
        kill_jobs(tree)
        child.kill()
        child.communicate()


def jobs_of(tree: Path, verb: str = "") -> list[int]:
    """Processes that belong to a run in this tree."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        try:
            if "halftone" in " ".join(words) and (not verb or verb in words) and process.cwd() == str(tree):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def kill_jobs(tree: Path) -> None:
    """Kill them all at once; one that ended with another's end is none of ours to kill."""
    for pid in jobs_of(tree):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_interrupted_it_leaves_no_jobs_and_goes_on_later(copy: Callable[[], Path]) -> None:
    tree = copy()
    before = results(tree)
    with running(tree) as child:
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 130, said
        assert "goes on where it stopped" in said
        assert not jobs_of(tree)
    stub(tree)
    assert halftone(tree, "run").returncode == 0
    assert results(tree) == before


def test_killed_it_goes_on_without_being_unlocked(copy: Callable[[], Path]) -> None:
    tree = copy()
    before = results(tree)
    with running(tree):
        kill_jobs(tree)
    assert list((tree / ".snakemake/locks").iterdir())
    assert "Directory cannot be locked" in snakemake(tree, "results/report.html").stderr
    stub(tree)
    said = halftone(tree, "run")
    assert said.returncode == 0, said.stderr
    assert results(tree) == before


def test_a_second_run_beside_the_first_is_refused(copy: Callable[[], Path]) -> None:
    tree = copy()
    with running(tree):
        said = halftone(tree, "run")
        assert said.returncode == 2
        assert "is already running the workflow" in said.stderr


def test_it_must_be_run_in_a_checkout(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "halftone", "run"],
        cwd=tmp_path,
        env=environment(ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 2
    assert said.stderr.startswith("halftone: params.yaml: no such file")
