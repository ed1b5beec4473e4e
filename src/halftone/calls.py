"""Which call of a sampling run the denoiser is in, and which parameters serve it.

A schedule maps calls to timesteps and may repeat one (PNDM does), so parameters are kept per call index. A
run with another step count or scheduler takes, for each call, those of the nearest calibrated noise level.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halftone.errors import UserError

_SAME_TIMESTEP = (
    1e-3  # in units of training timesteps; samplers with continuous timesteps differ in the last bits
)
_LEGACY_TIMESTEPS = 1000
_LARGEST_NOISE = 1e4  # schedules with zero terminal SNR start at infinity


def noise_level(scheduler: Any, timestep: float) -> float | None:
    """sigma/alpha of the latents that the denoiser sees at `timestep`; None if the scheduler does not say.

    Diffusion schedules: sqrt((1 - a)/a), a = alphas_cumprod, interpolated in its logarithm between training
    timesteps. Flow matching: s/(1 - s), s the scheduler's sigma at that timestep. Otherwise the sigma itself.
    """
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is not None and len(products):
        place = min(max(timestep, 0.0), len(products) - 1.0)
        below = math.floor(place)
        pair = products[below : below + 2].double().clamp(1e-8, 1 - 1e-8)
        logs = 0.5 * torch.log((1 - pair) / pair)
        return min(math.exp(torch.lerp(logs[0], logs[-1], place - below).item()), _LARGEST_NOISE)
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if sigmas is None or timesteps is None or len(timesteps) == 0:
        return None
    training = float(getattr(scheduler.config, "num_train_timesteps", 1000))
    for scale in (1.0, training):  # some transformers are handed timestep / num_train_timesteps
        distances = (torch.as_tensor(timesteps).double() - timestep * scale).abs()
        nearest = int(distances.argmin())
        if distances[nearest] <= _SAME_TIMESTEP * scale:
            sigma = float(sigmas[nearest])
            if "FlowMatch" in type(scheduler).__name__:
                sigma = sigma / max(1 - sigma, 1 / _LARGEST_NOISE)
            return min(sigma, _LARGEST_NOISE)
    return None


def legacy_slots(timesteps: Sequence[float] | Tensor) -> list[int]:
    """The slot that DGQ's published code takes at every call: floor((1000 - t) / (1000 / n)), n the number of
    different timesteps.

    PNDM repeats one, so from its third call on each call takes what was fitted to the call before. For
    comparison with published numbers only. Raises UserError for a sampler that has no such lookup.
    """
    times = [float(t) for t in timesteps]
    count = len(set(times))
    slots = [math.floor((_LEGACY_TIMESTEPS - t) * count / _LEGACY_TIMESTEPS) for t in times]
    whole = all(t == int(t) for t in times)
    # every timestep finds a slot of its own
    if not whole or slots != sorted(slots) or set(slots) != set(range(count)):
        raise UserError(
            "legacy_lookup: this sampler's timesteps are not evenly spaced whole numbers below "
            f"{_LEGACY_TIMESTEPS}; set legacy_lookup to false, or choose PNDM"
        )
    return slots


class CallContext:
    """The call a denoiser is in (`index`) and the parameter slot that serves it (`slot`).

    One context belongs to one denoiser and is read by all its quantizers. `attach` hooks the denoiser; a run
    is delimited by `run()`, which `attach` also puts around a pipeline's `__call__`, so any diffusers
    pipeline works unchanged.

    :param timesteps: timestep of every calibrated call; None: slot = index, whatever the timestep
    :param noise_levels: sigma/alpha of every calibrated call, see `noise_level`
    :param lookup: slot that serves each calibrated call; None: its own
    """

    def __init__(
        self,
        timesteps: Sequence[float] | Tensor | None = None,
        noise_levels: Sequence[float] | Tensor | None = None,
        lookup: Sequence[int] | None = None,
    ) -> None:
        self.lookup = lookup
        self.timesteps = None if timesteps is None else [float(t) for t in timesteps]
        self.noise_levels = None if noise_levels is None else [float(s) for s in noise_levels]
        if self.timesteps is not None and len(self.noise_levels or self.timesteps) != len(self.timesteps):
            raise ValueError("timesteps and noise levels differ in length")
        self.index = 0
        self.slot = 0
        self._pipeline: Any = None
        self._running = False
        self._runs = 0
        self._pinned = False
        self._warned = False
        self._last_timestep = math.nan
        self._timestep_place: int | None = None
        self._hooks: list[Any] = []

    @property
    def count(self) -> int | None:
        """Number of calibrated calls, None if unknown."""
        return None if self.timesteps is None else len(self.timesteps)

    @property
    def run_number(self) -> int | None:
        """Which sampling run of the context's life this is; None outside one, and where a call is pinned."""
        return self._runs if self._running and not self._pinned else None

    def reset(self) -> None:
        """Before the first call."""
        self.index = self.slot = 0
        self._last_timestep = math.nan

    def advance(self) -> None:
        """After a call. The post-forward hook does it."""
        self.index += 1

    @contextlib.contextmanager
    def run(self, expected: int | None = None) -> Iterator[CallContext]:
        """One sampling run: reset at entry and, whatever happens, at exit; nothing inside another run.

        Raises RuntimeError at a clean exit if `expected` is given and another number of calls was made.
        """
        if self._running:
            yield self
            return
        self.reset()
        self._running = True
        self._runs += 1
        try:
            yield self
            if expected is not None and self.index != expected:
                raise RuntimeError(
                    f"the sampling run made {self.index} denoiser calls, {expected} were expected"
                )
        finally:
            self._running = False
            self.reset()

    @contextlib.contextmanager
    def at(self, call: int) -> Iterator[CallContext]:
        """Pins the context to one calibrated call, for denoiser runs outside a sampler."""
        before = self.index, self.slot, self._pinned
        self.index, self.slot = call, self._slot_of(call)
        self._pinned = True
        try:
            yield self
        finally:
            self.index, self.slot, self._pinned = before

    def attach(self, denoiser: nn.Module, pipeline: Any = None) -> None:
        """Hooks the denoiser's forward, and marks the pipeline's `__call__` as a run.

        The pipeline instance gets a subclass of its own class, of the same name, whose `__call__` runs in
        `run()`: unlike a hook on a scheduler's `set_timesteps` this survives another scheduler being put in,
        sees exceptions, and holds for pipelines that set timesteps twice. A denoiser that is used by another
        pipeline or by hand still works: a timestep above the last one starts a new run.
        """
        self.detach()
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._timestep_place = names.index("timestep") if "timestep" in names else None
        self._hooks = [
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after),
        ]
        if pipeline is not None:
            self._pipeline = pipeline
            _mark_runs(pipeline, self)

    def detach(self) -> None:
        """Removes the hooks from the denoiser."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pinned:
            return
        timestep = self._timestep(args, kwargs)
        if not self._running and timestep > self._last_timestep:
            self.index = 0
        self._last_timestep = timestep
        self.slot = self._slot_of(self.slot_for(self.index, timestep))

    def _after(self, denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._pinned:
            self.advance()

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        value = kwargs.get("timestep")
        if value is None and self._timestep_place is not None and len(args) > self._timestep_place:
            value = args[self._timestep_place]
        return (
            math.nan if value is None else float(value.flatten()[0] if isinstance(value, Tensor) else value)
        )

    def _slot_of(self, call: int) -> int:
        return call if self.lookup is None else self.lookup[call]

    def slot_for(self, index: int, timestep: float) -> int:
        """Calibrated call that serves call `index` at `timestep`: the same if the schedule is the calibrated
        one.

        Otherwise that of the nearest noise level (distance of logarithms; without a scheduler to ask, of the
        nearest timestep), the nearest index among equals, and one warning in the context's life.
        Raises UserError if the timestep is unknown and the calibrated calls are used up.
        """
        if self.timesteps is None:
            return index
        if math.isnan(timestep):
            if index < len(self.timesteps):
                return index
            raise UserError(
                f"denoiser call {index + 1} of a run, but parameters were calibrated for {self.count}"
            )
        if index < len(self.timesteps) and abs(self.timesteps[index] - timestep) <= _SAME_TIMESTEP:
            return index
        scheduler = getattr(self._pipeline, "scheduler", None)
        level = None if scheduler is None or self.noise_levels is None else noise_level(scheduler, timestep)
        if level is None or self.noise_levels is None:
            distances = [abs(t - timestep) for t in self.timesteps]
        else:
            wanted = math.log(max(level, 1e-8))
            distances = [abs(math.log(max(s, 1e-8)) - wanted) for s in self.noise_levels]
        best = min(range(len(distances)), key=lambda k: (round(distances[k], 9), abs(k - index)))
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"this schedule is not the calibrated one (call {index + 1} is at timestep {timestep:g}; "
                f"calibrated: {len(self.timesteps)} calls, {self.timesteps[0]:g} to {self.timesteps[-1]:g}): "
                "every call takes the parameters of the nearest calibrated noise level",
                stacklevel=2,
            )
        return best


def _mark_runs(pipeline: Any, context: CallContext) -> None:
    cls = type(pipeline)
    if getattr(cls, "_halftone_runs", False):  # marked before: put this context in its place
        pipeline._halftone_context = context
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._halftone_context.run():
            return cls.__call__(self, *args, **kwargs)

    # `pipeline.__call__`'s signature is read by diffusers and by us
    call.__signature__ = inspect.signature(cls.__call__)  # type: ignore[attr-defined]
    call.__doc__ = cls.__call__.__doc__
    facts = {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__, "_halftone_runs": True}
    pipeline.__class__ = type(cls.__name__, (cls,), facts)
    pipeline._halftone_context = context
