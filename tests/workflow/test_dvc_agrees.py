"""dvc.yaml and the Snakemake rules describe one pipeline; these fail when they drift apart."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_reruns import LEAVES, NOT_ALONE, PARAMS, STATIC, changed, downstream
from trees import copy_workflow, with_stub
from workflow_dag import Planned, plan

from halftone.workflow.paths import Rule

# Leaves for which DVC runs more than it would have to, and why that is let be. Never less.
COARSE = {
    "prompts.calibration": "a stage cannot name the one prompt set of its tier",
    "prompts.test": "a stage cannot name the one prompt set of its tier",
    "prompts.unseen": "a stage cannot name the one prompt set of its tier",
}


@dataclass(frozen=True)
class Stage:
    name: str
    outs: tuple[str, ...]
    deps: tuple[str, ...]
    params: tuple[str, ...]


def inside(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = with_stub(copy_workflow(tmp_path_factory.mktemp("drift") / "tree"))
    shutil.copytree(tree / "data/models/scenes-t2i", tree / "data/models/other")
    return tree


@pytest.fixture(scope="module")
def jobs(tree: Path) -> list[Planned]:
    return plan(tree)


@pytest.fixture(scope="module")
def stages(tree: Path) -> dict[str, Stage]:
    from dvc.dependency.param import ParamsDependency
    from dvc.repo import Repo

    before = Path.cwd()
    os.chdir(tree)
    try:
        found = {}
        for stage in Repo(str(tree)).index.stages:
            deps = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
            params = [key for dep in stage.deps if isinstance(dep, ParamsDependency) for key in dep.params]
            outs, reads = ([os.path.relpath(x.fs_path, tree) for x in kind] for kind in (stage.outs, deps))
            found[stage.addressing] = Stage(stage.addressing, tuple(outs), tuple(reads), tuple(params))
        return found
    finally:
        os.chdir(before)


def owner(path: str, stages: dict[str, Stage]) -> Stage:
    owners = [stage for stage in stages.values() if inside(path, stage.outs)]
    assert len(owners) == 1, f"{path} is an output of {[s.name for s in owners] or 'no DVC stage'}"
    return owners[0]


def test_there_is_one_stage_per_rule(stages: dict[str, Stage]) -> None:
    assert list(dict.fromkeys(name.partition("@")[0] for name in stages)) == list(Rule)


def test_every_output_belongs_to_the_stage_of_its_job(jobs: list[Planned], stages: dict[str, Stage]) -> None:
    for job in jobs:
        assert {owner(path, stages).name for path in job.outputs} == {stage_of(job)}


def test_every_input_is_a_dep(jobs: list[Planned], stages: dict[str, Stage]) -> None:
    for job in jobs:
        stage = owner(job.outputs[0], stages)
        for path in job.inputs:
            assert inside(path, stage.deps), f"{job.name} reads {path}, which {stage.name} does not list"


def test_no_dep_is_unread(jobs: list[Planned], stages: dict[str, Stage]) -> None:
    read: dict[str, set[str]] = {}
    for job in jobs:
        read.setdefault(job.rule, set()).update(job.inputs)
    for stage in stages.values():
        rule = stage.name.partition("@")[0]
        if rule not in read:  # no row of params.yaml needs it
            continue
        for dep in stage.deps:
            if dep.startswith("results/") and dep.split("/")[1] not in read:
                continue
            if dep.startswith("results/") and "@" in stage.name:  # of this scenario, or of one like it
                folder = "/".join(dep.split("/")[:2])
                assert any(path.startswith(folder) for path in read[rule]), (
                    f"{stage.name} does not read {dep}"
                )
            elif not dep.startswith("src/"):
                assert any(inside(path, (dep,)) for path in read[rule]), f"{stage.name} does not read {dep}"


def reached_by_dvc(leaf: str, stages: dict[str, Stage], idle: set[str]) -> set[str]:
    """Stages that DVC would run after a change of this leaf, if every stage that does something gives
    something new.

    idle: stages of rules that do not apply to their scenario; they run, and leave the empty folder they left
    before.
    """
    direct = {
        stage.name
        for stage in stages.values()
        if any(leaf == key or leaf.startswith(f"{key}.") for key in stage.params)
        or (leaf == "prompts.calibration" and PARAMS["prompts"]["calibration"] in stage.deps)
    }
    while True:
        outs = tuple(out for name in direct - idle for out in stages[name].outs)
        more = {
            stage.name
            for stage in stages.values()
            if any(inside(dep, outs) or any(inside(out, (dep,)) for out in outs) for dep in stage.deps)
        }
        if more <= direct:
            return direct
        direct |= more


def reached_by_snakemake(before: list[Planned], after: list[Planned]) -> set[str]:
    """Stages of what Snakemake would make anew: jobs with other settings or inputs, and what follows from
    them.
    """
    known = {path: (job.settings, job.inputs) for job in before for path in job.outputs}
    names = {
        job.name for job in after if any(known.get(p) != (job.settings, job.inputs) for p in job.outputs)
    }
    return {stage_of(job) for job in after if job.name in downstream(after, names)}


def stage_of(job: Planned) -> str:
    scenario = job.key.partition(" ")[0]  # a shard belongs to the stage of its scenario
    return f"{job.rule}@{scenario}" if scenario else job.rule


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_reaches_the_same_steps_through_both(
    tree: Path, jobs: list[Planned], stages: dict[str, Stage], leaf: str
) -> None:
    after = plan(tree, changed(leaf, LEAVES[leaf][0]))
    idle = set(stages) - {stage_of(job) for job in after}
    snakemake = reached_by_snakemake(jobs, after)
    dvc = reached_by_dvc(leaf, stages, idle) - idle
    assert not snakemake - dvc, f"Snakemake would run {sorted(snakemake - dvc)}, DVC would not notice"
    if leaf not in COARSE:
        assert not dvc - snakemake, f"DVC would run {sorted(dvc - snakemake)}, Snakemake would not"


def test_how_components_are_stored_reaches_dvc(
    tree: Path, jobs: list[Planned], stages: dict[str, Stage]
) -> None:
    """The calibration comes out as before, so that the export must see the setting by itself."""
    leaf = f"scenarios.{STATIC}.components"
    after = plan(tree, changed(leaf, "int8"))
    idle = set(stages) - {stage_of(job) for job in after}
    assert f"export@{STATIC}" in reached_by_snakemake(jobs, after)
    assert reached_by_snakemake(jobs, after) <= reached_by_dvc(leaf, stages, idle)
    assert any(leaf.startswith(f"{key}.") for key in stages[f"export@{STATIC}"].params)


@pytest.mark.parametrize("leaf", sorted(NOT_ALONE))
def test_leaves_that_change_rows_reach_the_table(stages: dict[str, Stage], leaf: str) -> None:
    assert {"summary", "report"} <= reached_by_dvc(leaf, stages, set())


def test_drift_is_seen(tree: Path, jobs: list[Planned], stages: dict[str, Stage]) -> None:
    """The comparison itself can fail: a param, a dep and an out that are left out are each told."""
    stage = stages[f"reconstruct@{STATIC}"]
    without: dict[str, Any] = {**stages, stage.name: Stage(stage.name, stage.outs, stage.deps, ())}
    with pytest.raises(AssertionError, match="DVC would not notice"):
        test_a_leaf_reaches_the_same_steps_through_both(tree, jobs, without, "reconstruction.budget")
    without[stage.name] = Stage(stage.name, stage.outs, stage.deps[1:], stage.params)
    with pytest.raises(AssertionError, match="does not list"):
        test_every_input_is_a_dep(jobs, without)
    without[stage.name] = Stage(stage.name, (), stage.deps, stage.params)
    with pytest.raises(AssertionError, match="no DVC stage"):
        test_every_output_belongs_to_the_stage_of_its_job(jobs, without)
