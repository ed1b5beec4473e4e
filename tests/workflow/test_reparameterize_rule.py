"""Range is moved for the rows that reparameterize, and for no others; what follows waits for it."""

from __future__ import annotations

import pytest
import yaml
from trees import ROOT, copy_workflow, with_stub
from workflow_dag import Planned, plan

from halftone.workflow import config
from halftone.workflow.options import options
from halftone.workflow.paths import Rule, outputs

TCR = "scenes-t2i_tcr_w4a8_demo"
FACTORS = f"results/reparameterize/{TCR}/factors.safetensors"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Planned]:
    tree = with_stub(copy_workflow(tmp_path_factory.mktemp("tcr") / "tree"))
    row = {"model": "scenes-t2i", "recipe": "static", "bits": "w4a8", "tier": "demo"}
    found = plan(tree, {"scenarios": {TCR: {**row, "axes": {"reparameterization": "tcr"}}}})
    return {job.name: job for job in found}


def test_only_the_row_that_asks_for_it_has_factors(jobs: dict[str, Planned]) -> None:
    assert [name for name in jobs if name.startswith("reparameterize")] == [f"reparameterize {TCR}"]
    assert FACTORS in jobs[f"reparameterize {TCR}"].outputs
    for rule in ("reconstruct", "calibrate"):
        assert FACTORS in jobs[f"{rule} {TCR}"].inputs
    others = [job for name, job in jobs.items() if TCR not in name]
    assert not any("reparameterize" in path for job in others for path in job.inputs)


def test_dvc_reads_what_the_rules_read(jobs: dict[str, Planned]) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for rule in ("reparameterize", "reconstruct", "calibrate"):
        stage = stages[rule]["do"]
        listed = [dep.replace("${key}", TCR).replace("${item.model}", "scenes-t2i") for dep in stage["deps"]]
        for path in jobs[f"{rule} {TCR}"].inputs:
            assert any(path == dep or path.startswith(f"{dep}/") for dep in listed), path
    assert "results/reparameterize/${key}" in stages["sensitivity"]["do"]["deps"]


def test_its_options_are_the_rows() -> None:
    settings = config.settings(base=ROOT / "params.yaml")
    static = "scenes-t2i_static_w4a8_demo"
    assert outputs(settings, Rule.REPARAMETERIZE, static) == []
    said = options(settings, Rule.REPARAMETERIZE, static)
    assert said == options(settings, Rule.CALIBRATE, static)
