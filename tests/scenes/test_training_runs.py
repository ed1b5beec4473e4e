"""A training's log and sheets become one MLflow run, in the store that is configured and nowhere else."""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from halftone import tracking
from halftone.errors import UserError
from halftone.scenes.training import Log
from halftone.scenes.training_runs import curves, log_finished, log_training, read_log, sheets, times

LINES = [
    {"at": "23:59:30", "images": 960, "loss": 0.8, "rate": 60.0, "minutes_left": 5.0},
    {"at": "23:59:45", "images": 1920, "loss": 0.4, "rate": 62.0, "minutes_left": 4.0},
    {"at": "00:00:00", "images": 2880, "loss": 0.2, "rate": 61.0, "minutes_left": 3.0},
]


def written(folder: Path, lines: list[dict[str, object]] = LINES) -> Path:  # type: ignore[assignment]
    path = folder / "t2i.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def pictures(folder: Path) -> Path:
    home = folder / "sheets"
    home.mkdir()
    for name in ("images-0002880.png", "images-0000960.png", "tiny-final.png", "other.png"):
        Image.new("RGB", (4, 4)).save(home / name)
    return home


def test_times_go_back_from_the_end_over_midnight(tmp_path: Path) -> None:
    assert times(read_log(written(tmp_path)), 1000.0) == [970.0, 985.0, 1000.0]
    assert times([{"images": 1}, {"images": 2}], 5.0) == [5.0, 5.0]


def test_curves_over_images_seen() -> None:
    found = curves(LINES, [1.0, 2.0, 3.0])
    assert found.keys() == {"loss", "rate"}
    assert found["loss"] == [(960, 1.0, 0.8), (1920, 2.0, 0.4), (2880, 3.0, 0.2)]


def test_what_a_killed_training_repeats_is_counted_once() -> None:
    again = [*LINES, {"images": 1800, "loss": 0.5}, {"images": 2700, "loss": 0.3}]
    assert curves(again, [1.0, 2, 3, 4, 5])["loss"] == [(960, 1.0, 0.8), (1800, 4, 0.5), (2700, 5, 0.3)]


def test_sheets_of_the_training_in_order(tmp_path: Path) -> None:
    found = sheets(pictures(tmp_path), "tiny")
    assert [path.name for path in found] == ["images-0000960.png", "images-0002880.png", "tiny-final.png"]
    assert sheets(None, "tiny") == []


@pytest.mark.slow
def test_one_run_with_params_curves_and_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the verb, from another folder, twice: the second time there is nothing to add."""
    from halftone.scenes.train import verbs

    work = tmp_path / "elsewhere"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv(tracking.URI, tracking.default_uri(tmp_path))
    words = [
        "log-run",
        "--log",
        str(written(tmp_path)),
        "--sheets",
        str(pictures(tmp_path)),
        "--name",
        "tiny",
    ]
    for _ in range(2):
        said = CliRunner().invoke(verbs, [*words, "--settings", '{"batch": 32}'])
        assert said.exit_code == 0, said.output
        assert "3 sheets" in said.output
    assert list(work.iterdir()) == []  # no mlruns, no store of its own
    with sqlite3.connect(tmp_path / tracking.STORE) as store:
        ((run, name, status, start, end),) = store.execute(
            "select run_uuid, name, status, start_time, end_time from runs"
        ).fetchall()
        assert (name, status, end - start, end) == ("train tiny", "FINISHED", 30_000, 1_000_000_000_000)
        assert dict(store.execute("select key, value from params")) == {"model": "tiny", "batch": "32"}
        loss = "select step, value from metrics where key = 'loss' order by step"
        assert store.execute(loss).fetchall() == [(960, 0.8), (1920, 0.4), (2880, 0.2)]
        tags = dict(store.execute("select key, value from tags where run_uuid = ?", (run,)))
        assert (tags["kind"], tags["rule"], tags["scenario"]) == ("training", "train", "tiny")
    artefacts = tmp_path / tracking.ARTIFACTS / run / "artifacts"
    assert sorted(p.name for p in (artefacts / "sheets").iterdir()) == [
        "images-0000960.png",
        "images-0002880.png",
        "tiny-final.png",
    ]
    assert (artefacts / "t2i.jsonl").is_file()


def test_without_a_uri_nothing_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracking.URI, raising=False)
    monkeypatch.setattr(tracking, "_log", lambda *_: pytest.fail("logged"))
    log_training("tiny", written(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["t2i.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the log is empty"),
        ("loss 0.3\n", "line 1 is no JSON"),
        ('{"images": 1}\n{"loss": 2}\n', "line 2"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_log(tmp_path / "x.jsonl")


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halftone.scenes.train import verbs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tracking.URI, tracking.default_uri(tmp_path))
    log = ["--log", str(written(tmp_path))]
    for words, message in (
        (["--log", "gone.jsonl"], "gone.jsonl: no log of a training"),
        ([*log, "--sheets", "gone"], "gone: no such folder of sheets"),
        ([*log, "--settings", "{"], "--settings: not JSON"),
        ([*log, "--settings", "3"], "must be a JSON object"),
    ):
        said = CliRunner().invoke(verbs, ["log-run", "--name", "tiny", *words])
        assert said.exit_code == 2
        assert message in said.output
        assert said.output.count("\n") == 1
    assert not (tmp_path / tracking.STORE).exists()


@dataclass(frozen=True)
class Plan:
    images: int = 2880
    widths: tuple[int, ...] = (32, 64)


@pytest.mark.parametrize(("images", "logged"), [(2880, True), (2879, False)])
def test_a_trainer_logs_when_its_plan_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, logged: bool
) -> None:
    found: list[tracking.Record] = []
    monkeypatch.setattr(tracking, "log", lambda record: found.append(record) or True)
    pictures(tmp_path)
    trainer = SimpleNamespace(work=tmp_path, plan=Plan(), images=images, log=Log(written(tmp_path)))
    log_finished("tiny", trainer)
    assert len(found) == logged
    if found:
        assert found[0].params == {"model": "tiny", "images": 2880, "widths": (32, 64)}
        assert len(found[0].folders["sheets"]) == 3


def test_a_store_that_fails_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halftone.scenes.train import verbs

    monkeypatch.setenv(tracking.URI, "nonsense://x")
    words = ["log-run", "--log", str(written(tmp_path)), "--name", "tiny"]
    assert CliRunner().invoke(verbs, words).exit_code == 1
