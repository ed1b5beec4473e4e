"""Where outliers sit, for the page: what `halftone outliers` left of the models of a summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from halftone.files import read_json
from halftone.report.summary import Row

FOLDER = "outliers"


class OutlierPlots(NamedTuple):
    """Of one model: sentences, and two plots as SVG text."""

    model: str
    says: Sequence[str]
    map: str
    worst: str


def outliers_of(rows: Sequence[Row], results: Path) -> list[OutlierPlots]:
    """Of every model of these rows that was looked at, in their order. Raises UserError for damaged JSON."""
    found = []
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        home = results / FOLDER / model
        files = [home / name for name in ("outliers.json", "outliers.svg", "worst.svg")]
        if all(path.is_file() for path in files):
            plots = [path.read_text(encoding="utf-8") for path in files[1:]]
            found.append(OutlierPlots(model, tuple(read_json(files[0])["says"]), *plots))
    return found
