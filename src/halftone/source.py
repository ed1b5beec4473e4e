"""Loading a full-precision pipeline: a diffusers folder, a hub id at a revision, or a .safetensors file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halftone.components import (
    INDEX,
    SAFETY,
    Index,
    assemble,
    check_finite,
    check_safetensors,
    explain_load,
    first_line,
    load_component,
    read_index,
    weight_files,
)
from halftone.errors import UserError
from halftone.files import sha256

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLED = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
_CONFIG_FILES = ["*.json", "*.txt", "*.model"]


@dataclass(frozen=True)
class Source:
    """A full-precision pipeline and where it came from. The safety checker is left out of `pipeline`."""

    pipeline: Any
    path: str  # as the user gave it
    revision: str | None  # commit, of a hub id
    folder: Path | None  # diffusers layout on this machine; None for a single file
    weights_sha256: str  # of the denoiser's weight file, or of the hashes of its shards


def load_source(
    path: Path | str,
    revision: str | None = None,
    *,
    config: Path | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Source:
    """Load the pipeline at `path`.

    `revision` is needed for a hub id and refused elsewhere. `config` is for a single file: a folder in
    diffusers layout whose configurations fit it; without one they come from the hub, chosen by the weights'
    names. Raises UserError for whatever is wrong with the input: nothing is initialized at random, read from
    pickles or cut short without an error.
    """
    given = str(path)
    local = Path(path)
    if local.is_dir() or local.is_file():
        if revision is not None:
            raise UserError(f"{given}: is on this disk, so a revision means nothing; leave --revision out")
        if local.is_file():
            return _from_file(local, given, config, dtype)
        return _from_folder(local, given, None, dtype)
    if config is not None:
        raise UserError(f"{given}: a config folder goes with a single .safetensors file on this disk only")
    if local.suffix or not _HUB_ID.fullmatch(given) or local.parent.is_dir():
        raise UserError(
            f"{given}: no such folder or file; give a diffusers folder, a .safetensors, or OWNER/NAME"
        )
    if not revision:
        raise UserError(f"{given}: a hub id may change: add --revision, best a commit of 40 digits")
    folder = _download(given, revision)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return _from_folder(folder, given, commit, dtype)


def weights_sha256(folder: Path, denoiser: str) -> str:
    """SHA-256 of the denoiser's weight file; of several shards, of their hashes in order of name."""
    files, _ = weight_files(folder, denoiser)
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _from_folder(folder: Path, given: str, commit: str | None, dtype: torch.dtype) -> Source:
    index = read_index(folder)
    denoiser = index.denoiser.name
    loaded = {name: load_component(folder, entry, dtype) for name, entry in _wanted(index).items()}
    digest = weights_sha256(folder, denoiser)
    return Source(assemble(folder, loaded), given, commit, folder, digest)


def _wanted(index: Index) -> dict[str, Any]:
    """All components but the safety checker, whose verdicts would blacken images that are to be measured."""
    skipped = SAFETY if "image_encoder" not in index.entries else SAFETY[:1]
    return {name: entry for name, entry in index.entries.items() if name not in skipped}


def _from_file(path: Path, given: str, config: Path | str | None, dtype: torch.dtype) -> Source:
    if path.suffix in _PICKLED:
        raise UserError(f"{path}: pickled weights can run code when read; convert them to .safetensors")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: give a folder in diffusers layout or a .safetensors file")
    check_safetensors(path)
    folder = Path(config) if config is not None else _config_from_hub(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one in diffusers layout")
    index = read_index(folder)
    loader: Any = index.pipeline_class
    if not hasattr(loader, "from_single_file"):
        raise UserError(f"{path}: {loader.__name__} has no single-file form; give a folder")
    with explain_load(path, index.pipeline_class):
        options = {"safety_checker": None} if "safety_checker" in index.entries else {}
        pipeline = loader.from_single_file(
            str(path), config=str(folder), local_files_only=True, dtype=dtype, **options
        )
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            for weight, value in component.state_dict().items():
                if value.is_meta:
                    raise UserError(f"{path}: lacks {name} {weight}; is the configuration another model's?")
            check_finite(component, f"{path}: {name}")
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return Source(pipeline, given, None, None, sha256(path))


def _config_from_hub(path: Path) -> Path:
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    with explain_load(path, dict):
        repository = fetch_diffusers_config(load_file(path))["pretrained_model_name_or_path"]
    with _explain_hub(repository, f"{path}: its configuration ({repository})"):
        return Path(snapshot_download(repository, allow_patterns=_CONFIG_FILES))


def download(repository: str, revision: str, files: Iterable[str]) -> Path:
    """Where the hub client put these files of a repository, cached or fetched. Raises UserError."""
    from huggingface_hub import snapshot_download

    with _explain_hub(repository, f"{repository} at revision {revision!r}"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=sorted(files)))


def _download(repository: str, revision: str) -> Path:
    from diffusers import DiffusionPipeline

    with _explain_hub(repository, f"{repository} at revision {revision!r}"):
        return Path(DiffusionPipeline.download(repository, revision=revision, use_safetensors=True))


class _explain_hub:
    """Turn what the hub client raises into one line that says which of the usual causes it is."""

    def __init__(self, repository: str, what: str) -> None:
        self.repository, self.what = repository, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        from huggingface_hub import errors

        if fault is None or isinstance(fault, UserError | MemoryError) or not isinstance(fault, Exception):
            return
        causes: list[tuple[Any, str]] = [
            (errors.GatedRepoError, "is gated: accept its terms on the hub and log in (hf auth login)"),
            (errors.RevisionNotFoundError, "does not exist: check the revision"),
            (errors.RepositoryNotFoundError, "was not found: check the id, or log in if it is private"),
            (errors.HFValidationError, "is not a valid hub id"),
            (errors.LocalEntryNotFoundError, "is not cached and the hub is out of reach"),
            (errors.OfflineModeIsEnabled, "is not cached and HF_HUB_OFFLINE is set"),
            (errors.EntryNotFoundError, f"is not a diffusers pipeline: it has no {INDEX}"),
            (ConnectionError, "is not cached and the hub is out of reach"),
        ]
        chain = list(_causes(fault))  # diffusers wraps what the hub client raised
        cause = next((text for type_, text in causes for link in chain if isinstance(link, type_)), None)
        if cause is None:
            clients = ("httpx", "httpcore", "requests", "urllib3", "socket")
            if any(type(link).__module__.startswith(clients) for link in chain):
                cause = "is not cached and the hub is out of reach"
            else:
                cause = f"cannot be got from the hub ({first_line(fault)})"
        raise UserError(f"{self.what} {cause}") from fault


def _causes(fault: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while fault is not None and id(fault) not in seen:
        seen.add(id(fault))
        yield fault
        fault = fault.__cause__ or fault.__context__
