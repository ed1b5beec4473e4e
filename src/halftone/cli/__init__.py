"""The command line: one verb per rule, and what people need around them.

Arguments are checked before anything heavy is imported. Exit codes: 0 done, 2 the user's input (one line on
standard error), 1 our fault (with a traceback), 130 interrupted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from halftone import __version__
from halftone.cli import (
    analyze,
    calibrate,
    calibration_data,
    export,
    fetch_prompts,
    image_reward,
    inspection,
    metrics,
    outliers,
    preference,
    propagation,
    proxy,
    reconstruct,
    reparameterize,
    report,
    sample,
    sensitivity,
    summary,
    verdicts,
    whole,
    workflow,
)
from halftone.errors import EXIT_USER, UserError
from halftone.workflow.invoke import INTERRUPTED

app = typer.Typer(
    name="halftone",
    help="Quantize text-to-image diffusion models to low-bit integers, and measure what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _top(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        print(f"halftone {__version__}")
        raise typer.Exit


WHOLE, STEPS, LOOK, WORKFLOW = "From model to verdict", "Single steps", "Look", "The workflow"


def guarded(verb: Callable[..., int | None]) -> Callable[..., None]:
    """The verb with its exit codes: its own where it returns one, and those of what it raises."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = verb(*args, **kwargs) or 0
        except UserError as fault:
            code = _fail(str(fault))
        except KeyboardInterrupt:
            print("halftone: interrupted", file=sys.stderr)
            code = INTERRUPTED
        except (MemoryError, RuntimeError) as fault:
            if not _out_of_memory(fault) or "batch_size" not in kwargs:
                raise
            code = _fail(
                "out of memory: lower --batch-size (in params.yaml: batch_size), or free some memory"
            )
        raise typer.Exit(code)

    return run


def _fail(message: str) -> int:
    print(f"halftone: {message}", file=sys.stderr)
    return EXIT_USER


Verb = Callable[..., int | None]
VERBS: dict[str, dict[str, Verb]] = {
    WHOLE: {
        "plan": whole.plan,
        "quantize": whole.quantize,
        "evaluate": verdicts.evaluate,
        "compare": verdicts.compare,
    },
    WORKFLOW: {
        "run": workflow.run,
        "record": workflow.record,
        "trust": workflow.trust,
        "prune": workflow.prune,
    },
    STEPS: {
        "fetch-prompts": fetch_prompts.verb,
        "calibration-data": calibration_data.verb,
        "reparameterize": reparameterize.verb,
        "reconstruct": reconstruct.verb,
        "sensitivity": sensitivity.verb,
        "calibrate": calibrate.verb,
        "analyze": analyze.verb,
        "export": export.verb,
        "sample": sample.verb,
        "metrics": metrics.verb,
        "summary": summary.verb,
        "report": report.verb,
    },
    LOOK: {
        "proxy": proxy.verb,
        "outliers": outliers.verb,
        "propagation": propagation.verb,
        "preference": preference.verb,
        "image-reward": image_reward.verb,
        "verify": inspection.verify,
        "info": inspection.info,
        "schema": inspection.schema,
    },
}
for _panel, _verbs in VERBS.items():
    for _name, _verb in _verbs.items():
        app.command(_name, rich_help_panel=_panel)(guarded(_verb))
HIDDEN: dict[str, Verb] = {"stage": workflow.stage, "code": workflow.code}
for _name, _verb in HIDDEN.items():
    app.command(_name, hidden=True)(guarded(_verb))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Usage errors are told, and left with exit code 2, by Typer."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="halftone")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _out_of_memory(fault: Exception) -> bool:
    """MemoryError, and torch's own ways of saying it, on a GPU and on the CPU."""
    text = str(fault)
    return isinstance(fault, MemoryError) or "out of memory" in text or "can't allocate memory" in text


__all__ = ["app", "main"]
