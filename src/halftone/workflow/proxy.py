"""The side rule `proxy`: a card about a model, made when asked for. No row of the table needs it, and DVC
does not know it."""

from __future__ import annotations

import hashlib
import shlex
from functools import cache
from pathlib import Path

from halftone.settings import Settings
from halftone.workflow.imports import closure
from halftone.workflow.sources import PACKAGE, SOURCE

NAME = "proxy"
CARD = "results/proxy/{model}"


def options(settings: Settings, key: str) -> str:
    """Every setting that decides what is on the card of a model; the trajectory brings its sampler's."""
    model = settings.models[key]
    revision = [] if model.revision is None else ["--revision", model.revision]
    batch = ["--batch-size", str(settings.calibration.batch_size)]
    return shlex.join([model.path, *revision, *batch, "--name", key])


@cache
def code_hash(root: Path) -> str:
    """Of the files that the verb imports."""
    digest = hashlib.sha256()
    for name in sorted(closure(root / SOURCE, f"{PACKAGE}/cli/{NAME}.py")):
        digest.update(f"{name}\0".encode() + (root / SOURCE / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]
