"""Sampling runs of one pipeline, batch beside batch, all held at the same call of the denoiser.

Each run is the real pipeline with a scheduler of its own, in a thread that waits whenever it asks for the
denoiser. So any scheduler and any pipeline work, and what a run needs to go on is what its scheduler holds.
One thread computes at a time.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import queue
import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from halftone.denoiser import denoiser_of


class _Abandoned(BaseException):
    """Raised in a run that nobody waits for any more."""


def _own(value: Any) -> Any:
    """Random generators copied: what is drawn from them stays to be drawn by the next run on the same
    arguments."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return [_own(one) for one in value] if isinstance(value, list) else value


class _Run(threading.Thread):
    def __init__(self, pipeline: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(daemon=True)
        self.pipeline = copy.copy(pipeline)
        self.pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        self.arguments = {name: _own(value) for name, value in arguments.items()}
        self.after: Tensor | None = None
        self.result: Any = None
        if hasattr(self.pipeline.scheduler, "step"):
            self._watch(self.pipeline.scheduler)
        self.asked: queue.SimpleQueue[Tensor | BaseException | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()

    def _watch(self, scheduler: Any) -> None:
        original = scheduler.step

        @functools.wraps(original)  # pipelines read the signature
        def step(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.after = output.prev_sample if hasattr(output, "prev_sample") else output[0]
            return output

        scheduler.step = step

    def run(self) -> None:
        end: BaseException | None = None
        try:
            with torch.no_grad():  # not inherited by threads
                self.result = self.pipeline(**self.arguments)
        except _Abandoned:
            pass
        except BaseException as fault:  # handed to the thread that waits
            end = fault
        self.asked.put(end)

    def ask(self, latents: Tensor) -> Tensor:
        """In the run's own thread: the denoiser's output for these inputs."""
        self.asked.put(latents)
        answer = self.answers.get()
        if answer is None:
            raise _Abandoned
        return answer.to(latents.device)  # one kept from an earlier run comes from the CPU

    def begin(self) -> Tensor | None:
        """Start, and wait for what the run asks for first; None if it ends. Raises what the run raised."""
        self.start()
        return self._next()

    def go_on(self, answer: Tensor) -> Tensor | None:
        """The denoiser's output for what was asked, and what is asked next, as `begin`."""
        self.answers.put(answer)
        return self._next()

    def _next(self) -> Tensor | None:
        found = self.asked.get()
        if isinstance(found, BaseException):
            raise found
        return found


class Lockstep:
    """A context in which `latents` are those of the current call and `answer` takes all runs to the next.

    pipeline: any diffusers pipeline; `arguments`: of its `__call__`, one mapping per batch. They stay as they
    are, random generators too, so that another run on them makes the same noise.
    """

    def __init__(self, pipeline: Any, arguments: Sequence[Mapping[str, Any]]) -> None:
        self.denoiser: nn.Module = denoiser_of(pipeline)
        self.runs = [_Run(pipeline, one) for one in arguments]
        self.latents: list[Tensor] = []
        """By batch: the latents as the denoiser is given them, both guidance halves."""

    @property
    def after(self) -> list[Tensor]:
        """By batch: what the scheduler made of the last answer, (prompts, channels, height, width)."""
        return [run.after for run in self.runs if run.after is not None]

    @property
    def results(self) -> list[Any]:
        """By batch: what the pipeline returned, once it has."""
        return [run.result for run in self.runs]

    def __enter__(self) -> Self:
        original = self.denoiser.forward
        signature = inspect.signature(original)
        name = next(iter(signature.parameters))

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = threading.current_thread()
            if not isinstance(run, _Run):
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            output = run.ask(bound[name])
            whole = bound.get("return_dict", True)
            return SimpleNamespace(sample=output) if whole else (output,)

        self.denoiser.forward = forward
        with contextlib.ExitStack() as undo:
            undo.callback(self._leave)
            # one at a time: runs share a tokenizer, whose padding is its state
            self._hold([run.begin() for run in self.runs])
            undo.pop_all()
        return self

    def _hold(self, found: Sequence[Tensor | None]) -> None:
        self.latents = [latents for latents in found if latents is not None]

    def answer(self, outputs: Sequence[Tensor]) -> None:
        """Hand every run the denoiser's output; `latents` are then those of the next call, none at the end.

        Raises what a run raises.
        """
        self._hold([run.go_on(output) for run, output in zip(self.runs, outputs, strict=True)])

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        for run in self.runs:
            if run.is_alive():
                run.answers.put(None)
                run.join()
        with contextlib.suppress(AttributeError):
            del self.denoiser.forward
