"""What every training here shares: its schedule, its log, and checkpoints that survive a kill.

The schedule depends on progress alone (images seen over images planned), so a run that is resumed
with another plan anneals to zero at the new end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halftone.files import writing

Tensors = dict[str, Tensor]


def warmed_cosine(progress: float, warm_up: float) -> float:
    """Share of the peak learning rate at progress 0..1: linear warm-up, then a half cosine to 0."""
    if progress < warm_up:
        return max(progress / warm_up, 1e-3)
    rest = min((progress - warm_up) / (1 - warm_up), 1.0)
    return 0.5 * (1 + math.cos(math.pi * rest))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Sets each parameter group to ``share`` of its own peak rate (kept under ``peak``)."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def adamw(groups: list[tuple[list[nn.Parameter], float]], decay: float) -> torch.optim.AdamW:
    """(parameters, peak rate) groups; weight decay on matrices and kernels only."""
    split = []
    for parameters, peak in groups:
        for matrices in (True, False):
            chosen = [p for p in parameters if p.requires_grad and (p.ndim > 1) == matrices]
            if chosen:
                split.append({"params": chosen, "peak": peak, "weight_decay": decay if matrices else 0.0})
    return torch.optim.AdamW(split, lr=0.0, betas=(0.9, 0.99), fused=True)


def batches(count: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices, each index once per pass."""
    while True:
        order = torch.randperm(count, generator=rng)
        yield from order[: count - count % size].view(-1, size)


class Average:
    """Exponential moving average of a module's parameters, shorter while the run is young."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.step = 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.step += 1
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        ours, theirs = list(self.values.values()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - keep)

    def load(self, values: Mapping[str, Tensor], step: int) -> None:
        self.values = {name: values[name].clone() for name in self.values}
        self.step = step


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """State of every parameter, by its place in the groups: ``{place}.{key}``."""
    state = optimizer.state_dict()["state"]
    return {f"{k}.{key}": torch.as_tensor(v).clone() for k, one in state.items() for key, v in one.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    plain = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, key = name.split(".", 1)
        state.setdefault(int(place), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def save_checkpoint(path: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """One safetensors file: tensors named ``{part}/{name}``, facts as JSON in its header."""
    flat = {f"{part}/{name}": t.detach().contiguous() for part, ts in parts.items() for name, t in ts.items()}
    with writing(path) as temporary:
        save_file(flat, temporary, metadata={"facts": json.dumps(facts)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    parts: dict[str, Tensors] = {}
    with safe_open(path, framework="pt") as stored:
        for flat in stored.keys():  # noqa: SIM118
            part, name = flat.split("/", 1)
            parts.setdefault(part, {})[name] = stored.get_tensor(flat)
        facts: dict[str, Any] = json.loads(stored.metadata()["facts"])
    return parts, facts


class Log:
    """Appends one JSON object a line to a file, and prints it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values: float | int | str) -> None:
        line = json.dumps({"at": time.strftime("%H:%M:%S", time.gmtime()), **values})
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        print(line, flush=True)
