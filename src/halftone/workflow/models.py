"""Which files a rule reads when it loads a model: a changed weight must rerun what was made from it."""

from __future__ import annotations

import re
from pathlib import Path

from halftone.errors import UserError
from halftone.settings import RENDERS, Metrics, Model

METRIC_NETWORKS = Path("data/models/scenes-metrics")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_local(model: Model) -> bool:
    return Path(model.path).exists()


def files(model: Model) -> list[str]:
    """The files of a local model, sorted; none for a hub id, which its revision pins.

    Raises UserError for a path that is neither.
    """
    path = Path(model.path)
    if path.is_dir():
        found = _listed(path)
        if not found:
            raise UserError(
                f"{path}: the model folder is empty; get the model (make data) or correct models.*.path"
            )
        return found
    if path.is_file():
        return [str(path)]
    if not _HUB.fullmatch(model.path):
        raise UserError(f"{path}: no such model folder or file, and not a hub id; correct models.*.path")
    if model.revision is None:
        raise UserError(
            f"{path}: no such folder, so read as a hub id, and a hub id needs models.*.revision: "
            "a commit, so that the same weights are loaded every time"
        )
    return []


def real_files(model: Model) -> list[str]:
    """The files of a model's own real images; none for renders. Raises UserError where they are not there."""
    if model.real_images in (None, RENDERS):
        return []
    path = Path(model.real_images)
    found = _listed(path) if path.is_dir() else [str(path)] if path.is_file() else []
    if not found:
        raise UserError(f"{path}: no such folder or zip of real images; correct models.*.real_images")
    return found


def metric_files(metrics: Metrics) -> list[str]:
    """The files of the embedded metric networks, where a figure is taken with one of them."""
    if "scenes" not in (metrics.features, metrics.clip):
        return []
    return _listed(METRIC_NETWORKS)


def _listed(folder: Path) -> list[str]:
    return [str(p) for p in sorted(folder.rglob("*")) if p.is_file() and not _hidden(p.relative_to(folder))]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
