"""The jobs that Snakemake would run, with their reasons, from its own plan: no parsing of what it prints."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakemake.api import SnakemakeApi
from snakemake.settings.enums import Quietness
from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, ResourceSettings


@dataclass(frozen=True)
class Planned:
    """One job of the plan. `settings`: what of its parameters makes it run again, once changed.

    `direct`: it runs for a reason of its own, not because an input is made anew.
    """

    rule: str
    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: str
    runs: bool
    direct: bool

    @property
    def name(self) -> str:
        return f"{self.rule} {self.key}".strip()


def plan(tree: Path, config: Mapping[str, Any] | None = None, *, force: bool = False) -> list[Planned]:
    """Every job towards the report. config: replaces leaves of params.yaml."""
    before, said = Path.cwd(), io.StringIO()
    os.chdir(tree)
    try:
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(said),
            SnakemakeApi(OutputSettings(quiet={Quietness.ALL}, dryrun=True)) as api,
        ):
            workflow = api.workflow(
                resource_settings=ResourceSettings(cores=1),
                config_settings=ConfigSettings(config=dict(config or {})),
                snakefile=Path("Snakefile"),
            )
            dag = workflow.dag(DAGSettings(targets={"results/report.html"}, forceall=force))
            dag.execute_workflow(executor="dryrun")
            found = workflow._workflow.dag  # no public accessor
            return [_planned(found, job) for job in found.jobs if job.rule.name != "all"]
    finally:
        os.chdir(before)


def _planned(dag: Any, job: Any) -> Planned:
    reason = dag.reason(job)
    of_its_own = (
        reason.params_changed or reason.code_changed or reason.input_changed or reason.missing_output
        or reason.updated_input or reason.incomplete_output
    )  # fmt: skip
    wildcards = job.wildcards_dict
    key = wildcards.get("scenario") or wildcards.get("model") or ""
    shard = wildcards.get("shard")
    return Planned(
        job.rule.name,
        key if shard in (None, "0-of-1") else f"{key} {shard}",
        tuple(map(str, job.input)),
        tuple(map(str, job.output)),
        f"{job.params.options} {job.params.code}",
        bool(dag.needrun(job)),
        bool(dag.needrun(job) and of_its_own),
    )
