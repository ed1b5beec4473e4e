"""Progress with an estimate of the time left, on a terminal and in a log file alike.

A terminal line is rewritten in place; anything else gets a plain line at most every `LOG_SECONDS`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

T = TypeVar("T")
LOG_SECONDS = 10.0
TERMINAL_SECONDS = 0.2


def clock(seconds: float) -> str:
    """`75.4` -> `1:15`; `3725` -> `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts units of work towards `total` and prints `title 12/64 (19 %), 0:31 left`."""

    def __init__(self, title: str, total: float, stream: TextIO | None = None) -> None:
        self.title, self.total = title, total
        self.done = 0.0
        self._start = time.monotonic()
        self._shown = 0.0
        self._stream = stream or sys.stderr

    def advance(self, units: float = 1.0, note: str = "") -> None:
        self.done += units
        now = time.monotonic()
        terminal = self._stream.isatty()
        finished = self.done >= self.total
        if finished or now - self._shown >= (TERMINAL_SECONDS if terminal else LOG_SECONDS):
            self._shown = now
            elapsed = now - self._start
            left = elapsed * (self.total - self.done) / self.done if self.done else float("nan")
            tail = f"took {clock(elapsed)}" if finished else f"{clock(left)} left"
            line = f"{self.title} {self.done:g}/{self.total:g} ({100 * self.done / self.total:.0f} %), {tail}"
            line += f", {note}" if note else ""
            end = "\n" if finished or not terminal else ""
            print(f"\r\x1b[K{line}" if terminal else line, end=end, file=self._stream, flush=True)


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items`, showing progress after each."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    progress = Progress(title, total)
    for item in items:
        yield item
        progress.advance()
