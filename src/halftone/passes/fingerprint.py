"""Whether a checkpoint belongs to the run at hand: a digest of everything that its result depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halftone.trajectory import Trajectory


def fingerprint(denoiser: nn.Module, trajectory: Trajectory, facts: Any) -> str:
    """SHA-256 of plain values, of a denoiser's parameters and buffers, and of a trajectory."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    tensors = {f"model/{name}": value for name, value in denoiser.state_dict().items()}
    for field in dataclasses.fields(trajectory):
        value = getattr(trajectory, field.name)
        group = value if isinstance(value, Mapping) else {"": value}
        tensors |= {f"{field.name}/{name}": one for name, one in group.items() if isinstance(one, Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
