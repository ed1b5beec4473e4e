"""What a unit is reconstructed on: its inputs and full-precision outputs, captured and cached.

They are captured by running the denoiser up to the unit and stopping there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halftone.errors import UserError
from halftone.files import explain_disk_faults
from halftone.passes.unit_trace import Arguments, Signature, leaves, tensors_of, with_leaves
from halftone.trajectory import Sample, Trajectory, sample_inputs

MIB = 2**20


class Weights:
    """Full-precision and rounded weights of a denoiser: both in memory, one of them in use."""

    def __init__(self, denoiser: nn.Module, modules: Sequence[str]) -> None:
        self.layers: dict[str, Any] = {}
        for name in modules:
            module: Any = denoiser.get_submodule(name)
            self.layers[name] = getattr(module, "layer", module)  # of a QuantizedLayer
        self.full_precision: dict[str, Tensor] = {k: v.weight.detach() for k, v in self.layers.items()}
        self.rounded: dict[str, Tensor] = {}

    @contextmanager
    def in_use(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with these weights, by module name, instead of the full-precision ones."""
        try:
            for name, weight in weights.items():
                self.layers[name].weight.data = weight
            yield
        finally:
            for name in weights:
                self.layers[name].weight.data = self.full_precision[name]


@dataclass(frozen=True)
class UnitData:
    """Cached rows of one unit, in chunks of `chunk`: in memory, or memory-mapped from disk, the same values.

    A chunk lists the inputs that have rows, then the outputs; each is (up to `chunk`, ...).
    """

    signature: Signature
    count: int
    chunk: int
    chunks: list[list[Tensor]]
    spilled: bool
    device: torch.device
    dtype: torch.dtype

    def batch(self, rows: Sequence[int]) -> tuple[Arguments, list[Tensor]]:
        """Arguments of the unit for these rows, and what it should return, (len(rows), ...) in float32."""
        stacked = [
            torch.stack([self.chunks[row // self.chunk][place][row % self.chunk] for row in rows]).to(
                self.device
            )
            for place in range(len(self.chunks[0]))
        ]
        arguments, by_row = self.signature.arguments, self.signature.by_row
        inputs = iter([t.to(self.dtype) if t.is_floating_point() else t for t in stacked[: sum(by_row)]])
        values = [
            next(inputs) if grows else leaf for leaf, grows in zip(leaves(arguments), by_row, strict=True)
        ]
        return with_leaves(arguments, values), [target.float() for target in stacked[sum(by_row) :]]


def capture(
    denoiser: nn.Module,
    signature: Signature,
    trajectory: Trajectory,
    samples: Sequence[Sample],
    *,
    prefix: Callable[[], AbstractContextManager[None]] | None,
    limit_mib: int,
    chunk: int,
    folder: Path,
) -> UnitData:
    """Run the denoiser on the samples, `chunk` at a time, and keep what the unit is given and should
    return.

    It should return what the denoiser as it stands, in full precision, returns; it is given what the
    denoiser hands on inside `prefix`, its quantized state, or as it stands where there is none. More than
    `limit_mib` MiB go to `folder` (which the caller removes). Raises UserError where a value is
    not finite, and for a full disk.
    """
    first = next(denoiser.parameters())
    spilled = signature.bytes_per_row * len(samples) > limit_mib * MIB
    chunks: list[list[Tensor]] = []
    for start in range(0, len(samples), chunk):
        given = sample_inputs(
            trajectory, samples[start : start + chunk], device=first.device, dtype=first.dtype
        )
        inputs, outputs = _run_to(denoiser, signature.unit, given)
        if prefix is not None:
            with prefix():
                inputs, _ = _run_to(denoiser, signature.unit, given, outputs=False)
        rows = [leaf for leaf, grows in zip(leaves(inputs), signature.by_row, strict=True) if grows]
        tensors = [*rows, *outputs]
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise UserError(
                f"{signature.unit}: its inputs or outputs are not finite; check that the model makes images, "
                "and run it in float32"
            )
        chunks.append(_spill(folder / f"{len(chunks)}.safetensors", tensors) if spilled else tensors)
    return UnitData(signature, len(samples), chunk, chunks, spilled, first.device, first.dtype)


class _Stop(Exception):
    """Raised by a hook at a unit: what comes after it is not needed."""


def _run_to(
    denoiser: nn.Module, unit: str, given: dict[str, Any], outputs: bool = True
) -> tuple[Arguments, list[Tensor]]:
    """Arguments and outputs of the unit in one forward, which ends there; without `outputs` before the unit
    runs.
    """
    taken: list[Arguments] = []
    returned: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        # copies: a residual block may write into its input
        kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves((args, kwargs))]
        taken.append(with_leaves((args, kwargs), kept))
        if not outputs:
            raise _Stop

    def after(_: nn.Module, __: Any, output: Any) -> None:
        returned.extend(tensors_of(output))
        raise _Stop

    module = denoiser.get_submodule(unit)
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        with torch.no_grad():
            denoiser(**given)
    except _Stop:
        return taken[0], returned
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError(f"{unit} did not run")


def _spill(path: Path, tensors: Sequence[Tensor]) -> list[Tensor]:
    with explain_disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = [tensor.detach().cpu().contiguous().clone() for tensor in tensors]  # some may share memory
        save_file({f"{place:04d}": tensor for place, tensor in enumerate(plain)}, path)
    mapped = load_file(path)
    return [mapped[f"{place:04d}"] for place in range(len(tensors))]
