"""The DVC door: what a stage of dvc.yaml runs, and how DVC and Snakemake learn of each other's work.

A stage is one rule for one scenario. It hands its rule's files to Snakemake, which holds the commands. A rule
that does not apply to a scenario (full precision is not calibrated) leaves an empty folder, since DVC's
foreach has no exceptions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from halftone.errors import UserError
from halftone.settings import Settings
from halftone.workflow import config, invoke, models, records
from halftone.workflow.paths import Rule, folder, outputs

STAGES = "dvc.yaml"  # of the results; those of prompts and models lie in data/
MODELS, PROMPTS = Path("data/models"), Path("data/prompts")


def stage(rule: Rule, key: str = "") -> int:
    """Run a rule for a scenario or model (none for `summary` and `report`); returns the exit code."""
    settings = config.settings()
    check(settings)
    known = settings.models if rule.per_model else settings.scenarios if rule.per_scenario else {"": None}
    if key not in known:
        raise UserError(
            f"stage {rule} {key}: params.yaml has no such {'model' if rule.per_model else 'scenario'}"
        )
    if home := folder(rule, key):
        home.mkdir(parents=True, exist_ok=True)
    targets = outputs(settings, rule, key)
    if not targets:
        return 0
    failed: list[invoke.Failure] = []
    code = invoke.run(invoke.command(targets, only=rule), lambda event: _tell(event, failed))
    for failure in failed:
        print(f"halftone: {failure}", file=sys.stderr)
    return failed[0].exit_code if failed else code


def _tell(event: invoke.Event, failed: list[invoke.Failure]) -> None:
    if event.kind == "failed":
        failed.append(invoke.failure(event))
    elif event.kind == "message":
        print(event.text, file=sys.stderr)


def check(settings: Settings) -> None:
    """Raises UserError for settings whose data DVC would not see change: dvc.yaml watches folders, not single
    files.
    """
    for name, model in settings.models.items():
        if models.is_local(model) and not _inside(model.path, MODELS):
            raise UserError(
                f"models.{name}.path: {model.path} lies outside {MODELS}, which is what dvc.yaml watches: "
                "move it there, or run Snakemake without DVC (halftone run)"
            )
    for name, model in settings.models.items():
        if models.real_files(model) and not _inside(str(model.real_images), MODELS):
            raise UserError(
                f"models.{name}.real_images: {model.real_images} lies outside {MODELS}, which is what "
                "dvc.yaml watches: move it there, or run Snakemake without DVC (halftone run)"
            )
    for kind, path in settings.prompts.items():
        if not _inside(path, PROMPTS):
            raise UserError(
                f"prompts.{kind}: {path} lies outside {PROMPTS}, which is what dvc.yaml watches: "
                "move it there, or run Snakemake without DVC (halftone run)"
            )
    for name, row in settings.scenarios.items():
        if not row.quantized and name != (expected := f"{row.model}_fp_{row.tier}"):
            raise UserError(
                f"scenarios.{name}: dvc.yaml looks for this full-precision row as {expected}: rename it"
            )


def _inside(path: str, home: Path) -> bool:
    return Path(path).resolve().is_relative_to(home.resolve())


def record(overlays: Sequence[Path] = ()) -> None:
    """Snakemake did the work, here or on a cluster: enter it in dvc.lock.

    Raises UserError where work is left.
    """
    settings = config.settings()
    check(settings)
    if overlays:
        raise UserError("record: dvc.lock holds the rows of params.yaml; put an overlay's rows there first")
    records.check(settings)
    said: list[invoke.Event] = []
    everything = [
        out for rule in Rule for key in _keys(settings, rule) for out in outputs(settings, rule, key)
    ]
    code = invoke.run(invoke.command(everything, options=["--dry-run"]), said.append)
    if code or not any(event.kind == "nothing" for event in said):
        left = next((event.jobs for event in said if event.kind == "planned"), {})
        jobs = ", ".join(f"{count} {rule}" for rule, count in left.items()) or "see `halftone run`"
        raise UserError(f"results are not up to date ({jobs}): run `halftone run` first")
    for rule in Rule:
        for key in _keys(settings, rule):
            if home := folder(rule, key):
                home.mkdir(parents=True, exist_ok=True)
    _dvc("commit", "--force", "--quiet", STAGES)


def trust() -> None:
    """DVC checked results out: have Snakemake record that the present settings and code made them.

    Raises UserError unless DVC says that every result is what dvc.lock holds for these very settings.
    """
    status = _dvc("status", "--quiet", STAGES, check=False)
    if status:
        raise UserError(
            "results differ from dvc.lock, or settings or code have changed since (see `dvc status`): "
            "run `dvc checkout`, or `dvc repro` to rebuild them"
        )
    shutil.rmtree(records.METADATA, ignore_errors=True)
    settings = config.settings()
    everything = [out for out in records.every_output(settings) if Path(out).exists()]
    options = ["--touch", "--forceall"]
    problems: list[str] = []
    code = invoke.run(
        invoke.command(everything, options=options),
        lambda event: problems.append(event.text) if event.kind == "message" else None,
    )
    if code:
        raise UserError(
            f"Snakemake could not record the results: {problems[-1] if problems else 'no message'}"
        )


def _keys(settings: Settings, rule: Rule) -> list[str]:
    return (
        list(settings.models) if rule.per_model else list(settings.scenarios) if rule.per_scenario else [""]
    )


def _dvc(*arguments: str, check: bool = True) -> int:
    command = [sys.executable, "-m", "dvc", *arguments]
    try:
        found = subprocess.run(command, env={**os.environ, "DVC_NO_ANALYTICS": "1"}, check=False)
    except FileNotFoundError:
        raise UserError("DVC is not installed here; run make setup") from None
    if check and found.returncode:
        raise UserError(f"`dvc {' '.join(arguments)}` failed; its message stands above")
    return found.returncode
