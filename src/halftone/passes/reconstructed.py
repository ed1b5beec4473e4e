"""The result of block reconstruction: weight codes, a report per unit, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halftone.errors import UserError
from halftone.files import writing
from halftone.layers import WeightCodes

_FACTS = ("mse_before", "mse_after", "polarisation", "iterations", "kept_nearest")


@dataclass(frozen=True)
class UnitReport:
    """What reconstruction did to one unit.

    `mse_before` and `mse_after` are mean squared errors of its output with nearest and with learned
    rounding, on the samples it was learned on; with `kept_nearest` the codes are those of nearest rounding,
    because learning did not lower the error. `polarisation` is the mean of min(h, 1 - h) before h was made
    hard.
    """

    name: str
    mse_before: float
    mse_after: float
    polarisation: float
    iterations: int
    kept_nearest: bool

    @property
    def ratio(self) -> float:
        """By how much the error of the codes kept is lower than that of nearest rounding: at least 1."""
        if self.kept_nearest:
            return 1.0
        return self.mse_before / self.mse_after if self.mse_after else float("inf")


@dataclass(frozen=True)
class Reconstructed:
    """Weight codes by module name (uint8 up to 8 bits, int32 above), and the units in the order they were
    learned.
    """

    weights: dict[str, WeightCodes]
    units: tuple[UnitReport, ...]

    def save(self, path: Path | str, metadata: Mapping[str, str]) -> None:
        """Write a safetensors file, whole or not at all; its bytes depend on the arguments alone.

        Tensors: `weight/{module}/codes|scale|zero_point`, and per unit the scalars
        `unit/{name}/order|mse_before|mse_after|polarisation|iterations|kept_nearest`.
        """
        # safetensors writes several metadata keys in random order, so there may be one only
        assert len(metadata) == 1, "metadata must have exactly one key for deterministic bytes"
        tensors: dict[str, Tensor] = {}
        for module, weight in self.weights.items():
            for part, tensor in weight._asdict().items():
                tensors[f"weight/{module}/{part}"] = tensor.detach().cpu().contiguous()
        for order, unit in enumerate(self.units):
            tensors[f"unit/{unit.name}/order"] = torch.tensor(order)
            for fact in _FACTS:
                value = getattr(unit, fact)
                dtype = torch.float64 if isinstance(value, float) else torch.int64
                tensors[f"unit/{unit.name}/{fact}"] = torch.tensor(value, dtype=dtype)
        with writing(path) as temporary:
            save_file(tensors, temporary, metadata=dict(metadata))


def load(path: Path | str) -> tuple[Reconstructed, dict[str, str]]:
    """What `Reconstructed.save` wrote, and its metadata. Raises UserError for a file it did not write."""
    path = Path(path)
    weights: dict[str, dict[str, Tensor]] = {}
    units: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            for key in stored.keys():  # noqa: SIM118
                kind, _, rest = key.partition("/")
                name, _, part = rest.rpartition("/")
                {"weight": weights, "unit": units}[kind].setdefault(name, {})[part] = stored.get_tensor(key)
        ordered = sorted(units.items(), key=lambda item: int(item[1]["order"]))
        reports = tuple(
            UnitReport(
                name=name,
                mse_before=float(facts["mse_before"]),
                mse_after=float(facts["mse_after"]),
                polarisation=float(facts["polarisation"]),
                iterations=int(facts["iterations"]),
                kept_nearest=bool(facts["kept_nearest"]),
            )
            for name, facts in ordered
        )
        return Reconstructed(
            {name: WeightCodes(**parts) for name, parts in weights.items()}, reports
        ), metadata
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the step reconstruct") from None
    except (SafetensorError, KeyError, TypeError) as fault:
        raise UserError(
            f"{path}: not a file of reconstructed weights ({fault}); run the step reconstruct again"
        ) from None
