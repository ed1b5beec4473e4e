"""Learned scales of activations: after the weights, unit by unit, so that each unit's output stays that of
full precision (BRECQ, Q-Diffusion: activation step-size learning).

Zero points stay as fitted. A finished unit keeps its learned scales; the units after it are given what the
quantized ones before them hand on. For parameters shared over the calls. Probabilities with log2 codes or
dynamic scales quantize meanwhile, and have no step to be learned.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.denoiser import SiteKind, blocks, width_at
from halftone.layers import WeightCodes
from halftone.passes import checkpoint as checkpoints
from halftone.passes.samples import choose_samples
from halftone.passes.schedule import SCHEDULES, STEP_SIZES
from halftone.passes.state import ActivationParameters
from halftone.passes.unit_data import UnitData, Weights, capture
from halftone.passes.unit_trace import tensors_of, trace
from halftone.progress import Progress
from halftone.quantizers import halves
from halftone.quantizers.affine import AffineParams, dequantize
from halftone.quantizers.bits import Bits
from halftone.settings import Reconstruction
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.trajectory import Trajectory, sample_inputs


def learn_step_sizes(
    denoiser: nn.Module,
    quantizers: Mapping[str, SiteQuantizer],
    context: CallContext,
    trajectory: Trajectory,
    codes: Mapping[str, WeightCodes],
    fitted: ActivationParameters,
    axes: Axes,
    settings: Reconstruction,
    *,
    bits: Bits,
    seed: int,
    checkpoint: Path,
) -> ActivationParameters:
    """`fitted`, with learned scales, which are also set in `quantizers`; their mode is off afterwards.

    denoiser: wrapped, with full-precision weights; `codes` are the quantized ones. checkpoint: a folder that
    keeps every finished unit, so that the same call goes on with the same bits; the caller removes it.
    Raises UserError where a value is not finite, and for a full disk.
    """
    work = _Work(denoiser, quantizers, trajectory, codes, axes, settings, bits, seed)
    facts = [axes.model_dump(mode="json"), settings.facts(), seed, str(bits)]
    digest = hashlib.sha256(checkpoints.fingerprint(denoiser, trajectory, facts).encode())
    for name, parameters in fitted.items():
        digest.update(f"{name} {quantizers[name].bits} {parameters.scale.tolist()}".encode())
    for name, weight in codes.items():
        digest.update(f"{name} ".encode() + weight.codes.contiguous().numpy().tobytes())
    checkpoints.folder(checkpoint)
    try:
        with context.at(0):  # shared parameters: any call's slot is the only one
            work.run(digest.hexdigest(), checkpoint)
    finally:
        set_mode(quantizers, Mode.OFF)
        for quantizer in quantizers.values():
            quantizer.soft_params = None
    return {
        name: one._replace(scale=quantizers[name].scale.cpu()) if quantizers[name].learnable else one
        for name, one in fitted.items()
    }


class _Work:
    def __init__(
        self,
        denoiser: nn.Module,
        quantizers: Mapping[str, SiteQuantizer],
        trajectory: Trajectory,
        codes: Mapping[str, WeightCodes],
        axes: Axes,
        settings: Reconstruction,
        bits: Bits,
        seed: int,
    ) -> None:
        self.denoiser, self.quantizers, self.trajectory = denoiser, quantizers, trajectory
        self.settings, self.seed = settings, seed
        self.schedule = STEP_SIZES[settings.budget]
        self.weights = Weights(denoiser, list(codes))
        for name, weight in codes.items():
            value = dequantize(weight.codes, weight.params(width_at(name, SiteKind.WEIGHT, bits)))
            self.weights.rounded[name] = value.to(self.weights.full_precision[name])
        count = SCHEDULES[settings.budget].samples
        self.samples = choose_samples(trajectory, count, seed, axes.calibration_calls)

    @contextlib.contextmanager
    def quantized(self) -> Iterator[None]:
        """The denoiser with quantized weights and activations."""
        set_mode(self.quantizers, Mode.QUANTIZE)
        try:
            with self.weights.in_use(self.weights.rounded):
                yield
        finally:
            set_mode(self.quantizers, Mode.OFF)

    def run(self, mark: str, checkpoint: Path) -> None:
        first = next(self.denoiser.parameters())
        rows = [
            sample_inputs(self.trajectory, (self.samples * 2)[:count], device=first.device, dtype=first.dtype)
            for count in (1, 2)
        ]
        inside = {block.name: self._sites_in(block.name) for block in blocks(self.denoiser, boundary=True)}
        units = trace(self.denoiser, [name for name, found in inside.items() if found], *rows)
        progress = Progress("step sizes", len(units))
        for place, signature in enumerate(units):
            found, path = inside[signature.unit], checkpoint / f"unit-{place:04d}.safetensors"
            scales = checkpoints.load(path, mark)
            if scales is None:
                with tempfile.TemporaryDirectory(prefix="cache-", dir=checkpoint) as folder:
                    data = capture(
                        self.denoiser,
                        signature,
                        self.trajectory,
                        self.samples,
                        prefix=self.quantized,
                        limit_mib=self.settings.cache_mib,
                        chunk=self.settings.batch_size,
                        folder=Path(folder),
                    )
                    with self.quantized():
                        scales = self._learn(signature.unit, found, data)
                checkpoints.save(path, scales, mark)
            for name, scale in scales.items():
                quantizer = self.quantizers[name]
                quantizer.set_parameters(scale.to(quantizer.scale.device), quantizer.zero_point)
            progress.advance(1, signature.unit)

    def _sites_in(self, unit: str) -> list[str]:
        """Activation sites of a unit whose scales can be learned."""
        return [
            name
            for name, quantizer in self.quantizers.items()
            if f"{quantizer.site.module}.".startswith(f"{unit}.") and quantizer.learnable
        ]

    def _learn(self, unit: str, names: Sequence[str], data: UnitData) -> dict[str, Tensor]:
        """Scales of the unit's sites that lower its output error; the fitted ones where none do."""
        schedule, module = self.schedule, self.denoiser.get_submodule(unit)
        fitted = {name: self.quantizers[name].scale.clone() for name in names}
        before = self._error_of(module, data)
        logs = {name: _own(self.quantizers[name]).log().requires_grad_(True) for name in names}
        for name, log in logs.items():
            self.quantizers[name].soft_params = _soft(self.quantizers[name], log)
        optimizer = torch.optim.Adam(list(logs.values()), lr=schedule.learning_rate)
        generator = torch.Generator().manual_seed(checkpoints.seed_of("step size", self.seed, unit))
        size = min(self.settings.batch_size, SCHEDULES[self.settings.budget].batch_limit, data.count)
        for iteration in range(schedule.iterations):
            decay = 0.5 * (1 + math.cos(math.pi * iteration / schedule.iterations))
            optimizer.param_groups[0]["lr"] = schedule.learning_rate * decay
            picked = torch.randperm(data.count, generator=generator)[:size].tolist()
            arguments, targets = data.batch(picked)
            outputs = tensors_of(module(*arguments[0], **arguments[1]))
            loss = _distance(outputs, targets, schedule.norm)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learned = {name: _whole(log.detach().exp(), self.quantizers[name]) for name, log in logs.items()}
        for name in names:
            self.quantizers[name].soft_params = None
            self.quantizers[name].set_parameters(learned[name], self.quantizers[name].zero_point)
        better = self._error_of(module, data) < before
        return {name: (learned if better else fitted)[name].cpu() for name in names}

    @torch.no_grad()
    def _error_of(self, module: nn.Module, data: UnitData) -> float:
        total, size = 0.0, self.settings.batch_size
        for start in range(0, data.count, size):
            rows = range(start, min(start + size, data.count))
            arguments, targets = data.batch(rows)
            outputs = tensors_of(module(*arguments[0], **arguments[1]))
            total += float(_distance(outputs, targets, self.schedule.norm)) * len(rows)
        return total


def _soft(quantizer: SiteQuantizer, log: Tensor) -> Callable[[], AffineParams]:
    def params() -> AffineParams:
        return AffineParams(_whole(log.exp(), quantizer)[0], quantizer.zero_point[0], quantizer.bits)

    return params


def _own(quantizer: SiteQuantizer) -> Tensor:
    """The scales of a site, each once: a split site holds its two expanded over the channels."""
    split = quantizer.site.split
    return quantizer.scale.clone() if split is None else halves.compact(quantizer.scale, split, axis=2)


def _whole(own: Tensor, quantizer: SiteQuantizer) -> Tensor:
    """The inverse of `_own`, with gradients."""
    split = quantizer.site.split
    if split is None:
        return own
    return halves.expand(own[0], split, quantizer.scale.shape[2])[None]


def _distance(outputs: Sequence[Tensor], targets: Sequence[Tensor], norm: float) -> Tensor:
    """|output - target|^norm, summed over dimension 1 and averaged over the others."""
    total = torch.zeros(())
    for output, target in zip(outputs, targets, strict=True):
        error = (output.float() - target).abs().pow(norm)
        total = total + (error.sum(1).mean() if error.ndim > 1 else error.mean())
    return total
