"""Checkpoints: tensors of a run, kept with a mark that says which run it was.

The mark is a digest of everything that the run's result depends on, the code included, so that no other run
goes on from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halftone import __version__
from halftone.files import explain_disk_faults, writing
from halftone.imports import code_hash
from halftone.trajectory import Trajectory

_ALL_STEPS = "halftone/chain.py"


def fingerprint(denoiser: nn.Module, trajectory: Trajectory, facts: Any) -> str:
    """SHA-256 of plain values, of a denoiser's parameters and buffers, of a trajectory, and of the code and
    the packages that compute."""
    versions = [__version__, torch.__version__, diffusers.__version__, code_hash(_ALL_STEPS)]
    digest = hashlib.sha256(json.dumps([facts, versions], sort_keys=True).encode())
    tensors = {f"model/{name}": value for name, value in denoiser.state_dict().items()}
    for field in dataclasses.fields(trajectory):
        value = getattr(trajectory, field.name)
        group = value if isinstance(value, Mapping) else {"": value}
        tensors |= {f"{field.name}/{name}": one for name, one in group.items() if isinstance(one, Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder(path: Path) -> None:
    """Where files will lie, made if it is not there. Raises UserError where that cannot be."""
    with explain_disk_faults(path):
        path.mkdir(parents=True, exist_ok=True)


def save(path: Path, tensors: Mapping[str, Tensor], mark: str) -> None:
    """Whole or not at all."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with writing(path) as temporary:
        save_file(plain, temporary, metadata={"halftone": json.dumps({"fingerprint": mark})})


def load(path: Path, mark: str) -> dict[str, Tensor] | None:
    """What `save` kept under this mark; None if there is nothing, if it is damaged, or of another run."""
    try:
        with safe_open(path, framework="pt") as stored:
            found = json.loads((stored.metadata() or {}).get("halftone", "{}")).get("fingerprint")
            return {name: stored.get_tensor(name) for name in stored.keys()} if found == mark else None  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, OSError, json.JSONDecodeError):
        return None


def seed_of(purpose: str, seed: int, unit: str) -> int:
    """A seed of its own for one unit, so that a resumed run draws what an uninterrupted one does."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed} {unit}".encode()).digest()[:6], "little")
