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

_ROUND, _CALLS = "round-", "denoiser_calls"
_FACTS = ("mse_before", "mse_after", "polarisation", "iterations", "kept_nearest")


@dataclass(frozen=True)
class UnitReport:
    """What reconstruction did to one unit.

    `mse_before` and `mse_after` are mean squared errors of its output with nearest and with learned
    rounding, on the samples it was learned on; with `kept_nearest` the codes are those of nearest rounding,
    because learning did not lower the error. In a later `round` the codes of the round before stand in place
    of nearest ones, with both errors on this round's samples. `polarisation` is the
    mean of min(h, 1 - h) before h was made hard.
    """

    name: str
    mse_before: float
    mse_after: float
    polarisation: float
    iterations: int
    kept_nearest: bool
    round: int = 1

    @property
    def ratio(self) -> float:
        """By how much the error of the codes kept is lower than that of nearest rounding: at least 1."""
        if self.kept_nearest:
            return 1.0
        return self.mse_before / self.mse_after if self.mse_after else float("inf")


@dataclass(frozen=True)
class Reconstructed:
    """Weight codes by module name (uint8 up to 8 bits, int32 above), and the units in the order they were
    learned, round by round. denoiser_calls: made for the data of later rounds, each on one batch.
    """

    weights: dict[str, WeightCodes]
    units: tuple[UnitReport, ...]
    denoiser_calls: int = 0

    def save(self, path: Path | str, metadata: Mapping[str, str]) -> None:
        """Write a safetensors file, whole or not at all; its bytes depend on the arguments alone.

        Tensors: `weight/{module}/codes|scale|zero_point`, and per unit the scalars
        `unit/{name}/order|mse_before|mse_after|polarisation|iterations|kept_nearest`, in later rounds
        `round-{number}/{name}/...`; with these, `denoiser_calls`.
        """
        # safetensors writes several metadata keys in random order, so there may be one only
        assert len(metadata) == 1, "metadata must have exactly one key for deterministic bytes"
        tensors: dict[str, Tensor] = {}
        for module, weight in self.weights.items():
            for part, tensor in weight._asdict().items():
                tensors[f"weight/{module}/{part}"] = tensor.detach().cpu().contiguous()
        for order, unit in enumerate(self.units):
            group = "unit" if unit.round == 1 else f"{_ROUND}{unit.round}"
            tensors[f"{group}/{unit.name}/order"] = torch.tensor(order)
            for fact in _FACTS:
                value = getattr(unit, fact)
                dtype = torch.float64 if isinstance(value, float) else torch.int64
                tensors[f"{group}/{unit.name}/{fact}"] = torch.tensor(value, dtype=dtype)
        if self.denoiser_calls:
            tensors[_CALLS] = torch.tensor(self.denoiser_calls)
        with writing(path) as temporary:
            save_file(tensors, temporary, metadata=dict(metadata))


def load(path: Path | str) -> tuple[Reconstructed, dict[str, str]]:
    """What `Reconstructed.save` wrote, and its metadata. Raises UserError for a file it did not write."""
    path = Path(path)
    weights: dict[str, dict[str, Tensor]] = {}
    units: dict[tuple[int, str], dict[str, Tensor]] = {}
    calls = 0
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            for key in stored.keys():  # noqa: SIM118
                kind, _, rest = key.partition("/")
                name, _, part = rest.rpartition("/")
                if kind == _CALLS:
                    calls = int(stored.get_tensor(key))
                elif kind == "weight":
                    weights.setdefault(name, {})[part] = stored.get_tensor(key)
                else:
                    number = 1 if kind == "unit" else int(kind.removeprefix(_ROUND))
                    units.setdefault((number, name), {})[part] = stored.get_tensor(key)
        ordered = sorted(units.items(), key=lambda item: int(item[1]["order"]))
        reports = tuple(
            UnitReport(
                name=name,
                mse_before=float(facts["mse_before"]),
                mse_after=float(facts["mse_after"]),
                polarisation=float(facts["polarisation"]),
                iterations=int(facts["iterations"]),
                kept_nearest=bool(facts["kept_nearest"]),
                round=number,
            )
            for (number, name), facts in ordered
        )
        return Reconstructed(
            {name: WeightCodes(**parts) for name, parts in weights.items()}, reports, calls
        ), metadata
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the step reconstruct") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as fault:
        raise UserError(
            f"{path}: not a file of reconstructed weights ({fault}); run the step reconstruct again"
        ) from None
