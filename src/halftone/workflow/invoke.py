"""Run Snakemake as a child process and follow what it does."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halftone.errors import EXIT_USER, UserError
from halftone.workflow.paths import Rule

PROFILE = Path("workflow/profiles/default")
LOCKS = Path(".snakemake/locks")
INTERRUPTED = 130
_MARK = "\x1e"
_BOX = " \t│╭╮╰╯─"  # what the command line frames its own errors with
_CHATTER = "Using workflow specific profile"  # said before the log handler is in place
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Event:
    """One thing Snakemake did: planned, started, finished, failed, nothing, or message."""

    kind: str
    job: int | None = None
    rule: str = ""
    wildcards: dict[str, str] = field(default_factory=dict)
    log: tuple[str, ...] = ()
    jobs: dict[str, int] = field(default_factory=dict)
    text: str = ""
    why: str = ""

    @property
    def key(self) -> str:
        """The scenario or model of the job."""
        return self.wildcards.get("scenario") or self.wildcards.get("model") or ""


def command(
    targets: Sequence[str],
    *,
    overlays: Sequence[Path] = (),
    profile: Path = PROFILE,
    only: Rule | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """The Snakemake command line; `only` allows no other rule's jobs.

    `--` keeps options from swallowing targets.
    """
    parts = ["--workflow-profile", str(profile), *options]
    if overlays:
        parts += ["--configfile", *map(str, overlays)]
    if only is not None:
        parts += ["--allowed-rules", only]
    return [*parts, "--", *targets]


def run(
    arguments: Sequence[str], notice: Callable[[Event], None], tick: Callable[[], None] = lambda: None
) -> int:
    """Run Snakemake; `notice` sees every event, `tick` is called every second between them.

    Returns its exit code, 130 after an interruption.

    The child leads a process group of its own, so that one interruption reaches it once and its jobs as well;
    it is asked to end should this process be killed.
    """
    source = str(Path(__file__).resolve().parents[2])
    child = subprocess.Popen(
        [sys.executable, "-m", "halftone.workflow.engine", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        },
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    assert child.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    interrupted = False
    try:
        while True:
            try:
                while (line := _next(lines)) is not None:
                    if event := _parse(line):
                        notice(event)
                    tick()
                code = child.wait()
                return INTERRUPTED if interrupted else code
            except KeyboardInterrupt:
                interrupted = True
                os.killpg(child.pid, signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _read(stream: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _next(lines: queue.Queue[str | None]) -> str | None:
    """The next line; an empty one after a second without; None at the end."""
    try:
        return lines.get(timeout=1)
    except queue.Empty:
        return ""


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _parse(line: str) -> Event | None:
    if not line.startswith(_MARK):
        chatter = not line.strip() or line.startswith(_CHATTER)
        return None if chatter else Event("message", text=line.rstrip())
    said: dict[str, Any] = json.loads(line[1:])
    return Event(**{**said, "log": tuple(said.get("log", ()))})


def ready(overlays: Sequence[Path] = ()) -> None:
    """Remove the lock that a killed run left behind.

    Raises UserError while another run is alive in this folder.
    """
    if other := running():
        raise UserError(
            f"process {other} is already running the workflow in {Path.cwd()}: "
            f"wait for it, or end it (kill {other})"
        )
    if LOCKS.is_dir() and any(LOCKS.iterdir()):
        run(command([], overlays=overlays, options=["--unlock"]), lambda _: None)


def running() -> int | None:
    """Process id of another Snakemake in this folder."""
    import psutil

    here = os.path.realpath(".")
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.pid == os.getpid() or not any(_is_snakemake(word) for word in words[:4]):
            continue
        try:
            if os.path.realpath(process.cwd()) == here:
                return int(process.pid)
        except psutil.Error:  # another user's, or gone by now
            continue
    return None


def _is_snakemake(word: str) -> bool:
    return Path(word).name == "snakemake" or word == "halftone.workflow.engine"


@dataclass(frozen=True)
class Failure:
    """A job that failed: its own last words and where the rest stands."""

    rule: str
    message: str
    log: str
    by_user: bool

    @property
    def exit_code(self) -> int:
        return EXIT_USER if self.by_user else 1

    def __str__(self) -> str:
        return f"{self.rule} failed: {self.message}" + (f" (log: {self.log})" if self.log else "")


def failure(event: Event) -> Failure:
    """Read what a failed job said. A line that starts with `halftone: ` is the user's to put right."""
    log = event.log[0] if event.log else ""
    try:
        told = Path(log).read_text(errors="replace").splitlines()
        lines = [bare for line in told if (bare := line.strip(_BOX))]
    except OSError:
        lines = []
    last = lines[-1] if lines else "it ended without a message"
    by_user = last.startswith("halftone: ")
    return Failure(event.rule, last.removeprefix("halftone: "), log, by_user)
