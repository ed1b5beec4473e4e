"""Snakemake's records of what made each result, and results that have none.

Snakemake decides by its records (`.snakemake/metadata`) whether settings, code or inputs have changed. A
result without a record, such as one that DVC has just checked out, counts as up to date whatever made it: a
changed setting would go unnoticed. So such results are not accepted until `halftone trust` has compared them
with dvc.lock.
"""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from pathlib import Path

from halftone.errors import UserError
from halftone.settings import Settings
from halftone.workflow.paths import every_output

METADATA = Path(".snakemake/metadata")
INCOMPLETE = Path(".snakemake/incomplete")


def record_path(output: str, folder: Path = METADATA) -> Path:
    """Where Snakemake (9, file persistence) keeps the record of an output: its path in base64, cut to file
    names.
    """
    longest = os.pathconf("/", "PC_NAME_MAX") - 1
    encoded = urlsafe_b64encode(output.encode()).decode()
    parts = [encoded[start : start + longest] for start in range(0, len(encoded), longest)]
    return folder.joinpath(*(f"@{part}" for part in parts[:-1]), parts[-1])


def unrecorded(settings: Settings) -> list[str]:
    """Results that exist and that Snakemake has no record of making.

    Those of a job that was killed do not count: Snakemake has marked them incomplete and makes them again.
    """
    return [
        out
        for out in every_output(settings)
        if Path(out).exists() and not record_path(out).exists() and not record_path(out, INCOMPLETE).exists()
    ]


def check(settings: Settings) -> None:
    """Raises UserError where there are results without a record."""
    if found := unrecorded(settings):
        more = f" and {len(found) - 1} more results" if len(found) > 1 else ""
        raise UserError(
            f"{found[0]}{more}: no record of what made this (after `dvc pull` or `dvc checkout`?); "
            "run `make trust`, or remove it"
        )
