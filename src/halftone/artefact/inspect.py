"""Looking into an artefact: what it is, and whether it is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from halftone.artefact import strict, tensors, weight_only
from halftone.artefact.load import Description, describe, empty_denoiser, load, load_beside
from halftone.artefact.manifest import Manifest, artefact_sha256, check_file, check_no_strays, read_manifest
from halftone.errors import UserError
from halftone.plan import MIB, describe_relaxing, describe_start_token
from halftone.quantizers.packing import packed_size
from halftone.runtime import choose
from halftone.settings import Components


@dataclass(frozen=True)
class Check:
    """One thing `verify` looked at; `fault` says what is wrong, None if nothing."""

    name: str
    fault: str | None

    @property
    def passed(self) -> bool:
        return self.fault is None


def verify(folder: Path | str) -> list[Check]:
    """Check everything `load` relies on, and go on after a failure where that makes sense.

    Every file against the manifest; then the description, the denoiser's tensors, every other component, and
    loading as a whole.
    """
    folder = Path(folder)
    checks: list[Check] = []

    def check(name: str, action: Callable[[], Any]) -> Any:
        try:
            value = action()
        except UserError as fault:
            checks.append(Check(name, str(fault)))
            return None
        checks.append(Check(name, None))
        return value

    manifest: Manifest | None = check("manifest", lambda: read_manifest(folder))
    if manifest is None:
        return checks
    for name, expected in manifest.files.items():
        check(name, partial(check_file, folder, name, expected))
    check("no other files", lambda: check_no_strays(folder, manifest))
    described: Description | None = check("description", lambda: describe(folder))
    if described is None:
        return checks
    check("tensors", lambda: tensors.load(described.tensors, described.plan, empty_denoiser(described)))
    for name, entry in described.index.entries.items():
        if name != described.index.denoiser.name:
            check(name, partial(load_beside, described, entry))
    if all(c.passed for c in checks):
        check("loads", lambda: load(folder))
    return checks


def info(folder: Path | str) -> dict[str, Any]:
    """What an artefact is, as plain values: model, recipe, bits, schedule, sizes, float sites, provenance.

    With it, which kernels would run it in integers on this machine, and what would stay simulated. Files are
    checked against the manifest first. Raises UserError.
    """
    folder = Path(folder)
    described = describe(folder)
    plan, manifest = described.plan, described.manifest
    stored = manifest.files[f"{described.index.denoiser.name}/{tensors.FILE}"].size
    ideal = ideal_bytes(described)
    decisions = choose.choose(plan, empty_denoiser(described))
    return {
        "artefact_sha256": artefact_sha256(folder),
        "pipeline": described.index.pipeline_class.__name__,
        "recipe": plan.recipe,
        "protocol": plan.protocol.value,
        "axes": plan.axes.model_dump(mode="json"),
        **plan.columns(),
        "relaxed": describe_relaxing(plan),
        "start_token": describe_start_token(plan),
        "weight_mib": round(stored / MIB, 3),
        "original_weight_mib": round(plan.sizes.original_mib, 3),
        "size_mib": round(manifest.size / MIB, 3),
        "over_ideal": round(stored / ideal, 4),
        "quantized_sites": len(plan.quantized),
        "sites": [list(one) for one in plan.counts()],
        "float": dict(plan.float_list()),
        "integer": {"kernels": choose.kernels(decisions), "fallbacks": choose.fallbacks(decisions)},
        "components": {name: component_facts(described, name) for name in described.index.entries},
        "parity": {} if described.parity is None else described.parity.columns(),
        "files": len(manifest.files) + 1,
        "provenance": described.provenance.model_dump(mode="json"),
    }


def component_facts(described: Description, name: str) -> dict[str, Any]:
    """Of one component: how it is stored, MiB, where it is referenced, what lies beside int8 in float."""
    kept = described.manifest.files
    facts: dict[str, Any] = {"stored": "quantized"}
    if name != described.index.denoiser.name:
        facts["stored"] = described.stored(name).value
    if name in described.references:
        reference = described.references[name]
        kept = reference.files
        facts["from"] = f"{reference.repository}@{reference.revision}"
    elif facts["stored"] == Components.INT8:
        facts["float"] = strict.float_names(described.folder / name / weight_only.FILE)
    size = sum(file.size for path, file in kept.items() if path.startswith(f"{name}/"))
    return {**facts, "size_mib": round(size / MIB, 3)}


def ideal_bytes(described: Description) -> int:
    """Bytes of the denoiser's codes at their bits, and of its float rest as it is stored; nothing else."""
    weights = tensors.weight_sites(described.plan)
    codes = sum(packed_size(site.elements or 0, site.bits or 0) for site in weights)
    return codes + strict.float_bytes(described.tensors)
