"""Nothing stays behind of a scenario or model that left the configuration.

Removed means: it stood in the same configuration files at an earlier run, or stands in dvc.lock, and no
configuration known here names it now. Rows of an overlay are therefore left alone by runs without that
overlay.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from halftone.errors import UserError
from halftone.files import write_text
from halftone.settings import Settings
from halftone.workflow import config, proxy
from halftone.workflow.paths import LOGS, RESULTS, SCRATCH, TIMINGS, UNITS, Rule

SEEN = Path(".snakemake/halftone-ids.json")
LOCK = Path("dvc.lock")


def ids(settings: Settings) -> set[str]:
    return {*settings.models, *settings.scenarios}


def known(current: Settings) -> set[str]:
    """Ids of the current settings, of params.yaml and of every overlay under experiments/."""
    found = ids(current)
    for overlays in ([], *([path] for path in sorted(config.OVERLAYS.glob("*.yaml")))):
        try:
            found |= ids(config.settings(overlays))
        except UserError:  # one that does not apply (any more): its names still count
            for path in overlays or [config.PARAMS]:
                found |= _names(path)
    return found


def remember(files: Sequence[str], settings: Settings) -> set[str]:
    """Note the ids of these configuration files; returns those noted before and gone from them now."""
    seen = _seen()
    key = " + ".join(files)
    gone = set(seen.get(key, [])) - ids(settings)
    seen[key] = sorted(ids(settings))
    SEEN.parent.mkdir(exist_ok=True)
    write_text(SEEN, json.dumps(seen, indent=2, sort_keys=True) + "\n")
    return gone - {name for other, names in seen.items() if other != key for name in names}


def removed(files: Sequence[str], settings: Settings) -> set[str]:
    """Ids that left the configuration since the last run with these files, or since dvc.lock was written."""
    return (remember(files, settings) | _locked()) - known(settings)


def untracked(settings: Settings) -> set[str]:
    """Every id under results/ or logs/ that no known configuration names, whoever made its files."""
    return {_id(path) for path in _files()} - known(settings)


def prune(gone: Iterable[str], *, dry_run: bool = False) -> list[Path]:
    """Remove the results, logs and timings of these ids, and their stages in dvc.lock.

    Returns what was removed.
    """
    wanted = set(gone)
    found = [path for path in _files() if _id(path) in wanted]
    if found and UNITS.is_dir():
        found.append(UNITS)  # a cache that rows share: what is still wanted is learned again when needed
    if not dry_run:
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _drop_stages(wanted)
    return found


def _files() -> list[Path]:
    """Files and folders under a folder of a rule, which are named by a model or scenario."""
    homes = (
        root / rule
        for root in (RESULTS, LOGS, TIMINGS, SCRATCH)
        for rule in (*Rule, proxy.NAME, proxy.OUTLIERS)
    )
    found = (path for home in homes if home.is_dir() for path in sorted(home.iterdir()))
    return [path for path in found if not path.name.startswith(".")]


def _id(path: Path) -> str:
    return path.name.split(".")[0]


def _seen() -> dict[str, list[str]]:
    try:
        return dict(json.loads(SEEN.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return {}


def _names(path: Path) -> set[str]:
    try:
        raw = config.read(path)
    except UserError:
        return set()
    return {str(name) for part in ("models", "scenarios") for name in raw.get(part) or {}}


def _locked() -> set[str]:
    return {key for key in map(_stage_id, _lock().get("stages", {})) if key}


def _stage_id(name: str) -> str:
    """`calibrate@my-row` -> `my-row`; nothing for a stage of another kind, such as one that makes a model."""
    stage, _, key = name.partition("@")
    return key if stage in set(Rule) else ""


def _lock() -> dict[str, Any]:
    try:
        return yaml.safe_load(LOCK.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}


def _drop_stages(gone: set[str]) -> None:
    lock = _lock()
    stages = lock.get("stages", {})
    kept = {name: stage for name, stage in stages.items() if _stage_id(name) not in gone}
    if len(kept) < len(stages):
        lock["stages"] = kept
        write_text(LOCK, yaml.safe_dump(lock, sort_keys=False, allow_unicode=True))
