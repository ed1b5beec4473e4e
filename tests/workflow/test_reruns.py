"""A changed setting runs again what depends on it, and nothing else."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from trees import ROOT
from workflow_dag import Planned, plan

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
FP, MINMAX, STATIC = PARAMS["scenarios"]
SAMPLES = {f"sample {row}" for row in PARAMS["scenarios"]}
MEASURED = {f"metrics {row}" for row in PARAMS["scenarios"]}
MODEL = {
    "calibration_data scenes-t2i",
    f"reconstruct {STATIC}",
    f"calibrate {MINMAX}",
    f"calibrate {STATIC}",
    f"export {MINMAX}",
    f"export {STATIC}",
    f"sample {FP}",
}
SCHEDULE = {"calibration_data scenes-t2i", f"sample {FP}"}
SHARDS = {f"sample {row} {k}-of-2" for row in PARAMS["scenarios"] for k in (0, 1)}

# leaf -> another value, and the jobs that it changes directly. What depends on those follows.
LEAVES: dict[str, tuple[Any, set[str]]] = {
    "seed": (1, {"calibration_data scenes-t2i", f"reconstruct {STATIC}"} | MEASURED),
    "models.scenes-t2i.path": ("data/models/other", MODEL),
    "models.scenes-t2i.steps": (26, SCHEDULE),
    "models.scenes-t2i.guidance": (5.0, SCHEDULE),
    "models.scenes-t2i.resolution": (72, SCHEDULE),
    "prompts.calibration": ("data/prompts/unseen.txt", {"calibration_data scenes-t2i"}),
    "prompts.validation": ("data/prompts/unseen.txt", SAMPLES | MEASURED),
    "prompts.test": ("data/prompts/validation.txt", set()),
    "prompts.unseen": ("data/prompts/validation.txt", set()),
    "tiers.demo.prompts": ("test", SAMPLES | MEASURED),
    "tiers.demo.n_images": (63, SAMPLES),
    "calibration.n_prompts": (8, {"calibration_data scenes-t2i"}),
    "calibration.batch_size": (
        8,
        {"calibration_data scenes-t2i", f"calibrate {MINMAX}", f"calibrate {STATIC}"},
    ),
    "reconstruction.budget": ("smoke", {f"reconstruct {STATIC}"}),
    "reconstruction.batch_size": (16, {f"reconstruct {STATIC}"}),
    "reconstruction.cache_mib": (1024, set()),
    "sampling.shard_size": (32, SHARDS | MEASURED | {"report"}),
    "sampling.seed_a": (3, SAMPLES),
    "sampling.seed_b": (3, SAMPLES),
    "metrics.features": ("inception", MEASURED),
    "metrics.clip": ("ViT-B-32/openai", MEASURED),
    "metrics.bootstrap": (500, MEASURED),
    f"scenarios.{MINMAX}.bits": ("w8a8", {f"calibrate {MINMAX}"}),
    f"scenarios.{STATIC}.bits": ("w8a8", {f"reconstruct {STATIC}", f"calibrate {STATIC}"}),
    f"scenarios.{MINMAX}.recipe": ("static", {f"reconstruct {MINMAX}", f"calibrate {MINMAX}"}),
    f"scenarios.{STATIC}.recipe": ("minmax", {f"calibrate {STATIC}"}),
}
# another value of these names another model or tier: the whole scenario is another one
NOT_ALONE = {"tier"} | {
    f"scenarios.{row}.{leaf}" for row in PARAMS["scenarios"] for leaf in ("model", "tier")
}
NOT_ALONE |= {f"scenarios.{FP}.recipe"}


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def changed(leaf: str, value: Any) -> dict[str, Any]:
    """params.yaml with one leaf replaced."""
    config = copy.deepcopy(PARAMS)
    *path, last = leaf.split(".")
    node = config
    for key in path:
        node = node[key]
    node[last] = value
    return config


def downstream(jobs: list[Planned], names: set[str]) -> set[str]:
    """`names` and every job that reads, directly or not, what they write."""
    found = set(names)
    made = {out for job in jobs if job.name in found for out in job.outputs}
    while grown := {job.name for job in jobs if job.name not in found and made & set(job.inputs)}:
        found |= grown
        made |= {out for job in jobs if job.name in grown for out in job.outputs}
    return found


def check(jobs: list[Planned], direct: set[str]) -> None:
    """Exactly `direct` and what follows from it runs.

    (Snakemake gives a job that follows no reason of its own.)
    """
    assert {job.name for job in jobs if job.runs} == downstream(jobs, direct)
    followers = {name for one in direct for name in downstream(jobs, {one}) - {one}}
    assert direct - followers <= {job.name for job in jobs if job.direct} <= direct


def test_every_leaf_is_tried() -> None:
    assert set(leaves(PARAMS)) == set(LEAVES) | NOT_ALONE


@pytest.fixture(scope="module")
def tree(finished: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("reruns") / "tree"
    shutil.copytree(finished[0], where, symlinks=True)
    shutil.copytree(where / "data/models/scenes-t2i", where / "data/models/other")
    return where


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_reruns_exactly_what_depends_on_it(tree: Path, leaf: str) -> None:
    value, direct = LEAVES[leaf]
    jobs = plan(tree, changed(leaf, value))
    check(jobs, direct)


def test_axes_are_part_of_the_recipe(tree: Path) -> None:
    config = changed(f"scenarios.{MINMAX}.axes", {"time_axis": "per_call"})
    check(plan(tree, config), {f"calibrate {MINMAX}"})


def test_execution_is_a_matter_of_sampling(tree: Path) -> None:
    check(plan(tree, changed(f"scenarios.{MINMAX}.execution", "integer")), {f"sample {MINMAX}"})
    check(plan(tree, changed(f"scenarios.{MINMAX}.execution", "simulated")), set())


def test_components_are_a_matter_of_export(tree: Path) -> None:
    jobs = plan(tree, changed(f"scenarios.{MINMAX}.components", "int8"))
    check(jobs, {f"export {MINMAX}"})
    assert any(job.name == f"export {MINMAX}" and "--components int8" in str(job.settings) for job in jobs)
    check(plan(tree, changed(f"scenarios.{MINMAX}.components", "copy")), set())


def test_swapped_values_are_seen(tree: Path) -> None:
    """Snakemake compares a job's parameters as a set; each of ours is one string with names in it."""
    config = copy.deepcopy(PARAMS)
    config["sampling"] |= {"seed_a": 2, "seed_b": 1}
    check(plan(tree, config), SAMPLES)


