"""Writing an artefact from a calibration, its plan and the model they were made for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from halftone.artefact import tensors, weight_only
from halftone.artefact.certify import certify
from halftone.artefact.load import PLAN, REFERENCES, SUFFIXES, Reference, describe, empty_denoiser
from halftone.artefact.manifest import PARITY, PROVENANCE, File, Manifest, write_manifest
from halftone.components import INDEX, SAFETY, quiet, small_json, weight_files, without_place
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.files import sha256, write_json, writing
from halftone.folding import divisors, reparameterized, reparameterized_layers
from halftone.passes.state import CalibrationState
from halftone.plan import Plan
from halftone.policies import Correction
from halftone.provenance import Provenance, code_commit
from halftone.runtime import simulated
from halftone.settings import Components
from halftone.source import Source
from halftone.trajectory import Trajectory


def write(
    folder: Path | str,
    calibration: Path | str,
    plan: Plan | Path | str,
    source: Source,
    components: Components = Components.COPY,
    trajectory: Trajectory | None = None,
) -> Manifest:
    """Write an artefact: the same bytes for the same input, the folder whole or absent, manifest.json last.

    calibration: the file of `halftone calibrate` (weight codes, activation parameters, schedule,
    provenance). source: the full-precision model; its float layers are stored, its quantized weights are not
    read. components: what becomes of text encoder and VAE (int8: `halftone.artefact.weight_only`); tokenizers
    and schedulers are always copied, the safety checker is left out. trajectory: the reference trajectory;
    with it, what was written is run in integers and simulated, and the artefact gets its parity certificate:
    here, where the full-precision model is at hand and the folder has one maker. Raises UserError where the
    three do not belong together, or a value cannot be stored.
    """
    check_components(source, components)
    folder, calibration = Path(folder), Path(calibration)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    state, provenance = CalibrationState.load(calibration)
    _check_same_model(calibration, provenance, plan, source)
    denoiser = denoiser_of(source.pipeline)
    contents = _contents(calibration, state, plan, denoiser)
    provenance = provenance.model_copy(update={"code_commit": code_commit()})
    check_place(folder)
    with writing(folder) as temporary:
        temporary.mkdir()
        name = "unet" if denoiser is getattr(source.pipeline, "unet", None) else "transformer"
        (temporary / name).mkdir()
        write_json(temporary / name / "config.json", without_place(denoiser.config))
        tensors.save(temporary / name / tensors.FILE, contents, plan)
        plan.save(temporary / PLAN)
        write_json(temporary / PROVENANCE, provenance.model_dump(mode="json"))
        _write_components(temporary, source, name, components)
        for path in temporary.rglob("*"):  # libraries write some files for their owner only
            path.chmod(0o755 if path.is_dir() else 0o644)
        manifest = write_manifest(temporary)
        written = describe(temporary)  # what cannot be read back must not be left behind
        stored = tensors.load(written.tensors, plan, empty_denoiser(written))
        for entry in written.index.entries.values():
            if written.stored(entry.name) is Components.INT8:
                weight_only.load(temporary, entry)
        if trajectory is not None:
            certify(written, stored, denoiser, trajectory).save(temporary / PARITY)
            (temporary / PARITY).chmod(0o644)
            manifest = write_manifest(temporary)
    return manifest


def check_components(source: Source, components: Components) -> None:
    """Raises UserError where components are to be referenced and the model is not on the hub."""
    on_hub = source.folder is not None and source.revision is not None and len(source.revision) == 40
    if components is Components.REFERENCE and not on_hub:
        raise UserError(
            f"{source.path}: is not on the hub at a commit, so its components cannot be referenced: "
            "choose copy or int8"
        )


def check_place(folder: Path) -> None:
    """Raises UserError where something lies that is no artefact."""
    if folder.is_file() or (folder.is_dir() and not (folder / PLAN).is_file() and any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an artefact; choose another folder")


def _contents(path: Path, state: CalibrationState, plan: Plan, denoiser: nn.Module) -> tensors.Contents:
    """Codes and parameters of every quantized site of the plan, with the float rest of the denoiser."""
    for what, wanted, found in (
        ("weight", {site.module for site in tensors.weight_sites(plan)}, set(state.weights)),
        ("activation site", {site.name for site in tensors.activation_sites(plan)}, set(state.activations)),
    ):
        for problem, names in (("lacks", wanted - found), ("has, against the plan,", found - wanted)):
            if names:
                raise UserError(f"{path}: {problem} {what} {min(names)}; run halftone analyze again")
    if (state.correction is not None) != (plan.axes.correction is not Correction.NONE):
        raise UserError(f"{path}: corrects the output otherwise than the plan; run halftone analyze again")
    if state.relaxed_calls != plan.relaxed_calls:
        raise UserError(f"{path}: relaxes other calls than the plan; run halftone analyze again")
    divided = reparameterized_layers(
        denoiser, [simulated.site_of(site, denoiser) for site in plan.sites], plan.axes
    )
    if {name for one in divided for name in one.layers} != set(state.factors):
        raise UserError(f"{path}: reparameterizes other layers than the plan; run halftone calibrate again")
    with reparameterized(denoiser, divided, state.factors):
        floats = {
            name: value.detach().cpu()
            for name, value in denoiser.state_dict().items()
            if not (name.endswith(".weight") and name.removesuffix(".weight") in state.weights)
        }
    activations = {site: parameters.quantizer for site, parameters in state.activations.items()}
    choices = {
        site: parameters.log2 for site, parameters in state.activations.items() if parameters.log2 is not None
    }
    if choices.keys() != {site.name for site in tensors.adaptive_sites(plan)}:
        raise UserError(f"{path}: chose codes for other sites than the plan; run halftone analyze again")
    return tensors.Contents(
        state.weights,
        activations,
        floats,
        state.timesteps,
        state.noise_levels,
        divisors(divided, state.factors),
        choices,
        state.correction,
    )


def _check_same_model(path: Path, provenance: Provenance, plan: Plan, source: Source) -> None:
    if provenance.model_sha256 not in (None, source.weights_sha256):
        raise UserError(
            f"{path}: was made for other weights than {source.path} has now; start from calibration-data"
        )
    for key, theirs, ours in (
        ("recipe", provenance.recipe, plan.recipe),
        ("bits", provenance.bits, plan.bits),
        ("protocol", provenance.protocol, plan.protocol),
        ("correction", provenance.axes and provenance.axes.correction, plan.axes.correction),
    ):
        if theirs is not None and str(theirs) != str(ours):
            raise UserError(f"{path}: {key} is {theirs}, the plan's {ours}; run halftone analyze again")


def _write_components(folder: Path, source: Source, denoiser: str, components: Components) -> None:
    index = small_json(source.folder / INDEX) if source.folder else _index(source.pipeline)
    for name in SAFETY:
        if name in index and source.pipeline.components.get(name) is None:
            index[name] = [None, None]
            index["requires_safety_checker"] = False
    write_json(folder / INDEX, without_place(index))
    references: dict[str, Any] = {}
    for name, component in source.pipeline.components.items():
        if component is None or name == denoiser:
            continue
        if components is Components.REFERENCE and isinstance(component, nn.Module):
            references[name] = _reference(source, name).model_dump(mode="json")
        elif components is Components.INT8 and isinstance(component, nn.Module):
            weight_only.save(folder, name, component)
        elif source.folder is not None:
            _copy(source.folder, name, folder / name, isinstance(component, nn.Module))
        else:
            _save(component, folder / name)
    if references:
        write_json(folder / REFERENCES, references)


def _index(pipeline: Any) -> dict[str, Any]:
    """What model_index.json says of a pipeline that was not loaded from a folder."""
    names = {"_class_name": type(pipeline).__name__, "_diffusers_version": diffusers.__version__}
    return {**without_place(pipeline.config), **names}


def _files(folder: Path, name: str, has_weights: bool) -> list[Path]:
    """The files of a component that loading it reads: configurations and safetensors, no pickles, no code."""
    files = [
        path for path in sorted((folder / name).iterdir()) if path.is_file() and not path.name.startswith(".")
    ]
    chosen = [path for path in files if path.suffix in SUFFIXES and path.suffix != ".safetensors"]
    return chosen + (weight_files(folder, name)[0] if has_weights else [])


def _copy(folder: Path, name: str, target: Path, has_weights: bool) -> None:
    target.mkdir()
    for path in _files(folder, name, has_weights):
        shutil.copyfile(path, target / path.name)


def _reference(source: Source, name: str) -> Reference:
    assert source.folder is not None
    assert source.revision is not None
    files = {
        f"{name}/{path.name}": File(size=path.stat().st_size, sha256=sha256(path))
        for path in _files(source.folder, name, True)
    }
    return Reference(repository=source.path, revision=source.revision, files=files)


def _save(component: Any, target: Path) -> None:
    """A component of a single-file model, in half precision where that changes no value."""
    if isinstance(component, nn.Module):
        values = [v for v in component.state_dict().values() if v.is_floating_point()]
        half = all(torch.equal(v.half().to(v.dtype), v) for v in values)
        dtype = values[0].dtype if values else torch.float32
        with quiet():
            component.to(torch.float16 if half else dtype)
            component.save_pretrained(target, safe_serialization=True)
            component.to(dtype)
        config = small_json(target / "config.json")
        write_json(target / "config.json", without_place(config))
    else:
        component.save_pretrained(target)
