"""Windows of calls are measured for the rows that relax what a measurement says, and for no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from trees import copy_workflow, with_stub
from workflow_dag import Planned, plan

from halftone.workflow import config
from halftone.workflow.options import options
from halftone.workflow.paths import Rule, outputs

AUTO = "scenes-t2i_pcr_w4a8_demo"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Planned]:
    tree = with_stub(copy_workflow(tmp_path_factory.mktemp("auto") / "tree"))
    row = {"model": "scenes-t2i", "recipe": "pcr", "bits": "w4a8", "tier": "demo"}
    found = plan(tree, {"scenarios": {AUTO: {**row, "axes": {"relaxing": "auto"}}}})
    return {job.name: job for job in found}


def test_only_the_row_that_asks_for_it_is_measured(jobs: dict[str, Planned]) -> None:
    assert [name for name in jobs if name.startswith("sensitivity")] == [f"sensitivity {AUTO}"]
    measured = jobs[f"sensitivity {AUTO}"]
    assert f"results/reconstruct/{AUTO}/weights.safetensors" in measured.inputs
    assert measured.outputs[0] in jobs[f"calibrate {AUTO}"].inputs
    others = [job for name, job in jobs.items() if name.startswith("calibrate") and AUTO not in name]
    assert others
    assert not any("sensitivity" in path for job in others for path in job.inputs)


def test_dvc_reads_what_the_rule_reads(jobs: dict[str, Planned]) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    names = {"${key}": AUTO, "${item.model}": "scenes-t2i"}
    names["${prompts.calibration}"] = config.settings(base=ROOT / "params.yaml").prompts["calibration"]  # type: ignore[index]
    for rule in ("sensitivity", "calibrate"):
        stage = stages[rule]["do"]
        listed = list(stage["deps"])
        for placeholder, value in names.items():
            listed = [dep.replace(placeholder, value) for dep in listed]
        for path in jobs[f"{rule} {AUTO}"].inputs:
            assert any(path == dep or path.startswith(f"{dep}/") for dep in listed), path
    assert {"metrics.clip", "calibration.batch_size"} <= set(stages["sensitivity"]["do"]["params"])


def test_its_options_are_those_of_calibration_and_the_clip() -> None:
    settings = config.settings(base=ROOT / "params.yaml")
    static = "scenes-t2i_static_w4a8_demo"
    assert outputs(settings, Rule.SENSITIVITY, static) == []
    calibration = options(settings, Rule.CALIBRATE, static)
    assert options(settings, Rule.SENSITIVITY, static) == f"{calibration} --clip scenes"
