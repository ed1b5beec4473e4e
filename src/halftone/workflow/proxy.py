"""The side rules `proxy` and `outliers`: what a full-precision model shows, made when asked for. No row of
the table needs them, and DVC does not know them."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from halftone.settings import Settings
from halftone.workflow.imports import closure
from halftone.workflow.sources import PACKAGE, SOURCE

NAME, OUTLIERS = "proxy", "outliers"
CARD, OUTLIERS_FOLDER = "results/proxy/{model}", "results/outliers/{model}"


def options(settings: Settings, key: str) -> str:
    """Every setting that decides what is said of a model; the trajectory brings its sampler's."""
    model = settings.models[key]
    revision = [] if model.revision is None else ["--revision", model.revision]
    batch = ["--batch-size", str(settings.calibration.batch_size)]
    return shlex.join([model.path, *revision, *batch, "--name", key])


@cache
def code_hash(root: Path, verb: str = NAME) -> str:
    """Of the files that a verb imports."""
    digest = hashlib.sha256()
    for name in sorted(closure(root / SOURCE, f"{PACKAGE}/cli/{verb}.py")):
        digest.update(f"{name}\0".encode() + (root / SOURCE / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def analyses(settings: Settings, rows: Iterable[str]) -> list[str]:
    """Outlier analyses that were made of the models of these rows: the page shows them, waits for none."""
    models = dict.fromkeys(settings.scenarios[row].model for row in rows)
    folders = [Path(OUTLIERS_FOLDER.format(model=model)) for model in models]
    return [str(path) for folder in folders if (path := folder / "outliers.json").is_file()]
