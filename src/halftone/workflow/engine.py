"""Snakemake with its news as JSON: `python -m halftone.workflow.engine ARGUMENTS` takes Snakemake's own
arguments.

Registers a log handler of Snakemake's plugin interface under the name `halftone` and runs Snakemake in this
process. Each line on standard output that starts with `MARK` is one event; `halftone.workflow.invoke` reads
them.
"""

from __future__ import annotations

import json
import re
import sys
import types
from logging import WARNING, LogRecord
from typing import Any

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

MARK = "\x1e"
_NOTHING = "Nothing to be done"
# Snakemake's own account of a failure; ours names the job's message and its log instead
_REDUNDANT = re.compile(
    r"Exiting because a job execution failed"
    r"|(WorkflowError|RuleException):\s+(At least one job|CalledProcessError)"
)


class Handler(LogHandlerBase):
    """Turns log records into events; keeps quiet about the rest below a warning."""

    def emit(self, record: LogRecord) -> None:
        for event in _events(record):
            sys.stdout.write(f"{MARK}{json.dumps(event)}\n")
            sys.stdout.flush()

    @property
    def writes_to_stream(self) -> bool:
        return True

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return True

    @property
    def has_formatter(self) -> bool:
        return True

    @property
    def needs_rulegraph(self) -> bool:
        return False


def _events(record: LogRecord) -> list[dict[str, Any]]:
    said: Any = record.__dict__
    kind = said.get("event")
    if kind == LogEvent.RUN_INFO:
        return [
            {"kind": "planned", "jobs": {rule: n for rule, n in said["stats"].items() if rule != "total"}}
        ]
    if kind == LogEvent.JOB_INFO:
        return [
            {
                "kind": "started",
                **_job(said),
                "wildcards": dict(said["wildcards"] or {}),
                "why": said["reason"],
            }
        ]
    if kind == LogEvent.JOB_FINISHED:
        return [{"kind": "finished", "job": said["job_id"]}]
    if kind == LogEvent.JOB_ERROR:
        return [{"kind": "failed", **_job(said)}]
    if kind in (LogEvent.GROUP_ERROR,):
        return [{"kind": "failed", **_job(job)} for job in said["job_error_info"]]
    text = record.getMessage().strip()
    if text.startswith(_NOTHING):
        return [{"kind": "nothing"}]
    if record.levelno >= WARNING and text and not _REDUNDANT.match(text):
        return [{"kind": "message", "text": text}]
    return []


def _job(said: dict[str, Any]) -> dict[str, Any]:
    return {"job": said["jobid"], "rule": said["rule_name"], "log": [str(path) for path in said["log"]]}


def main(arguments: list[str]) -> None:
    from snakemake.cli import main as snakemake

    module: Any = types.ModuleType("snakemake_logger_plugin_halftone")
    module.LogHandler = Handler
    LoggerPluginRegistry().register_plugin(module.__name__, module)
    snakemake(["--logger", "halftone", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
