"""Block reconstruction: weights rounded, unit by unit, so that each unit's output stays that of full
precision.

BRECQ with AdaRound, as Q-Diffusion, TFMQ-DM, DGQ and PCR use it. Units are residual blocks, transformer
blocks and the remaining single layers, in the order in which they run. A finished unit stays hard-rounded;
the units after it are learned on what it hands on (`unit_input: quantized_prefix`), or all of them on
full-precision inputs (PCR).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from halftone.axes import Axes
from halftone.denoiser import SiteKind, blocks, width_at
from halftone.errors import UserError
from halftone.files import explain_disk_faults
from halftone.layers import WeightCodes, fit_weight, nearest_codes, store_codes
from halftone.passes import checkpoint as checkpoints
from halftone.passes import temporal
from halftone.passes.checkpoint import fingerprint, seed_of
from halftone.passes.reconstructed import Reconstructed, UnitReport, load
from halftone.passes.samples import choose_samples
from halftone.passes.schedule import SCHEDULES, later
from halftone.passes.unit_data import UnitData, Weights, capture
from halftone.passes.unit_rounding import Begun, learn
from halftone.passes.unit_trace import Signature, trace
from halftone.passes.weights import check_weight
from halftone.policies import TemporalBlock, UnitInput
from halftone.progress import Progress
from halftone.quantizers.affine import AffineParams, dequantize
from halftone.quantizers.bits import Bits
from halftone.settings import Reconstruction
from halftone.trajectory import Sample, Trajectory, sample_inputs

_KEY = "halftone"
_PARTS = 1000
# those that decide how weights are rounded; activations stay in float meanwhile
_AXES = {"weight_range", "rounding", "unit_input", "temporal_block", "calibration_calls", "shortcut"}


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: what it found; the soft choices by module, for the next round to go on from; and the mark of
    everything that decided them."""

    number: int
    found: Reconstructed
    alpha: dict[str, Tensor]
    mark: str


def learn_round(
    denoiser: nn.Module,
    trajectory: Trajectory,
    axes: Axes,
    bits: Bits,
    settings: Reconstruction,
    seed: int,
    checkpoint: Path,
    modules: Sequence[str],
    splits: Mapping[str, int] | None = None,
    shared: Path | None = None,
    *,
    before: Round | None = None,
    keep_soft: bool = False,
) -> Round:
    """Codes of the weights of `modules`, learned unit by unit on samples of `trajectory`: plain block
    reconstruction, or one of several rounds, each on a trajectory of its own (TCAQ-DM, PAR).

    `shared`: a folder in which finished units stay, for rows whose weights are learned alike (other
    activation widths, other ranges); without it they lie in `checkpoint`. `splits`: where the input channels
    of a module part into two halves with parameters of their own. `before`: the round before this one, whose
    soft choices are gone on from. `keep_soft`: there is a round after this one.

    `denoiser` holds full-precision weights (wrapped or not; activation quantizers off) and is handed back
    as it was. Every finished unit is kept in the folder `checkpoint`, so that the same call goes on where
    an interrupted one stopped; it gives bit-identical results on the same machine, because each unit has
    random numbers of its own. The caller removes the folder. Raises UserError where a value is not finite,
    the denoiser cannot be taken apart, or the disk is full.
    """
    work = _Work(
        denoiser,
        trajectory,
        axes,
        bits,
        settings,
        seed,
        checkpoint,
        tuple(modules),
        dict(splits or {}),
        shared,
        before,
        keep_soft,
    )
    with _inference(denoiser), _deterministic():
        return work.run()


@dataclasses.dataclass(frozen=True)
class _Unit:
    signature: Signature
    params: dict[str, AffineParams]  # by module name
    data: UnitData | None = None  # of the temporal block, which needs no capture


