"""Verbs that look: into an artefact, at the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from halftone.axes import Axes
from halftone.cli import options
from halftone.recipes import PRESETS

Artefact = Annotated[Path, typer.Argument(help="Folder of an artefact.", show_default=False)]


def verify(artefact: Artefact) -> int:
    """Check every file of an artefact against its manifest, its contents, and that it loads."""
    options.existing(artefact, "export")

    from halftone.artefact import verify as check_all
    from halftone.errors import EXIT_USER

    checks = check_all(artefact)
    for check in checks:
        print(
            f"{'ok    ' if check.passed else 'FAILED'} {check.name}"
            + (f": {check.fault}" if check.fault else "")
        )
    failed = sum(not check.passed for check in checks)
    print(
        f"{artefact}: {'whole' if not failed else f'{failed} of {len(checks)} checks failed; get it again'}"
    )
    return EXIT_USER if failed else 0


def info(
    artefact: Artefact,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say what an artefact is: model, recipe, bits, schedule, sizes, what stays in float."""
    options.existing(artefact, "export")

    from halftone.artefact import info as read

    facts = read(artefact)
    if as_json:
        print(json.dumps(facts, indent=2, sort_keys=True))
        return
    for name, value in facts.items():
        if not isinstance(value, dict | list):
            print(f"{name:22} {value}")
    known = facts["provenance"]
    print(
        f"{'made from':22} {known['model_path']}"
        + (f" at {known['model_revision']}" if known["model_revision"] else "")
    )
    print(
        f"{'schedule':22} {known['scheduler']['class']}, {known['steps']} steps, guidance {known['guidance']}"
    )
    if known["budget"]:
        print(f"{'budget':22} {known['budget']}")
    if departs := departures(facts["recipe"], facts["axes"]):
        print(f"{'axes':22} " + ", ".join(f"{name} {value}" for name, value in departs.items()))
    for name, part in facts["components"].items():
        where = f" {part['from']}" if "from" in part else ""
        inside = f", {len(part['float'])} tensors in float" if "float" in part else ""
        print(f"{name:22} {part['stored']}{where}, {part['size_mib']} MiB{inside}")
    for kind, how, number in facts["sites"]:
        if how != "float":
            print(f"{kind:22} {how}: {number} sites")
    for reason, names in facts["float"].items():
        print(f"in float, {reason}: {len(names)} sites")
    for line in options.kernels(**facts["integer"]):
        print(line)
    if parity := facts["parity"]:
        found = f"{parity['modules']} modules, {parity['calls']} calls, {parity['prompts']} prompts"
        print(f"{'parity':22} {'passed' if parity['passed'] else 'FAILED'} ({found}, {parity['cpu']})")
        for name in (
            "next_code_share",
            "far_codes",
            "largest_difference",
            "largest_call_ratio",
            "largest_exact_ratio",
        ):
            print(f"  {name:20} {parity[name]:.3g}")


def departures(recipe: str, axes: Mapping[str, Any]) -> dict[str, Any]:
    """The axes on which a row departs from its recipe, as plain values."""
    preset = dict(PRESETS[recipe])
    return {name: value for name, value in Axes.model_validate(axes) if value != preset[name]}


def schema() -> None:
    """Print the JSON Schema of params.yaml: every key with range and default; and the axes of a recipe."""
    from halftone.settings import Settings

    described = Settings.model_json_schema()
    described["$defs"]["Axes"] = Axes.model_json_schema()
    described["$defs"]["Axes"]["presets"] = {
        name: axes.model_dump(mode="json") for name, axes in PRESETS.items()
    }
    print(json.dumps(described, indent=2, sort_keys=True))
