"""From an artefact to an ordinary diffusers pipeline whose denoiser is quantized."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from halftone.artefact import tensors, weight_only
from halftone.artefact.manifest import (
    PARITY,
    PROVENANCE,
    File,
    Manifest,
    check_file,
    check_files,
    read_manifest,
)
from halftone.calls import CallContext, legacy_slots
from halftone.components import INDEX, Entry, Index, assemble, empty_component, load_component, read_index
from halftone.correction import correct
from halftone.errors import UserError
from halftone.files import read_json, sha256
from halftone.plan import Execution, Plan
from halftone.provenance import Provenance
from halftone.quantizers.bits import Bits
from halftone.runtime import integer, simulated
from halftone.runtime.parity import Parity
from halftone.settings import Components
from halftone.source import download

PLAN, REFERENCES = "plan.json", "components.json"
SUFFIXES = (".json", ".txt", ".safetensors", ".model")


class Reference(BaseModel):
    """A component that lies on the hub, with the files it consists of."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    repository: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    files: dict[str, File]


@dataclass(frozen=True)
class Description:
    """All of an artefact but its tensors, checked and read."""

    folder: Path
    manifest: Manifest
    index: Index
    plan: Plan
    provenance: Provenance
    references: dict[str, Reference]
    parity: Parity | None

    @property
    def tensors(self) -> Path:
        return self.folder / self.index.denoiser.name / tensors.FILE

    def stored(self, name: str) -> Components:
        """How a component other than the denoiser is kept."""
        if name in self.references:
            return Components.REFERENCE
        return Components.INT8 if f"{name}/{weight_only.FILE}" in self.manifest.files else Components.COPY


def load(
    artefact: Path | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    execution: Execution | str = Execution.SIMULATED,
    **components: Any,
) -> Any:
    """A diffusers pipeline of the class that was quantized, ready to sample from.

    artefact: the folder. dtype: of weights and activations in float; scales stay float32. execution:
    `simulated` in float, or `integer`, on the CPU. components: parts of the pipeline to use in place of the
    artefact's own (`scheduler=...`), None to leave one out. The full-precision weights of quantized layers
    are never looked for. A run with another schedule than the calibrated one warns and takes the parameters
    of the nearest noise levels.
    Raises UserError for anything missing, damaged, unknown or inconsistent in the folder.
    """
    build = _builder(execution, device)
    described = describe(Path(artefact))
    denoiser = empty_denoiser(described)
    contents = tensors.load(described.tensors, described.plan, denoiser)
    context = context_of(contents, described.plan)
    build(
        denoiser,
        described.plan,
        weights=contents.weights,
        activations=contents.activations,
        floats=contents.floats,
        divisors=contents.divisors,
        choices=contents.choices,
        context=context,
        dtype=dtype,
    )
    if contents.correction is not None:
        correct(denoiser, contents.correction, context)
    name = described.index.denoiser.name
    if name in components:
        raise UserError(f"{name} is what the artefact holds; load another artefact to use another one")
    loaded = {name: denoiser, **components}
    for entry in described.index.entries.values():
        if entry.name not in loaded:
            loaded[entry.name] = load_beside(described, entry, dtype)
    pipeline = assemble(described.folder, loaded)
    if device is not None:
        pipeline.to(device)
    context.attach(denoiser, pipeline)
    denoiser.save_pretrained = pipeline.save_pretrained = partial(_refuse_saving, described.folder)
    return pipeline


def context_of(contents: tensors.Contents, plan: Plan) -> CallContext:
    """The call context of an artefact's denoiser, not attached."""
    lookup = legacy_slots(contents.timesteps) if plan.axes.legacy_lookup else None
    return CallContext(contents.timesteps, contents.noise_levels, lookup)


def _refuse_saving(artefact: Path, *arguments: Any, **options: Any) -> None:
    """In place of a quantized model's `save_pretrained`, whose files no library could read again."""
    raise UserError(
        f"{artefact}: its denoiser is quantized and has no diffusers form; copy the artefact's folder, "
        "or save other components by themselves (pipeline.vae.save_pretrained)"
    )


def load_beside(described: Description, entry: Entry, dtype: torch.dtype = torch.float32) -> Any:
    """A component other than the denoiser, from wherever and however it is kept. Raises UserError."""
    if described.stored(entry.name) is Components.INT8:
        return weight_only.load(described.folder, entry, dtype)
    return load_component(home_of(described, entry.name), entry, dtype)


def _builder(execution: Execution | str, device: torch.device | str | None) -> Callable[..., Any]:
    if execution == Execution.SIMULATED:
        return simulated.build
    if execution != Execution.INTEGER:
        raise UserError(f"execution {execution!r}: an artefact runs simulated or integer")
    if device is not None and torch.device(device).type != "cpu":
        raise UserError(f"integer execution runs on the CPU, not on {device}; choose simulated, or the CPU")
    return integer.build


def provenance(artefact: Path | str) -> Provenance:
    """What an artefact says of its making; only that file is checked. Raises UserError."""
    folder = Path(artefact)
    manifest = read_manifest(folder)
    if PROVENANCE not in manifest.files:
        raise UserError(f"{folder}: the manifest lacks {PROVENANCE}; this is no whole artefact")
    check_file(folder, PROVENANCE, manifest.files[PROVENANCE])
    return _provenance(folder)


