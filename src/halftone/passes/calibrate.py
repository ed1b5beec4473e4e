"""Activation parameters from the reference trajectory (static calibration).

At every call the wrapped denoiser, its weights quantized, is run on the full-precision trajectory's inputs
while all sites observe in float. Ranges are kept per call or shared over the calls, as `axes.time_axis`
says, and estimated on the calls that `axes.calibration_calls` chooses; extremes are noted at every call.
(Q-Diffusion and DGQ, without the pass through quantized activations upstream.)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.denoiser import SiteKind
from halftone.errors import UserError
from halftone.passes import checkpoint as checkpoints
from halftone.passes.adaptive import Chooser
from halftone.passes.call_groups import group_of
from halftone.passes.grouping import IndexExtremes, ends_of, estimator, fit_site, is_grouped, partition
from halftone.passes.samples import calibration_prompts
from halftone.passes.state import ActivationParameters, SiteParameters, set_parameters
from halftone.policies import GroupLayout, Probabilities, Selector, TimeAxis
from halftone.probability_quantizer import ProbabilityQuantizer
from halftone.progress import Progress
from halftone.quantizers.affine import AffineParams
from halftone.quantizers.groups import Grouping
from halftone.quantizers.log2 import fit_log2
from halftone.quantizers.ranges import Estimator, MinMax, make_estimator
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.trajectory import Trajectory, denoiser_inputs

NONE = torch.zeros(0)
"""In place of the parameters of a site that takes them from its tensors."""


def calibrate(
    denoiser: nn.Module,
    quantizers: Mapping[str, SiteQuantizer],
    context: CallContext,
    trajectory: Trajectory,
    axes: Axes,
    *,
    batch_size: int,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> ActivationParameters:
    """Parameters of every site, also set in `quantizers`, whose mode is off afterwards.

    denoiser: wrapped, its weights quantized already. batch_size: prompts per forward. seed: of the choice of
    calls, where it is random. checkpoint: a file
    renewed after every call; the same arguments go on from it, with the same bits. The caller removes it.
    Raises UserError naming site and call where a tensor holds NaN or infinite values.
    """
    walk = Walk(quantizers, axes)
    calls = trajectory.n_calls
    chosen = calibration_prompts(trajectory, axes.calibration_calls, seed)
    widths = {name: quantizer.widths for name, quantizer in quantizers.items()}
    facts = [axes.model_dump(mode="json"), widths, batch_size, seed]
    mark = "" if checkpoint is None else checkpoints.fingerprint(denoiser, trajectory, facts)
    if checkpoint is not None:
        walk.resume(checkpoint, mark)
    progress = Progress("calibrate", calls)
    progress.advance(walk.done) if walk.done else None
    device, dtype = _place(denoiser)
    set_mode(quantizers, Mode.OBSERVE)
    try:
        for call in range(walk.done, calls):
            walk.start_call(call)
            with torch.no_grad(), context.at(call):
                rest = sorted(set(range(trajectory.n_prompts)) - set(chosen[call]))
                for prompts, estimating in ((chosen[call], True), (rest, False)):
                    walk.estimating = estimating
                    for first in range(0, len(prompts), batch_size):
                        batch = prompts[first : first + batch_size]
                        denoiser(**denoiser_inputs(trajectory, call, batch, device=device, dtype=dtype))
            walk.finish_call()
            if checkpoint is not None:
                walk.save(checkpoint, mark)
            progress.advance()
    finally:
        set_mode(quantizers, Mode.OFF)
        for quantizer in quantizers.values():
            quantizer.observer = None
    found = walk.parameters()
    set_parameters(quantizers, found)
    return found


def denoiser_calls(trajectory: Trajectory, axes: Axes, batch_size: int, seed: int = 0) -> int:
    """Calls of the denoiser that `calibrate` makes with these arguments, each on one batch."""
    chosen = [len(prompts) for prompts in calibration_prompts(trajectory, axes.calibration_calls, seed)]
    return sum(-(-n // batch_size) - (n - trajectory.n_prompts) // batch_size for n in chosen)


class _Watch:
    """Observer of one site: an estimator of its range, and the extremes of the call at hand."""

    def __init__(self, site: str, walk: Walk, call: int) -> None:
        self.site, self.walk, self.call = site, walk, call
        self.extremes = MinMax()
        self.last: Tensor | None = None

    def update(self, x: Tensor) -> None:
        try:
            self.extremes.update(x)
            if self.site in self.walk.choosers:
                value = self.walk.watches.get(self.walk.value_of(self.site))
                self.walk.choosers[self.site].update(x, None if value is None else value.last, self.call)
            elif self.site in self.walk.values:
                self.last = x
            if self.walk.estimating:
                self.walk.estimators[self.site].update(x)
        except ValueError as fault:
            raise UserError(
                f"{self.site}, call {self.call}: {fault}; run the model in float32, or see if it makes images"
            ) from None

    def seen(self) -> tuple[Tensor, Tensor]:
        try:
            return self.extremes.range()
        except ValueError:
            raise UserError(f"{self.site}, call {self.call}: the denoiser does not run this module") from None


class Walk:
    """Calibration in progress: what was found of each site at the calls done so far, by column.

    groups: partitions that are given; others are found in what is seen. One that all calls share (`aligned`)
    can be found after the last of them, so until then the extremes of every index at every call are kept.
    """

    def __init__(
        self,
        quantizers: Mapping[str, SiteQuantizer],
        axes: Axes,
        groups: Mapping[str, Grouping] | None = None,
    ) -> None:
        self.quantizers, self.axes, self.groups = quantizers, axes, groups or {}
        self.one_partition = axes.group_layout is GroupLayout.ALIGNED
        self.kept: dict[str, list[dict[str, Tensor]]] = {}
        self.columns: dict[str, dict[str, list[Tensor]]] = {
            name: {column: [] for column in ("scale", "zero_point", "lo", "hi")} for name in quantizers
        }
        self.done = 0
        self.estimating = True
        self.watches: dict[str, _Watch] = {}
        self.estimators = self._new_estimators(0)
        self.choosers = self._new_choosers()
        measured = axes.adaptive_selector is Selector.OUTPUT_ERROR
        self.values = {self.value_of(site) for site in self.choosers} if measured else set()

    def value_of(self, site: str) -> str:
        """The site of the values that the probabilities of `site` are multiplied with."""
        return f"{self.quantizers[site].site.module}.{SiteKind.VALUE}"

    def _new_choosers(self) -> dict[str, Chooser]:
        return {
            name: Chooser(self.axes, quantizer)
            for name, quantizer in self.quantizers.items()
            if isinstance(quantizer, ProbabilityQuantizer) and quantizer.form.codes is Probabilities.ADAPTIVE
        }

    def _new_estimators(self, call: int) -> dict[str, Estimator]:
        found: dict[str, Estimator] = {}
        for name, quantizer in self.quantizers.items():
            if not quantizer.learnable:
                found[name] = MinMax()
                continue
            whole = make_estimator(self.axes, quantizer.width(call), quantizer.granularity)
            found[name] = (
                estimator(quantizer, self.axes, whole) if is_grouped(quantizer, self.axes) else whole
            )
        return found

    def start_call(self, call: int) -> None:
        if self.axes.time_axis is TimeAxis.PER_CALL:
            self.estimators = self._new_estimators(call)
        self.watches = {name: _Watch(name, self, call) for name in self.quantizers}
        for name, quantizer in self.quantizers.items():
            quantizer.observer = self.watches[name]

    def finish_call(self) -> None:
        for name, watch in self.watches.items():
            lo, hi = watch.seen()
            self.columns[name]["lo"].append(lo.reshape(()).cpu())
            self.columns[name]["hi"].append(hi.reshape(()).cpu())
        if self.axes.time_axis is TimeAxis.PER_CALL:
            self._fit(self.done)
            self._choose(self.done)
        self.done += 1

    def _choose(self, call: int) -> None:
        """Codes of the calls whose group ends with this one; octaves bring a scale of their own."""
        calls, groups = self.n_calls, self.axes.adaptive_groups
        group = group_of(call, calls, groups)
        if call + 1 < calls and group_of(call + 1, calls, groups) == group:
            return
        for name, chooser in self.choosers.items():
            columns, log2 = self.columns[name], chooser.log2()
            made = columns.setdefault("log2", [])
            for one in range(len(made), call + 1):
                made.append(torch.tensor(log2))
                if log2 and columns["scale"]:
                    columns["scale"][one] = fit_log2(columns["hi"][one], 2).scale
        self.choosers = self._new_choosers()

    @property
    def n_calls(self) -> int:
        """Calls of the trajectory, where parameters are kept per call."""
        return max((len(quantizer.widths) for quantizer in self.quantizers.values()), default=1)

    def last(self) -> ActivationParameters:
        """What was found at the call done last, per-call parameters among it."""
        return {
            site: SiteParameters(**{name: rows[-1] if rows else NONE for name, rows in columns.items()})
            for site, columns in self.columns.items()
        }

    def take(self, found: ActivationParameters) -> None:
        """What `last` gave, as the next call done."""
        for site, values in found.items():
            for name, value in values._asdict().items():
                if value is not None and value.numel():
                    self.columns[site].setdefault(name, []).append(value)
        self.done += 1

    def use(self, call: int) -> None:
        """Let the quantizers use, at `call`, what was found at it."""
        for site, values in self.last().items():
            quantizer = self.quantizers[site]
            if isinstance(quantizer, ProbabilityQuantizer) and values.log2 is not None:
                assert quantizer.chosen is not None
                quantizer.chosen[call] = bool(values.log2)
            if quantizer.dynamic:
                continue
            params = AffineParams(values.scale, values.zero_point, quantizer.width(call))
            found = None
            if values.axis is not None and values.labels is not None:
                found = Grouping(values.axis[None], values.labels[None])
            quantizer.set_call(call, params, found)

    def _fit(self, call: int) -> None:
        for name, found in self.estimators.items():
            quantizer = self.quantizers[name]
            if quantizer.dynamic:
                continue
            if isinstance(found, IndexExtremes) and found.grouped:
                self._fit_groups(name, found, call)
                continue
            found_here = quantizer.fitted(*found.range(), quantizer.width(call))
            for column, value in zip(("scale", "zero_point"), found_here, strict=True):
                # what is shared by the whole tensor needs no axes to broadcast over
                shape = () if value.numel() == 1 else value.shape
                self.columns[name][column].append(value.reshape(shape).cpu())

    def _fit_groups(self, name: str, found: IndexExtremes, call: int) -> None:
        groups = self.groups.get(name)
        if groups is None and self.one_partition and self.axes.time_axis is TimeAxis.PER_CALL:
            state = {part: value.cpu() for part, value in found.state().items()}
            self.kept.setdefault(name, []).append(state)
            return
        if groups is None:
            groups = partition(self.quantizers[name], self.axes, [found.ends])
        self._add(name, groups, found.state(), call)

    def _add(self, name: str, groups: Grouping, state: Mapping[str, Tensor], call: int) -> None:
        fitted = fit_site(self.quantizers[name], self.axes, groups, ends_of(state), call)
        columns = self.columns[name]
        columns["scale"].append(fitted.params.scale.cpu())
        columns["zero_point"].append(fitted.params.zero_point.cpu())
        columns.setdefault("axis", []).append(fitted.axis)
        columns.setdefault("labels", []).append(fitted.labels)

    def parameters(self) -> ActivationParameters:
        if self.axes.time_axis is TimeAxis.SHARED:
            self._fit(0)
        for name, states in self.kept.items():
            groups = partition(self.quantizers[name], self.axes, [ends_of(state) for state in states])
            for call, state in enumerate(states):
                self._add(name, groups, state, call)
        self.kept = {}
        if self.one_partition:
            for columns in self.columns.values():
                columns |= {part: columns[part][:1] for part in ("axis", "labels") if part in columns}
        return {
            site: SiteParameters(**{name: _stacked(rows) for name, rows in columns.items()})
            for site, columns in self.columns.items()
        }

    def save(self, path: Path, mark: str) -> None:
        tensors = {
            f"column/{site}/{name}": _stacked(rows)
            for site, columns in self.columns.items()
            for name, rows in columns.items()
        }
        if self.axes.time_axis is TimeAxis.SHARED:
            for name, found in self.estimators.items():
                tensors |= {f"estimator/{name}/{part}": value for part, value in found.state().items()}
        for name, chooser in self.choosers.items():
            tensors |= {f"chooser/{name}/{part}": value for part, value in chooser.state().items()}
        for name, states in self.kept.items():
            for part in states[0]:
                tensors[f"kept/{name}/{part}"] = torch.stack([state[part] for state in states])
        checkpoints.save(path, tensors, mark)

    def resume(self, path: Path, mark: str) -> None:
        tensors = checkpoints.load(path, mark)
        if tensors is None:
            if path.exists():
                print(f"{path}: of another run, so calibration starts over", file=sys.stderr)
            return
        states: dict[str, dict[str, Tensor]] = {}
        choices: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            name, _, part = rest.rpartition("/")
            if kind == "column":
                self.columns[name][part] = list(value.unbind())
            elif kind == "chooser":
                choices.setdefault(name, {})[part] = value
            elif kind == "kept":
                rows = self.kept.setdefault(name, [{} for _ in value])
                for row, one in zip(rows, value.unbind(), strict=True):
                    row[part] = one
            else:
                states.setdefault(name, {})[part] = value
        for name, state in states.items():
            device = self.quantizers[name].scale.device
            self.estimators[name].load_state({part: value.to(device) for part, value in state.items()})
        for name, state in choices.items():
            self.choosers[name].load_state(state)
        self.done = len(next(iter(self.columns.values()))["lo"]) if self.columns else 0


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if rows else NONE


def _place(denoiser: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(denoiser.parameters())
    return parameter.device, parameter.dtype
