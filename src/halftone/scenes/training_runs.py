"""A training as a run in MLflow: its settings, its curves over images seen, and its sheets.

Made from the files that a training leaves, so that any training can be logged, also long after. The store is
the one that `halftone.tracking` finds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from halftone import tracking
from halftone.errors import EXIT_USER, UserError

STEP, CLOCK = "images", "at"
_NO_CURVES = {STEP, CLOCK, "minutes_left"}
_DAY = 24 * 3600
_PICTURES = {".png", ".jpg", ".webp"}
Line = dict[str, Any]


def read_log(path: Path) -> list[Line]:
    """The lines of a training's log, in order. Raises UserError where it is missing, empty or no such log."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path}: no log of a training; give the .jsonl file that it wrote") from None
    lines: list[Line] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values = json.loads(line)
            values[STEP] = int(values[STEP])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: line {number} is no JSON object with a number of {STEP}; give a training's log"
            ) from None
        lines.append(values)
    if not lines:
        raise UserError(f"{path}: the log is empty; wait until the training has written to it")
    return lines


def times(lines: Sequence[Line], ended: float) -> list[float]:
    """Seconds since 1970 of every line, the last one at `ended`: the log tells the time of day alone."""
    found = [ended]
    clocks = [_seconds(line.get(CLOCK)) for line in lines]
    for before, after in zip(clocks[-2::-1], clocks[:0:-1], strict=True):
        step = 0 if before is None or after is None else (after - before) % _DAY
        found.append(found[-1] - step)
    return found[::-1]


def curves(lines: Sequence[Line], at: Sequence[float]) -> dict[str, list[tuple[int, float, float]]]:
    """Every number that the log tells over images seen: (images, time, value).

    A training that was killed went on from its last checkpoint, so the log may go back: the later line of two
    counts, and what it replaces is left out.
    """
    kept: dict[str, list[tuple[int, float, float]]] = {}
    for line, second in zip(lines, at, strict=True):
        for name, value in line.items():
            if name in _NO_CURVES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            points = kept.setdefault(name, [])
            while points and points[-1][0] >= line[STEP]:
                points.pop()
            points.append((line[STEP], second, float(value)))
    return kept


def sheets(folder: Path | None, name: str) -> list[Path]:
    """Pictures of a training, in order of images seen: `images-0012345.png`, and those named after the model.

    Raises UserError for a folder that is not there.
    """
    if folder is None:
        return []
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of sheets; leave --sheets out if there are none")
    found = [*folder.glob("images-*"), *folder.glob(f"{name}*")]
    return sorted(path for path in found if path.suffix in _PICTURES)


def log_training(
    name: str, log: Path, folder: Path | None = None, settings: Mapping[str, Any] | None = None
) -> int | None:
    """Log one training, unless the same log was logged under this name before.

    Returns the number of sheets, or None where MLflow did not take the run; without a tracking URI nothing is
    written. Raises UserError for a bad log or folder.
    """
    lines, pictures = read_log(log), sheets(folder, name)
    at = times(lines, log.stat().st_mtime)
    found = curves(lines, at)
    done = tracking.log(
        tracking.Record(
            tracking.TRAINING,
            name,
            log,
            params={"model": name, **(settings or {})},
            metrics={"images_seen": lines[-1][STEP], "hours": (at[-1] - at[0]) / 3600},
            files=(log,),
            started=at[0],
            ended=at[-1],
            curves=found,
            folders={"sheets": pictures},
            once=True,
        )
    )
    return len(pictures) if done else None


class Training(Protocol):
    """A trainer of `halftone.scenes`: `work` holds its sheets; `plan` is a dataclass."""

    work: Path
    plan: Any
    images: int
    log: Any


def log_finished(name: str, training: Training) -> None:
    """Log a training that has reached the end of its plan; one that was stopped goes on later."""
    if training.images >= training.plan.images:
        folder = training.work / "sheets"
        settings = asdict(training.plan)
        log_training(name, training.log.path, folder if folder.is_dir() else None, settings)


def log_run(
    log: Annotated[
        Path, typer.Option(help="Log of the training, one JSON object a line.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="Of the model that was trained.", show_default=False)],
    sheets: Annotated[
        Path | None, typer.Option(help="Folder of its pictures, images-0012345.png.", show_default=False)
    ] = None,
    settings: Annotated[
        str | None, typer.Option(help="Its settings, as JSON: '{\"batch\": 32}'.", show_default=False)
    ] = None,
) -> None:
    """Log a training in MLflow: at MLFLOW_TRACKING_URI, or in mlflow.db of the present folder."""
    os.environ.setdefault(tracking.URI, tracking.default_uri())
    started = time.monotonic()
    try:
        pictures = log_training(name, log, sheets, _settings(settings))
    except UserError as fault:
        typer.echo(f"halftone: {fault}", err=True)
        raise typer.Exit(EXIT_USER) from None
    if pictures is None:
        raise typer.Exit(1)  # a warning has said why
    took = time.monotonic() - started
    typer.echo(f"{name}: {log} and {pictures} sheets at {os.environ[tracking.URI]}, {took:.0f} s")


def _settings(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as fault:
        raise UserError(f"--settings: not JSON ({fault})") from None
    if not isinstance(found, dict):
        raise UserError("--settings: must be a JSON object of names and values")
    return found


def _seconds(clock: Any) -> int | None:
    """`07:29:58` -> 26998."""
    try:
        hours, minutes, seconds = map(int, str(clock).split(":"))
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds
