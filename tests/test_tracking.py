"""MLflow sees every run, and what it sees can be lost without losing data."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halftone import tracking

WRITER = """
import sys
from pathlib import Path
from halftone.tracking import Record, log
number = int(sys.argv[1])
output = Path(f"out{number}.json")
output.write_text("{}")
for part in range(2):
    rule = "metrics" if part else "sample"
    log(Record(rule, f"row{number}", output, {"number": number}, {"value": number}, (output,)))
"""


def writer(folder: Path, number: int) -> subprocess.Popen[str]:
    source = str(Path(tracking.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, tracking.URI: tracking.default_uri(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(number)],
        cwd=folder,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
    )


def record(folder: Path, **facts: object) -> tracking.Record:
    output = folder / "figures.json"
    output.write_text("{}")
    return tracking.Record("metrics", "my-row", output, **facts)  # type: ignore[arg-type]


@pytest.mark.slow
def test_eight_writers_on_a_store_that_is_not_there_yet_lose_nothing(tmp_path: Path) -> None:
    writers = [writer(tmp_path, number) for number in range(8)]
    said = [one.communicate()[1] for one in writers]
    assert [one.returncode for one in writers] == [0] * 8
    assert not [text for text in said if "warning" in text]
    with sqlite3.connect(tmp_path / tracking.STORE) as store:
        runs = store.execute("select run_uuid, name, status from runs").fetchall()
        assert len(runs) == 16
        assert {status for _, _, status in runs} == {"FINISHED"}
        assert sorted(name for _, name, _ in runs) == sorted(
            name for number in range(8) for name in (f"sample row{number}", f"row{number}")
        )
        assert store.execute("select count(*) from metrics").fetchone() == (16,)
        assert store.execute("select count(*) from params").fetchone() == (16,)
        tags = dict(store.execute("select key, value from tags where run_uuid = ?", (runs[0][0],)).fetchall())
        assert {"rule", "scenario", "kind", "data_sha256"} <= set(tags)
        assert store.execute("select count(*) from experiments where name = 'halftone'").fetchone() == (1,)
    assert len(list((tmp_path / tracking.ARTIFACTS).glob("*/artifacts/*.json"))) == 16


def test_without_a_uri_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracking.URI, raising=False)
    monkeypatch.setattr(tracking, "_log", lambda *_: pytest.fail("logged"))
    tracking.log(record(tmp_path))
    tracking.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/mlflow.db", "http://127.0.0.1:9", "nonsense://x"])
def test_a_store_that_fails_is_told_and_loses_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uri: str
) -> None:
    monkeypatch.setenv(tracking.URI, uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    tracking.log(record(tmp_path))
    assert time.monotonic() - started < 60
    said = capsys.readouterr().err
    assert f"warning: MLflow at {uri} did not take the run of metrics my-row" in said
    assert "is written and whole" in said


def test_values_that_mlflow_refuses_are_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(tracking.URI, "sqlite:////unused")
    monkeypatch.setattr(tracking, "_store", lambda _: None)

    def refuse(*_: object) -> None:
        raise ValueError("not a name\nsecond line")

    monkeypatch.setattr(tracking, "_open", refuse)
    tracking.log(record(tmp_path))
    assert "(ValueError: not a name)" in capsys.readouterr().err


def test_a_copy_that_dvc_works_in_logs_to_the_main_checkout(tmp_path: Path) -> None:
    inner = tmp_path / "checkout/.dvc/tmp/exps/tmp1a2b"
    inner.mkdir(parents=True)
    assert tracking.default_uri(inner) == f"sqlite:///{tmp_path / 'checkout/mlflow.db'}"
    assert tracking.default_uri(tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_only_rows_of_the_table_are_of_kind_scenario(tmp_path: Path) -> None:
    assert record(tmp_path).kind == "scenario"
    assert tracking.Record("sample", "x", tmp_path).kind == "job"
