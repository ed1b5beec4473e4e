"""MLflow: shows and compares runs, decides nothing. Losing its store, or its failing, loses no result.

Off unless MLFLOW_TRACKING_URI is set; the workflow sets it to `mlflow.db` beside params.yaml. Each verb logs
one run, in its own process, after it has written its data. MLflow is imported only then.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halftone.files import sha256

URI = "MLFLOW_TRACKING_URI"
EXPERIMENT = "halftone"
TRAINING = "train"
STORE = "mlflow.db"
ARTIFACTS = "mlartifacts"
_SQLITE = "sqlite:///"
_BATCH = 1000  # metrics that MLflow takes at once
# no telemetry, and a server that does not answer must not hold a job up for minutes
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


@dataclass(frozen=True)
class Record:
    """What a verb tells about its run: settings, figures, and files worth a look (images, tables).

    curves: (step, seconds since 1970, value) by name; folders: files by the folder they go to. started and
    ended: `time.time()`, in seconds; None for now. once: leave it where a run of the same rule, name and
    output is there.
    """

    rule: str
    name: str
    output: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    started: float = field(default_factory=time.time)
    ended: float | None = None
    curves: Mapping[str, Sequence[tuple[int, float, float]]] = field(default_factory=dict)
    folders: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    once: bool = False

    @property
    def kind(self) -> str:
        """`scenario` for the rows of the table, to be compared with each other; `job` for the steps towards
        them; `training` of an embedded model.
        """
        return {"metrics": "scenario", TRAINING: "training"}.get(self.rule, "job")


def default_uri(folder: Path | None = None) -> str:
    """The store of the workflow in `folder`; of the main checkout for a copy that `dvc exp run --temp` works
    in.
    """
    folder = (folder or Path.cwd()).resolve()
    outer = next((parent.parent for parent in folder.parents if parent.name == ".dvc"), folder)
    return f"{_SQLITE}{outer / STORE}"


def prepare() -> None:
    """Start creating a SQLite store that is not there yet, in the background.

    Whoever logs first waits for it.
    """
    store = _store(os.environ.get(URI, ""))
    if store is not None and not store.exists():
        command = [sys.executable, "-m", "halftone.tracking"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        source = str(Path(__file__).resolve().parents[1])
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": source}, start_new_session=True, **quiet)


def log(record: Record) -> bool:
    """Log one finished run; never raises, returns whether it did not fail.

    A failure is told in the log, and the data is safe either way.
    """
    uri = os.environ.get(URI)
    if not uri:
        return True
    try:
        with _one_writer(_store(uri)):
            _log(uri, record)
    except Exception as fault:
        lines = str(fault).strip().splitlines()
        print(
            f"warning: MLflow at {uri} did not take the run of {record.rule} {record.name}"
            f" ({type(fault).__name__}: {lines[0] if lines else ''}); {record.output} is written and whole",
            file=sys.stderr,
        )
        return False
    return True


def _log(uri: str, record: Record) -> None:
    client, experiment = _open(uri)
    from mlflow.entities import Metric, Param

    tags = _tags(record)
    if record.once and _is_there(client, experiment, tags):
        return
    ended = int((record.ended or time.time()) * 1000)
    name = record.name if record.kind == "scenario" else f"{record.rule} {record.name}".strip()
    started = int(record.started * 1000)
    run = client.create_run(experiment, start_time=started, run_name=name, tags=tags).info.run_id
    metrics = [Metric(key, float(value), ended, 0) for key, value in record.metrics.items()]
    for key, points in record.curves.items():
        metrics += [Metric(key, float(value), int(at * 1000), step) for step, at, value in points]
    try:
        client.log_batch(
            run,
            params=[
                Param(key, str(value)[:500]) for key, value in record.params.items() if value is not None
            ],
        )
        for first in range(0, len(metrics), _BATCH):
            client.log_batch(run, metrics=metrics[first : first + _BATCH])
        for file in record.files:
            client.log_artifact(run, str(file))
        for folder, files in record.folders.items():
            for file in files:
                client.log_artifact(run, str(file), folder)
    except BaseException:
        client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run, "FINISHED", end_time=ended)


def _is_there(client: Any, experiment: str, tags: Mapping[str, str]) -> bool:
    """Whether a finished run has the same rule, name and output."""
    found = client.search_runs([experiment], f"tags.data_sha256 = '{tags['data_sha256']}'")
    same = ("rule", "scenario")
    return any(
        run.info.status == "FINISHED" and all(run.data.tags.get(key) == tags[key] for key in same)
        for run in found
    )


def _tags(record: Record) -> dict[str, str]:
    tags = {
        "rule": record.rule,
        "scenario": record.name,
        "kind": record.kind,
        "data_sha256": _data_hash(record.output),
    }
    if commit := _commit():
        tags["git_commit"] = commit
    return tags


def _data_hash(output: Path) -> str:
    """Of the output; of an artefact by its manifest, which holds the hash of every file."""
    manifest = output / "manifest.json"
    return sha256(manifest if manifest.is_file() else output)


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def _store(uri: str) -> Path | None:
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


@contextlib.contextmanager
def _one_writer(store: Path | None) -> Iterator[None]:
    """One process at a time writes a SQLite store: two that create it at once break it, many that write wait
    in vain.

    The store is created beside its place and renamed, so that one that is there is whole.
    """
    if store is None:
        yield
        return
    with store.with_name(f".{store.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not store.exists():
            unfinished = store.with_name(f".{store.name}.new")
            unfinished.unlink(missing_ok=True)
            _open(f"{_SQLITE}{unfinished}", artifacts=store.parent / ARTIFACTS)
            os.replace(unfinished, store)
        yield


def _open(uri: str, artifacts: Path | None = None) -> tuple[Any, str]:
    """A client and the id of our experiment, made where it does not exist."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        place = None if artifacts is None else artifacts.as_uri()
        with contextlib.suppress(Exception):  # another process may make it first, at a server
            return client, client.create_experiment(EXPERIMENT, artifact_location=place)
        found = client.get_experiment_by_name(EXPERIMENT)
        assert found is not None, f"experiment {EXPERIMENT!r} can be neither found nor made"
    return client, found.experiment_id


if __name__ == "__main__":
    _uri = os.environ.get(URI, "")
    with _one_writer(_store(_uri)):
        pass
