"""Parity of integer and simulated execution, measured when an artefact is made and kept in it as numbers.

Module by module, both are given the same input: codes must be the same, a few at ties excepted, and outputs
may differ by the rounding of floats alone. Call by call, both are given the inputs of the reference
trajectory: what integer execution changes must be small beside what quantization changed. Beside that stands,
as a number without a bound, how far integer execution is from exact arithmetic: quantizers turn a last bit of
a float into a whole step where a value lies at a tie, and each such step moves values downstream.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from halftone.attention import QuantizedAttnProcessor
from halftone.calls import CallContext
from halftone.errors import UserError
from halftone.files import read_json, write_json
from halftone.layers import QuantizedLayer
from halftone.progress import track
from halftone.runtime.layers import CodedLayer, IntegerAttnProcessor
from halftone.site_quantizer import SiteQuantizer
from halftone.trajectory import Trajectory, denoiser_inputs

FILE = "parity.json"
MOST_AT_TIES = 1e-3
"""Share of codes that may be the next one."""
MOST_IN_OUTPUT = 1e-5
"""Largest difference of a module's outputs, as a share of the largest output."""
MOST_IN_CALL = 0.1
"""Rms of integer - simulated, as a share of the rms of simulated - full precision."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModuleParity(_Part):
    """One module, over all calls measured."""

    module: str
    kernel: str
    codes: int = Field(ge=0, description="codes of its inputs, or of its probabilities, that were compared")
    next_code: int = Field(ge=0, description="codes that are one apart")
    far_code: int = Field(ge=0, description="codes that are further apart")
    difference: float = Field(ge=0, description="largest, of outputs, as a share of the largest output")

    @property
    def passed(self) -> bool:
        few = self.next_code <= MOST_AT_TIES * self.codes
        return few and self.far_code == 0 and self.difference <= MOST_IN_OUTPUT


class CallParity(_Part):
    """One call of the reference trajectory: rms differences of the denoiser's outputs."""

    call: int
    simulated_to_full: float = Field(ge=0, description="what quantization changed")
    integer_to_simulated: float = Field(ge=0, description="what integer execution changed")
    integer_to_exact: float = Field(ge=0, description="what float32 changed, beside float64 everywhere")

    @property
    def passed(self) -> bool:
        return self.integer_to_simulated <= MOST_IN_CALL * self.simulated_to_full

    def share(self, change: float) -> float:
        """A change as a share of what quantization changed."""
        return change / max(self.simulated_to_full, 1e-30)


class Parity(_Part):
    """The certificate: numbers only, with the machine they were measured on."""

    format: int = 1
    prompts: int = Field(ge=1, description="of the calibration set, from its top")
    torch: str
    cpu: str = Field(description="architecture, and what PyTorch makes of it")
    modules: tuple[ModuleParity, ...]
    calls: tuple[CallParity, ...]

    @property
    def passed(self) -> bool:
        return all(part.passed for part in self.modules) and all(call.passed for call in self.calls)

    def columns(self) -> dict[str, Any]:
        """What `halftone info` shows."""
        compared = sum(part.codes for part in self.modules)
        return {
            "passed": self.passed,
            "modules": len(self.modules),
            "calls": len(self.calls),
            "prompts": self.prompts,
            "next_code_share": sum(part.next_code for part in self.modules) / max(compared, 1),
            "far_codes": sum(part.far_code for part in self.modules),
            "largest_difference": max((part.difference for part in self.modules), default=0.0),
            "largest_call_ratio": max((c.share(c.integer_to_simulated) for c in self.calls), default=0.0),
            "largest_exact_ratio": max((c.share(c.integer_to_exact) for c in self.calls), default=0.0),
            "cpu": self.cpu,
        }

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Parity:
        """Raises UserError where the file is no certificate."""
        try:
            return cls.model_validate(read_json(path))
        except (ValidationError, RecursionError, ValueError) as fault:
            raise UserError(f"{path}: not a parity certificate ({type(fault).__name__})") from None


class Built(NamedTuple):
    """A denoiser that was built, with the context that says which call it is in."""

    denoiser: nn.Module
    context: CallContext


