"""Verbs around the workflow: run it, and keep Snakemake and DVC of one mind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halftone.cli import options
from halftone.errors import UserError


def run(
    overlays: options.Overlays = None,
    cores: Annotated[
        int | None, typer.Option("--cores", "-c", min=1, help="Jobs beside each other. (Default: all cores.)")
    ] = None,
    profile: Annotated[
        Path, typer.Option(help="Snakemake profile; `slurm` beside it is for a cluster.")
    ] = Path("workflow/profiles/default"),
) -> int:
    """Bring the report of the selected tier up to date: all that settings, code or data have outdated."""
    from halftone import runner
    from halftone.workflow import config

    return runner.run([config.overlay(name) for name in overlays or []], profile=profile, cores=cores)


def stage(
    rule: Annotated[str, typer.Argument(help="A rule of the workflow.")],
    key: Annotated[str, typer.Argument(help="Model or scenario; none for summary and report.")] = "",
) -> int:
    """What a stage of dvc.yaml runs: one rule for one scenario, through Snakemake."""
    from halftone.workflow import dvc_door
    from halftone.workflow.paths import Rule

    if rule not in set(Rule):
        raise UserError(f"stage: no rule {rule!r}; rules are {', '.join(Rule)}")
    return dvc_door.stage(Rule(rule), key)


def code() -> None:
    """Write into dvc.yaml which source files each rule depends on, from what its verb imports."""
    from halftone.files import write_text
    from halftone.workflow import sources

    write_text("dvc.yaml", sources.rewritten(Path()))


def record() -> None:
    """Enter in dvc.lock what Snakemake has made of params.yaml. Refuses while anything is out of date."""
    from halftone.workflow import dvc_door

    dvc_door.record()
    print("recorded in dvc.lock")


def trust() -> None:
    """After `dvc checkout` or `dvc pull`: tell Snakemake what DVC has verified.

    Refuses if DVC sees any difference.
    """
    from halftone.workflow import dvc_door

    dvc_door.trust()
    print("Snakemake now knows what made these results")


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be removed.")] = False,
) -> None:
    """Remove results, logs and records of scenarios that neither params.yaml nor an overlay in experiments/
    names.
    """
    from halftone.workflow import config
    from halftone.workflow import prune as pruning

    settings = config.settings()
    gone = pruning.untracked(settings)
    found = pruning.prune(gone, dry_run=dry_run)
    for path in found:
        print(f"{'would remove' if dry_run else 'removed'} {path}")
    if not found:
        print("nothing to remove: every result belongs to a configured scenario")
