"""The state file that `calibrate` leaves: weight codes, activation parameters, and what was seen at every
call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halftone.errors import UserError
from halftone.files import writing
from halftone.layers import WeightCodes, set_weights
from halftone.probability_quantizer import ProbabilityQuantizer
from halftone.provenance import Provenance
from halftone.quantizers.bits import Bits
from halftone.quantizers.groups import Grouping
from halftone.site_quantizer import Parameters, SiteQuantizer


class SiteParameters(NamedTuple):
    """Of one activation site: scale and zero point, (n_calls, ...) or shared (1, ...), and the extremes seen
    at every call, lo and hi, (n_calls, ...) always. All float32. A dynamic site has empty scale and zero
    point. log2: of probabilities that take uniform or log2 codes, which of the two, bool (n_calls,). Where
    the site is grouped, scale and zero point are (n_calls, groups) or (1, groups), and axis and labels those
    of `halftone.quantizers.groups.Grouping`."""

    scale: Tensor
    zero_point: Tensor
    lo: Tensor
    hi: Tensor
    log2: Tensor | None = None
    axis: Tensor | None = None
    labels: Tensor | None = None

    @property
    def groups(self) -> Grouping | None:
        return None if self.axis is None or self.labels is None else Grouping(self.axis, self.labels)

    @property
    def quantizer(self) -> Parameters:
        """What the site's quantizer holds."""
        return Parameters(self.scale, self.zero_point, self.groups)


ActivationParameters = dict[str, SiteParameters]


@dataclass(frozen=True)
class CalibrationState:
    """Everything that a recipe decided for a denoiser. timesteps, noise_levels: (n_calls,), of the
    calibrated calls. relaxed_calls: indices of those whose activations have the recipe's relaxed width.
    denoiser_calls: that finding the activation parameters and the correction took, each on one
    batch. factors: (input channels,)
    by module, of a recipe that reparameterizes; weights and parameters are then of that denoiser. correction:
    (n_calls, output channels), to be taken off the denoiser's output."""

    weights: dict[str, WeightCodes]
    activations: ActivationParameters
    timesteps: Tensor
    noise_levels: Tensor
    relaxed_calls: tuple[int, ...] = ()
    denoiser_calls: int = 0
    factors: dict[str, Tensor] = field(default_factory=dict)
    correction: Tensor | None = None

    def apply(self, denoiser: nn.Module, quantizers: Mapping[str, SiteQuantizer], bits: Bits) -> None:
        """Put weights and parameters into a wrapped denoiser; modes stay as they are."""
        set_weights(denoiser, self.weights, bits)
        set_parameters(quantizers, self.activations)

    def save(self, path: Path | str, provenance: Provenance) -> None:
        """One safetensors file: `weight/{module}/codes|scale|zero_point`,
        `activation/{site}/scale|zero_point|lo|hi|log2|axis|labels`, `timesteps`, `noise_levels`,
        `relaxed_calls`, `denoiser_calls`, `factor/{module}/value`, `correction`. Its bytes depend on the
        values alone."""
        tensors = {
            "timesteps": self.timesteps,
            "noise_levels": self.noise_levels,
            "relaxed_calls": torch.tensor(self.relaxed_calls, dtype=torch.int64),
            "denoiser_calls": torch.tensor(self.denoiser_calls),
        }
        if self.correction is not None:
            tensors["correction"] = self.correction
        for module, weight in self.weights.items():
            tensors |= {f"weight/{module}/{part}": value for part, value in weight._asdict().items()}
        for site, parameters in self.activations.items():
            parts = {part: value for part, value in parameters._asdict().items() if value is not None}
            tensors |= {f"activation/{site}/{part}": value for part, value in parts.items()}
        tensors |= {f"factor/{module}/value": value.clone() for module, value in self.factors.items()}
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with writing(path) as temporary:
            save_file(plain, temporary, metadata=provenance.to_metadata())

    @classmethod
    def load(cls, path: Path | str) -> tuple[CalibrationState, Provenance]:
        """Raises UserError where the file is missing, damaged or no calibration."""
        parts: dict[str, dict[str, dict[str, Tensor]]] = {"weight": {}, "activation": {}, "factor": {}}
        alone: dict[str, Tensor] = {}
        try:
            with safe_open(path, framework="pt") as stored:
                provenance = Provenance.from_metadata(stored.metadata(), path)
                for key in stored.keys():  # noqa: SIM118
                    group, _, rest = key.partition("/")
                    name, _, part = rest.rpartition("/")
                    if rest:
                        parts[group].setdefault(name, {})[part] = stored.get_tensor(key)
                    else:
                        alone[key] = stored.get_tensor(key)
            return cls(
                {name: WeightCodes(**values) for name, values in parts["weight"].items()},
                {name: SiteParameters(**values) for name, values in parts["activation"].items()},
                alone["timesteps"],
                alone["noise_levels"],
                tuple(alone["relaxed_calls"].tolist()),
                int(alone["denoiser_calls"]),
                {name: values["value"] for name, values in parts["factor"].items()},
                alone.get("correction"),
            ), provenance
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run halftone calibrate first") from None
        except (SafetensorError, OSError, KeyError, TypeError) as fault:
            raise UserError(f"{path}: not a calibration ({fault}); run halftone calibrate again") from None


def set_parameters(quantizers: Mapping[str, SiteQuantizer], activations: ActivationParameters) -> None:
    """Dynamic quantizers take none. Raises ValueError where the sites are not the same."""
    if quantizers.keys() != activations.keys():
        odd = sorted(quantizers.keys() ^ activations.keys())
        raise ValueError(f"the calibration and the denoiser differ in sites, such as {odd[0]}")
    for name, quantizer in quantizers.items():
        if not quantizer.dynamic:
            quantizer.set_parameters(*activations[name].quantizer)
        log2 = activations[name].log2
        if log2 is not None and isinstance(quantizer, ProbabilityQuantizer):
            quantizer.choose(log2)
