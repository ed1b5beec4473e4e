"""The side rules `proxy` and `outliers`: what a full-precision model shows, made when asked for. No row of
the table needs them, and DVC does not know them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from halftone.settings import Settings

NAME, OUTLIERS = "proxy", "outliers"
CARD, OUTLIERS_FOLDER = "results/proxy/{model}", "results/outliers/{model}"


def options(settings: Settings, key: str) -> str:
    """Every setting that decides what is said of a model; the trajectory brings its sampler's."""
    model = settings.models[key]
    revision = [] if model.revision is None else ["--revision", model.revision]
    batch = ["--batch-size", str(settings.calibration.batch_size)]
    return shlex.join([model.path, *revision, *batch, "--name", key])


def analyses(settings: Settings, rows: Iterable[str]) -> list[str]:
    """Outlier analyses that were made of the models of these rows: the page shows them, waits for none."""
    models = dict.fromkeys(settings.scenarios[row].model for row in rows)
    folders = [Path(OUTLIERS_FOLDER.format(model=model)) for model in models]
    return [str(path) for folder in folders if (path := folder / "outliers.json").is_file()]
