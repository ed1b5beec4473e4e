"""The exported folder: integer weights packed at their bits, parameters, plan, provenance, manifest.

`write` makes one, `load` returns a diffusers pipeline from it, `verify` and `info` look into it. The format:
docs/artefact-format.md.
"""

from __future__ import annotations

from halftone.artefact.inspect import Check, info, verify
from halftone.artefact.load import load, provenance
from halftone.artefact.manifest import artefact_sha256, is_artefact
from halftone.artefact.write import write
from halftone.settings import Components

__all__ = [
    "Check",
    "Components",
    "artefact_sha256",
    "info",
    "is_artefact",
    "load",
    "provenance",
    "verify",
    "write",
]