def describe(folder: Path) -> Description:
    """Check an artefact's files against its manifest, and read what describes it. Raises UserError."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    index = read_index(folder)
    references = _references(folder, manifest, index)
    _check_layout(folder, manifest, index, references)
    plan = _plan(folder)
    if plan.denoiser != index.denoiser.kind.__name__:
        raise UserError(
            f"{folder}: the plan is for {plan.denoiser[:100]}, {INDEX} names {index.denoiser.kind.__name__}"
        )
    known = _provenance(folder)
    if known.pipeline_class != index.pipeline_class.__name__:
        raise UserError(
            f"{folder}: was made from a {known.pipeline_class[:100]}, not a {index.pipeline_class.__name__}"
        )
    parity = Parity.load(folder / PARITY) if PARITY in manifest.files else None
    return Description(folder, manifest, index, plan, known, references, parity)


def empty_denoiser(described: Description) -> nn.Module:
    """The denoiser on the meta device, from its configuration; only buffers that no file holds are real."""
    return empty_component(described.folder, described.index.denoiser)


def home_of(described: Description, name: str) -> Path:
    """The folder in which component `name` has its subfolder: the artefact, or a repository of the hub."""
    reference = described.references.get(name)
    if reference is None:
        return described.folder
    home = download(reference.repository, reference.revision, reference.files)
    for file, expected in reference.files.items():
        path = home / file
        if not path.is_file() or path.stat().st_size != expected.size or sha256(path) != expected.sha256:
            where = f"{reference.repository} at {reference.revision}"
            raise UserError(
                f"{described.folder}: {file} of {where} is not the file the artefact was made with"
            )
    return home


def _plan(folder: Path) -> Plan:
    try:
        plan = Plan.load(folder / PLAN)
    except (RecursionError, ValueError) as fault:
        raise UserError(
            f"{folder / PLAN}: not a plan ({type(fault).__name__}); get the artefact again"
        ) from None
    try:
        Bits.parse(plan.bits)
    except ValueError as fault:
        raise UserError(f"{folder / PLAN}: {str(fault)[:200]}; get the artefact again") from None
    names = [site.name for site in plan.sites]
    if len(set(names)) != len(names):
        raise UserError(f"{folder / PLAN}: a site is listed twice; get the artefact again")
    return plan


def _provenance(folder: Path) -> Provenance:
    path = folder / PROVENANCE
    try:
        return Provenance.model_validate(read_json(path))
    except (ValidationError, RecursionError, ValueError) as fault:
        raise UserError(
            f"{path}: not a provenance ({type(fault).__name__}); get the artefact again"
        ) from None


def _references(folder: Path, manifest: Manifest, index: Index) -> dict[str, Reference]:
    if REFERENCES not in manifest.files:
        return {}
    path = folder / REFERENCES
    try:
        content = read_json(path)
        references = {str(name): Reference.model_validate(value) for name, value in dict(content).items()}
    except (ValidationError, RecursionError, TypeError, ValueError) as fault:
        raise UserError(
            f"{path}: not a list of components ({type(fault).__name__}); get the artefact again"
        ) from None
    for name, reference in references.items():
        if name not in index.entries or name == index.denoiser.name:
            raise UserError(f"{path}: {name[:100]!r} is not a component to be referenced")
        for file in reference.files:
            parts = PurePosixPath(file).parts
            if len(parts) != 2 or parts[0] != name or not re.fullmatch(r"[\w-][\w.-]*", parts[1]):
                raise UserError(f"{path}: {file[:200]!r} is not a file of {name}; do not trust it")
    return references


def _check_layout(folder: Path, manifest: Manifest, index: Index, references: Iterable[str]) -> None:
    """Every file has a place in the format, and every component is there, once."""
    denoiser = index.denoiser.name
    needed = {INDEX, PLAN, PROVENANCE, f"{denoiser}/config.json", f"{denoiser}/{tensors.FILE}"}
    if missing := needed - set(manifest.files):
        raise UserError(f"{folder}: the manifest lacks {min(missing)}; this is no whole artefact")
    copied = set(index.entries) - set(references) - {denoiser}
    for name in copied:
        _check_int8(folder, manifest, index.entries[name])
    for name in set(manifest.files) - needed - {REFERENCES, PARITY}:
        home, _, rest = name.partition("/")
        if home not in copied or "/" in rest or not rest.endswith(SUFFIXES):
            raise UserError(f"{folder}: {name} has no place in an artefact; do not trust it")
    for name in copied:
        if not any(file.startswith(f"{name}/") for file in manifest.files):
            raise UserError(f"{folder}: component {name!r} is missing; the artefact is incomplete")


def _check_int8(folder: Path, manifest: Manifest, entry: Entry) -> None:
    """Where a component has int8 weights, these and its configuration are all that it has."""
    allowed = {f"{entry.name}/config.json", f"{entry.name}/{weight_only.FILE}"}
    found = {name for name in manifest.files if name.startswith(f"{entry.name}/")}
    if f"{entry.name}/{weight_only.FILE}" in found:
        strays = found - allowed if issubclass(entry.kind, nn.Module) else found
        if strays:
            raise UserError(f"{folder}: {min(strays)} has no place in an artefact; do not trust it")
