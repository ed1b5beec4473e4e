"""The loop around a training: when it logs, saves and shows, and how it ends.

SIGTERM ends it after the step in hand, with a checkpoint. A kill costs what came after the last one.
"""

from __future__ import annotations

import signal
import time
from typing import Protocol

import torch
from torch import Tensor

from halftone.scenes.training import Log


class Pace(Protocol):
    """Counts are of images seen."""

    @property
    def images(self) -> int: ...  # at which the training ends
    @property
    def batch(self) -> int: ...
    @property
    def first_save(self) -> int: ...  # at which it saves and shows for the first time
    @property
    def save_seconds(self) -> float: ...
    @property
    def sheet_seconds(self) -> float: ...


class Training(Protocol):
    images: int  # seen so far
    log: Log

    def step(self) -> Tensor:
        """One batch; counts it into ``images`` and returns its loss."""

    def save(self) -> None: ...
    def show(self) -> None: ...


LOG_SECONDS = 15.0


def run(training: Training, pace: Pace) -> None:
    """Steps until ``pace.images`` are seen or SIGTERM arrives; then saves, and shows if it is done."""
    started = saved = shown = logged = time.monotonic()
    first, losses = training.images, []
    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    try:
        while training.images < pace.images and not stopped:
            losses.append(training.step())
            now = time.monotonic()
            if now - logged > LOG_SECONDS:
                loss = float(torch.stack(losses).mean())
                rate = len(losses) * pace.batch / (now - logged)
                overall = (training.images - first) / (now - started)
                left = (pace.images - training.images) / overall / 60
                training.log.write(
                    images=training.images,
                    loss=round(loss, 5),
                    rate=round(rate, 1),
                    minutes_left=round(left, 1),
                )
                logged, losses = now, []
            early = training.images - pace.batch < pace.first_save <= training.images
            if early or now - saved > pace.save_seconds:
                training.save()
                saved = time.monotonic()
            if early or now - shown > pace.sheet_seconds:
                training.show()
                shown = time.monotonic()
        training.save()
        if not stopped:
            training.show()
    finally:
        signal.signal(signal.SIGTERM, before)