def measure(
    full: nn.Module,
    simulated: Built,
    integer: Built,
    exact: Built,
    trajectory: Trajectory,
    *,
    prompts: int = 2,
    calls: int = 6,
) -> Parity:
    """Compare a denoiser in integers with the simulated one, and that with the full-precision one.

    exact: the one of `halftone.runtime.integer.build_exact`. prompts: those at the top of the trajectory;
    calls: that many, evenly spaced from the first to the last.
    """
    chosen = range(min(prompts, trajectory.n_prompts))
    places = torch.linspace(0, trajectory.n_calls - 1, min(calls, trajectory.n_calls)).round().int().tolist()
    comparison = _Comparison(simulated.denoiser, integer.denoiser)
    given = next(full.parameters())
    home: dict[str, Any] = {"device": given.device, "dtype": given.dtype}
    results = []
    with torch.inference_mode(), comparison:
        for call in track(places, "parity"):
            inputs = denoiser_inputs(trajectory, call, chosen, dtype=torch.float32)
            wanted = full(**denoiser_inputs(trajectory, call, chosen, **home))[0].double().cpu()
            with simulated.context.at(call), integer.context.at(call):
                comparison.on = False
                before = simulated.denoiser(**inputs)[0].double()
                comparison.on = True
                after = integer.denoiser(**inputs)[0].double()
                comparison.on = False
            with exact.context.at(call):
                wide = denoiser_inputs(trajectory, call, chosen, dtype=torch.float64)
                oracle = exact.denoiser(**wide)[0]
            results.append(
                CallParity(
                    call=call,
                    simulated_to_full=_rms(before - wanted),
                    integer_to_simulated=_rms(after - before),
                    integer_to_exact=_rms(after - oracle),
                )
            )
    return Parity(
        prompts=len(chosen),
        torch=torch.__version__,
        cpu=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        modules=comparison.results(),
        calls=tuple(results),
    )


class _Comparison:
    """Gives every module of the simulated denoiser what its integer counterpart is given, and counts."""

    def __init__(self, simulated: nn.Module, integer: nn.Module) -> None:
        self.on = False
        self.undo: list[Callable[[], None]] = []
        self.counts: dict[str, list[int]] = {}
        self.extremes: dict[str, list[float]] = {}
        self.kernels: dict[str, str] = {}
        self.pairs = [
            (name, module, simulated.get_submodule(name))
            for name, module in integer.named_modules()
            if isinstance(module, CodedLayer | IntegerAttnProcessor)
        ]

    def __enter__(self) -> _Comparison:
        for name, fast, slow in self.pairs:
            self.counts[name], self.extremes[name] = [0, 0, 0], [0.0, 0.0]
            if isinstance(fast, CodedLayer):
                assert isinstance(slow, QuantizedLayer)
                self.kernels[name] = type(fast.products()[0]).__name__
                hook = fast.register_forward_hook(self._layer(name, slow))
                self.undo.append(hook.remove)
            else:
                assert isinstance(fast, IntegerAttnProcessor)
                assert isinstance(slow, QuantizedAttnProcessor)
                self.kernels[name] = "whole numbers in float"
                fast.attend = self._attention(name, fast, slow)  # type: ignore[method-assign]
                self.undo.append(partial(fast.__dict__.pop, "attend"))
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self.undo:
            undo()

    def results(self) -> tuple[ModuleParity, ...]:
        return tuple(
            ModuleParity(
                module=name.removesuffix(".processor"),
                kernel=self.kernels[name],
                codes=codes,
                next_code=next_code,
                far_code=far_code,
                difference=self.extremes[name][0] / max(self.extremes[name][1], 1e-30),
            )
            for name, (codes, next_code, far_code) in self.counts.items()
        )

    def _layer(self, name: str, slow: QuantizedLayer) -> Callable[..., None]:
        def compare(fast: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            if not self.on:
                return
            assert isinstance(fast, CodedLayer)
            assert isinstance(slow.input, SiteQuantizer)
            for codes, wanted in fast.beside(args[0], slow.input):
                self._count(name, codes, wanted)
            self._difference(name, output, slow(args[0]))

        return compare

    def _attention(
        self, name: str, fast: IntegerAttnProcessor, slow: QuantizedAttnProcessor
    ) -> Callable[..., Tensor]:
        def attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            probabilities = fast.weights(attn, query, key, mask)
            output = fast.mix(probabilities, value)
            if self.on:
                wanted = slow.weights(attn, query, key, mask)
                self._count(name, fast.codes(probabilities), fast.codes(wanted))
                self._difference(name, output, slow.mix(probabilities, value))
            return output

        return attend

    def _count(self, name: str, found: Tensor, wanted: Tensor) -> None:
        apart = (found.int() - wanted.int()).abs()
        counts = self.counts[name]
        for k, number in enumerate((apart.numel(), int((apart == 1).sum()), int((apart > 1).sum()))):
            counts[k] += number

    def _difference(self, name: str, found: Tensor, wanted: Tensor) -> None:
        extremes = self.extremes[name]
        extremes[0] = max(extremes[0], float((found - wanted).abs().max()))
        extremes[1] = max(extremes[1], float(wanted.abs().max()))


def _rms(difference: Tensor) -> float:
    return float(difference.pow(2).mean().sqrt())


def failures(parity: Parity) -> Iterable[str]:
    """What lies outside its bound, in words."""
    for part in parity.modules:
        if not part.passed:
            codes = f"{part.next_code} codes next to theirs, {part.far_code} further"
            yield f"{part.module}: {codes}, outputs {part.difference:.2g} apart"
    for call in parity.calls:
        if not call.passed:
            yield (
                f"call {call.call}: integer execution changed {call.share(call.integer_to_simulated):.2g} of "
                f"what quantization did"
            )
