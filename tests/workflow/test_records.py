"""Results without a record: refused after a checkout, made again after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from halftone.errors import UserError
from halftone.workflow import config, records
from halftone.workflow.paths import every_output

SETTINGS = config.settings(base=Path(__file__).parents[2] / "params.yaml")


def test_results_of_a_checkout_are_refused_and_those_of_a_killed_job_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = every_output(SETTINGS)[0]
    Path(output).parent.mkdir(parents=True)
    Path(output).write_text("whole, but from whom?")
    with pytest.raises(UserError, match="make trust"):
        records.check(SETTINGS)
    marker = records.record_path(output, records.INCOMPLETE)
    marker.parent.mkdir(parents=True)
    marker.touch()
    records.check(SETTINGS)
    assert records.unrecorded(SETTINGS) == []
