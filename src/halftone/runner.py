"""`halftone run`: the whole workflow in one command, with one line of progress and a short account at the
end.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from halftone import estimate, tracking
from halftone.errors import UserError
from halftone.files import read_json
from halftone.progress import LOG_SECONDS, TERMINAL_SECONDS, clock
from halftone.settings import PromptSet, Settings
from halftone.workflow import config, invoke, models, records
from halftone.workflow.paths import GRID, METRICS, REPORT, SUMMARY


def run(overlays: Sequence[Path] = (), *, profile: Path = invoke.PROFILE, cores: int | None = None) -> int:
    """Bring the report of the selected tier up to date; returns the exit code.

    0 done, 2 where a job failed because of the user's input, 1 where one failed otherwise, 130 interrupted.
    Raises UserError for settings that cannot be run, before anything is started.
    """
    settings = config.settings(overlays)
    _check(settings, profile)
    invoke.ready(overlays)
    gpu = Path("/dev/nvidia0").exists()
    line = Line(estimate.jobs(settings, gpu=gpu), cores or os.cpu_count() or 1)
    options = ["--cores", str(cores)] if cores else []
    arguments = invoke.command([REPORT], overlays=overlays, profile=profile, options=options)
    code = invoke.run(arguments, line.notice, line.show)
    line.close()
    if code == invoke.INTERRUPTED:
        print("halftone: interrupted; `halftone run` goes on where it stopped", file=sys.stderr)
    elif line.failures:
        for failure in line.failures:
            print(f"halftone: {failure}", file=sys.stderr)
        return max(failure.exit_code for failure in line.failures)
    elif code:
        print("halftone: the workflow did not start; the messages above say why", file=sys.stderr)
    else:
        print(account(settings))
    return code


def _check(settings: Settings, profile: Path) -> None:
    """What Snakemake would otherwise report in its own words, or only after an hour."""
    if not Path("Snakefile").is_file():
        raise UserError(f"{Path.cwd()}: no Snakefile here; run from the folder of the checkout")
    if not (profile / "config.yaml").is_file():
        raise UserError(f"{profile}: no such profile; it must be a folder with a config.yaml")
    for row in settings.rows():
        scenario = settings.scenarios[row]
        models.files(settings.models[scenario.model])
        models.real_files(settings.models[scenario.model])
        for kind in (settings.tiers[scenario.tier].prompts, PromptSet.CALIBRATION):
            path = settings.prompt_file(scenario.model, kind)
            if path is not None and not Path(path).is_file():
                raise UserError(f"{path}: no such prompt file; correct prompts in params.yaml")
    records.check(settings)


class Line:
    """One line for the whole run: jobs done, time left, and what runs now."""

    def __init__(self, jobs: Sequence[estimate.Job], cores: int, stream: TextIO | None = None) -> None:
        self._jobs, self._cores = jobs, cores
        self._stream = stream or sys.stderr
        self._left: estimate.Remaining | None = None
        self._names: dict[int, str] = {}
        self._start = time.monotonic()
        self._shown = 0.0
        self.failures: list[invoke.Failure] = []

    def notice(self, event: invoke.Event) -> None:
        now = time.monotonic()
        if event.kind == "planned":
            self._left = estimate.Remaining(self._jobs, event.jobs, self._cores)
        elif event.kind == "started" and self._left is not None and event.job is not None:
            self._left.start(event.job, event.rule, event.key, now)
            self._names[event.job] = f"{event.rule} {event.key}".strip()
        elif event.kind == "finished" and self._left is not None and event.job is not None:
            self._left.finish(event.job, now)
            self._names.pop(event.job, None)
        elif event.kind == "failed":
            self._fail(event)
        elif event.kind == "message":
            self._say(event.text)
        self.show(force=event.kind in ("finished", "planned"))

    def _fail(self, event: invoke.Event) -> None:
        found = invoke.failure(event)
        if event.job is not None:
            self._names.pop(event.job, None)
            if self._left is not None:
                self._left.drop(event.job)
        if found not in self.failures:
            self.failures.append(found)

    def _say(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self._stream.isatty() else text, file=self._stream, flush=True)

    def show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        terminal = self._stream.isatty()
        if self._left is None or not self._left.total:
            return
        if not force and now - self._shown < (TERMINAL_SECONDS if terminal else LOG_SECONDS):
            return
        self._shown = now
        done, total = self._left.done, self._left.total
        took, left = clock(now - self._start), clock(self._left.seconds(now))
        tail = f"took {took}" if done == total else f"{took} so far, about {left} left"
        text = f"{done}/{total} jobs, {tail}" + (
            f": {', '.join(self._names.values())}" if self._names else ""
        )
        if terminal:
            width = os.get_terminal_size(self._stream.fileno()).columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._left is not None and self._stream.isatty():
            print(file=self._stream)


def account(settings: Settings) -> str:
    """The table, and where to look further."""
    lines = [_table(settings), f"report  {Path(REPORT).resolve()}"]
    if (grid := Path(GRID)).is_file():
        lines.append(f"images  {grid.resolve()}")
    uri = os.environ.get(tracking.URI) or tracking.default_uri()
    lines.append(
        f"runs    mlflow server --backend-store-uri {uri} --workers 1  (then open http://127.0.0.1:5000)"
    )
    return "\n".join(lines)


def _table(settings: Settings) -> str:
    import rich.box
    from rich.console import Console
    from rich.table import Table

    from halftone.report.summary import groups, read_csv
    from halftone.report.table import Verdict, table

    said = {row: str(read_json(METRICS.format(scenario=row)).get("verdict", "")) for row in settings.rows()}
    console = Console(width=None if sys.stdout.isatty() else 200)
    with console.capture() as written:
        for rows in groups(read_csv(SUMMARY)):  # two models share no table
            made = table(rows, {row: Verdict("", text) for row, text in said.items()})
            heads = (head.label for head in made.heads)
            title = f"{rows[0]['model']}, tier {rows[0]['tier']}"
            shown = Table(*heads, title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
            for row in made.rows:
                shown.add_row(row.name, *(cell.value for cell in row.cells), row.verdict.title)
            console.print(shown)
    return written.get()