def test_a_new_scenario_adds_its_chain(tree: Path) -> None:
    config = copy.deepcopy(PARAMS)
    config["scenarios"]["scenes-t2i_static_w8a8_demo"] = {**PARAMS["scenarios"][STATIC], "bits": "w8a8"}
    found = {job.name for job in plan(tree, config) if job.runs}
    steps = ("reconstruct", "calibrate", "analyze", "export", "sample", "metrics")
    assert found == {f"{step} scenes-t2i_static_w8a8_demo" for step in steps} | {"summary", "report"}


def test_an_edited_source_file_reruns_the_rules_that_use_it(copy: Callable[[], Path]) -> None:
    tree = copy()
    with (tree / "src/halftone/passes/reconstruct.py").open("a") as file:
        file.write("\n# edited\n")
    check(plan(tree), {f"reconstruct {STATIC}"})


def test_content_decides_not_the_clock(copy: Callable[[], Path]) -> None:
    """A checkout rewrites times; equal content is no reason to run."""
    tree = copy()
    for name in ("data/prompts/calibration.txt", f"results/sample/{FP}/0-of-1.zip"):
        (tree / name).touch()
    assert not [job.name for job in plan(tree) if job.runs]
    (tree / "data/models/scenes-t2i/unet/weights.safetensors").write_text("other weights\n")
    check(plan(tree), MODEL)


def test_a_changed_prompt_file_reruns_its_readers(copy: Callable[[], Path]) -> None:
    tree = copy()
    with (tree / "data/prompts/validation.txt").open("a") as file:
        file.write("a prompt more\n")
    check(plan(tree), SAMPLES | MEASURED)