class _Work:
    """One reconstruction: what stays the same from unit to unit."""

    def __init__(
        self,
        denoiser: nn.Module,
        trajectory: Trajectory,
        axes: Axes,
        bits: Bits,
        settings: Reconstruction,
        seed: int,
        checkpoint: Path,
        modules: tuple[str, ...],
        splits: dict[str, int],
        shared: Path | None,
        before: Round | None,
        keep_soft: bool,
    ) -> None:
        self.denoiser, self.trajectory, self.axes, self.bits = denoiser, trajectory, axes, bits
        self.settings, self.seed, self.checkpoint, self.modules = settings, seed, checkpoint, modules
        self.before, self.keep_soft = before, keep_soft
        self.number = 1 if before is None else before.number + 1
        first = SCHEDULES[settings.budget]
        self.schedule = first if before is None else later(first, axes)
        self.weights = Weights(denoiser, modules)
        self.splits, self.shared = splits, shared
        # of finished units
        self.home = checkpoint if before is None else checkpoint / f"round-{self.number}"
        self.alpha: dict[str, Tensor] = {}
        apart = axes.temporal_block is TemporalBlock.APART
        self.temporal = temporal.TemporalBlock(denoiser) if apart else None
        self.samples = choose_samples(trajectory, self.schedule.samples, seed, axes.calibration_calls)

    def run(self) -> Round:
        units, idle = self._units()
        fingerprint = self._fingerprint()
        if self.shared is not None:
            self.home = self.shared / fingerprint[:20]
        with explain_disk_faults(self.checkpoint):
            self.checkpoint.mkdir(parents=True, exist_ok=True)
            self.home.mkdir(parents=True, exist_ok=True)
        for stale in self.checkpoint.glob("cache-*"):
            shutil.rmtree(stale, ignore_errors=True)
        done = [self._finished(place, unit, fingerprint) for place, unit in enumerate(units)]
        left = [unit for unit, found in zip(units, done, strict=True) if found is None]
        progress = _UnitProgress([self._cost(unit) for unit in left], self.schedule.iterations, len(units))
        codes: dict[str, WeightCodes] = {}
        reports: list[UnitReport] = []
        for place, unit in enumerate(units):
            found = done[place] or self._finished(place, unit, fingerprint)  # another row may have come first
            if found is None:
                progress.start(place, unit.signature.unit)
                found = self._learn(unit, progress.advance)
                if self.keep_soft:  # before the codes, by which the unit counts as finished
                    soft = {name: self.alpha[name] for name in unit.params}
                    checkpoints.save(self._soft_file(place), soft, fingerprint)
                found.save(self._file(place), {_KEY: json.dumps({"fingerprint": fingerprint})})
            codes |= found.weights
            reports += found.units
            for name, weight in found.weights.items():
                value = dequantize(weight.codes, weight.params(self._width(name)))
                self.weights.rounded[name] = value.to(self.weights.full_precision[name])
        for name, params in idle.items():
            codes[name] = _on_cpu(nearest_codes(self.weights.full_precision[name], params))
        result = Reconstructed({name: codes[name] for name in self.modules}, tuple(reports))
        return Round(self.number, result, self.alpha, fingerprint)

    def _units(self) -> tuple[list[_Unit], dict[str, AffineParams]]:
        """Units in the order in which they run, and the layers that never run, with their parameters."""
        for name, weight in self.weights.full_precision.items():
            check_weight(name, weight)
        params = {
            name: fit_weight(weight, self._width(name), self.axes.weight_range, self.splits.get(name))
            for name, weight in self.weights.full_precision.items()
        }
        apart = [] if self.temporal is None else [n for n in self.temporal.names if n in params]
        members = {
            block.name: [name for name in block.layers if name in params and name not in apart]
            for block in blocks(self.denoiser, boundary=True)
        }
        names = [name for name, layers in members.items() if layers]
        # a second row even where there is one sample only: rows must be told from other axes
        rows = [self._inputs((self.samples * 2)[:count]) for count in (1, 2)]
        signatures = trace(self.denoiser, names, *rows)
        units = [_Unit(one, {name: params[name] for name in members[one.unit]}) for one in signatures]
        if self.temporal is not None and apart:
            data = self.temporal.data(self.denoiser, self.trajectory)
            units.insert(0, _Unit(data.signature, {name: params[name] for name in apart}, data))
        running = {name for unit in units for name in unit.params}
        return units, {name: one for name, one in params.items() if name not in running}

    def _width(self, layer: str) -> int:
        return width_at(layer, SiteKind.WEIGHT, self.bits)

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, object]:
        first = next(self.denoiser.parameters())
        return sample_inputs(self.trajectory, samples, device=first.device, dtype=first.dtype)

    def _learn(self, unit: _Unit, advance: Callable[[], None]) -> Reconstructed:
        name = unit.signature.unit
        if self.temporal is not None and unit.data is not None:
            names = self.temporal.weight_names(unit.params)
            return self._round(unit, self.temporal, names, unit.data, advance)
        names = {_weight_name(self.denoiser, name, layer): layer for layer in unit.params}
        # what is learned apart stays as it was learned
        inside = {k: v for k, v in self.weights.rounded.items() if k.startswith(f"{name}.")}
        with tempfile.TemporaryDirectory(prefix="cache-", dir=self.checkpoint) as folder:
            data = capture(
                self.denoiser,
                unit.signature,
                self.trajectory,
                self.samples,
                prefix=self._prefix(),
                limit_mib=self.settings.cache_mib,
                chunk=self.settings.batch_size,
                folder=Path(folder),
            )
            with self.weights.in_use(inside):
                return self._round(unit, self.denoiser.get_submodule(name), names, data, advance)

    def _round(
        self,
        unit: _Unit,
        module: nn.Module,
        names: Mapping[str, str],
        data: UnitData,
        advance: Callable[[], None],
    ) -> Reconstructed:
        """Codes of the layers in `names` (name of a weight in `module` -> layer)."""
        name = unit.signature.unit
        learned = learn(
            module,
            {weight: unit.params[layer] for weight, layer in names.items()},
            data,
            self.schedule,
            self.settings.batch_size,
            seed_of("reconstruct", self.seed, name if self.before is None else f"{name} {self.number}"),
            advance,
            self._begun(names),
        )
        if self.keep_soft:
            self.alpha |= {layer: learned.alpha[weight] for weight, layer in names.items()}
        report = UnitReport(
            name,
            learned.mse_before,
            learned.mse_after,
            learned.polarisation,
            self.schedule.iterations,
            learned.keeps_first,
            self.number,
        )
        weights = {
            layer: _on_cpu(store_codes(learned.codes[weight], unit.params[layer]))
            for weight, layer in names.items()
        }
        return Reconstructed(weights, (report,))

    def _begun(self, names: Mapping[str, str]) -> Begun | None:
        """What the round before left of these layers (name of a weight -> layer)."""
        if self.before is None:
            return None
        codes = {weight: self.before.found.weights[layer].codes for weight, layer in names.items()}
        return Begun(codes, {weight: self.before.alpha[layer] for weight, layer in names.items()})

    def _prefix(self) -> Callable[[], contextlib.AbstractContextManager[None]] | None:
        rounded = self.weights.rounded
        if self.axes.unit_input is UnitInput.FULL_PRECISION or not rounded:
            return None
        return lambda: self.weights.in_use(rounded)

    def _file(self, place: int) -> Path:
        return self.home / f"unit-{place:04d}.safetensors"

    def _soft_file(self, place: int) -> Path:
        return self.home / f"soft-{place:04d}.safetensors"

    def _finished(self, place: int, unit: _Unit, fingerprint: str) -> Reconstructed | None:
        """What an earlier run kept of this unit; None if there is nothing, or it was another
        reconstruction.
        """
        if not self._file(place).exists():
            return None
        try:
            found, metadata = load(self._file(place))
        except UserError:  # damaged by the machine's fall: learned again, with the same result
            return None
        same = json.loads(metadata.get(_KEY, "{}")) == {"fingerprint": fingerprint}
        if not same or found.units[0].name != unit.signature.unit:
            return None
        if self.keep_soft:
            soft = checkpoints.load(self._soft_file(place), fingerprint)
            if soft is None:  # of a row without later rounds
                return None
            self.alpha |= soft
        return found

    def _cost(self, unit: _Unit) -> float:
        """Of one iteration, in multiply-accumulates; the two constants were measured on one CPU core."""
        rows = min(self.settings.batch_size, self.schedule.batch_limit, len(self.samples))
        size = sum(self.weights.full_precision[name].numel() for name in unit.params)
        return rows * unit.signature.macs + 160.0 * size + 1.6e7

    def _fingerprint(self) -> str:
        """Of everything that the result depends on."""
        first = next(self.denoiser.parameters())
        facts = {
            "axes": self.axes.model_dump(mode="json", include=_AXES),
            "bits": [self.bits.weight, self.bits.boundary],
            "settings": self.settings.facts(),
            "schedule": dataclasses.asdict(self.schedule),
            "seed": self.seed,
            "modules": self.modules,
            "splits": self.splits,
            "device": first.device.type,
        }
        if self.before is not None:
            facts |= {"round": self.number, "before": self.before.mark}
        return fingerprint(self.denoiser, self.trajectory, facts)


class _UnitProgress:
    """One bar over the units still to do, in thousandths of their estimated cost."""

    def __init__(self, costs: Sequence[float], iterations: int, n_units: int) -> None:
        self.ends = [sum(costs[: place + 1]) for place in range(len(costs))]
        self.costs, self.iterations, self.n_units = costs, iterations, n_units
        self.spent, self.place, self.note = 0.0, -1, ""
        self.bar = Progress("reconstruct", _PARTS) if costs else None

    def start(self, place: int, name: str) -> None:
        """The next unit to do, which is number `place` of all."""
        self.place = min(self.place + 1, len(self.ends) - 1)
        self.note = f"unit {place + 1} of {self.n_units}: {name}"

    def advance(self) -> None:
        """One iteration of the unit started last is done."""
        self.spent += self.costs[self.place] / self.iterations
        parts = round(_PARTS * self.spent / self.ends[-1])
        if self.bar is not None and parts > self.bar.done:
            self.bar.advance(parts - self.bar.done, self.note)


def _weight_name(denoiser: nn.Module, unit: str, layer: str) -> str:
    """Name of a layer's weight inside its unit; a wrapped layer keeps it one level down."""
    inside = layer.removeprefix(unit).removeprefix(".")
    wrapped = hasattr(denoiser.get_submodule(layer), "layer")
    return ".".join(part for part in (inside, "layer" if wrapped else "", "weight") if part)


def _on_cpu(weight: WeightCodes) -> WeightCodes:
    return WeightCodes(*(tensor.detach().cpu() for tensor in weight))


@contextlib.contextmanager
def _inference(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser in evaluation mode and without gradients of its own, and afterwards as it was."""
    training = denoiser.training
    needed = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    try:
        denoiser.eval().requires_grad_(False)
        yield
    finally:
        denoiser.train(training)
        for parameter in needed:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that add in a fixed order: on a GPU the fast ones for gradients of attention and convolution
    do not.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        with sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else contextlib.nullcontext():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
