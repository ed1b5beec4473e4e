"""Options that several verbs share, and what can be checked about them without loading anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from halftone.axes import Axes
from halftone.errors import UserError
from halftone.prompts import read_prompts
from halftone.quantizers.bits import HIGHEST, LOWEST, Bits
from halftone.recipes import PRESETS, resolve
from halftone.settings import (
    CLASS_GUIDANCE,
    GUIDANCE,
    Budget,
    Calibration,
    Components,
    Metrics,
    PromptSet,
    Protocol,
    Reconstruction,
    Sampling,
)

CALIBRATION, RECONSTRUCTION, SAMPLING, METRICS = Calibration(), Reconstruction(), Sampling(), Metrics()
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="Diffusers folder, .safetensors file, or hub id (with --revision).", show_default=False
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Of a hub id: best a commit of 40 digits.", show_default=False)
]
RowImages = Annotated[
    list[Path], typer.Option(help="Zips of the row; repeat for every shard.", show_default=False)
]
ReferenceImages = Annotated[
    list[Path], typer.Option(help="Zips of full precision; repeat for every shard.", show_default=False)
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help="Text file, one prompt a line; none for a model without text.", show_default=False
    ),
]
ImageSet = Annotated[
    PromptSet | None,
    typer.Option(
        "--image-set",
        help="Of a model without text: which noise; no two sets share any. (Default: validation.)",
        show_default=False,
    ),
]
RealImages = Annotated[
    str | None,
    typer.Option(
        help="Of fid_to_real: folder or zip of images; `scenes` for the embedded model without text.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.", show_default=False)]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Inference steps of the sampler.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=50,
        help=f"Classifier-free guidance scale. (Default: {GUIDANCE}, {CLASS_GUIDANCE} with classes; an "
        "unconditional model has none.)",
        show_default=False,
    ),
]
Resolution = Annotated[
    int | None,
    typer.Option(
        min=8, max=4096, help="Image height and width in pixels, a multiple of 8. (Default: the model's own.)"
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, max=4096, help="Rows of a denoiser call; fewer need less memory.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is not image noise.")]
Recipe = Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.", show_default=False)]
BitsOption = Annotated[
    str,
    typer.Option(
        "--bits",
        help="w4a8: 4-bit weights, 8-bit activations; w4a4s8: 8-bit probabilities; w4a4b8: first and last "
        f"layer of 8 bits, in float without. {LOWEST} to {HIGHEST}.",
        show_default=False,
    ),
]
AxesOption = Annotated[
    str | None,
    typer.Option(
        "--axes",
        help='Axes to override, as JSON: \'{"time_axis": "per_call"}\'. `halftone schema` lists them.',
        show_default=False,
    ),
]
ProtocolOption = Annotated[
    Protocol,
    typer.Option(help="Sites: the same for every recipe, or those that the recipe's authors quantize."),
]
Data = Annotated[
    Path, typer.Option("--data", help="Reference trajectory, of calibration-data.", show_default=False)
]
BudgetOption = Annotated[
    Budget, typer.Option("--budget", help="Iterations, as a share of the published schedule.")
]
CacheMib = Annotated[
    int, typer.Option(min=16, help="Memory for a unit's inputs and outputs; more spills to disk.")
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="Folder for checkpoints, removed at the end. (Default: beside the output.)", show_default=False
    ),
]
Overlays = Annotated[
    list[str] | None,
    typer.Argument(
        help="Overlays of params.yaml: names under experiments/, or YAML files.", show_default=False
    ),
]
ComponentsOption = Annotated[
    Components,
    typer.Option(
        "--components",
        help="Text encoder and VAE: copied, named by hub id and commit, or stored with int8 weights.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        help="Of the run in MLflow and in tables. (Default: that of the output.)", show_default=False
    ),
]


def model(path: str, revision: str | None) -> str:
    """Raises UserError for a path that is no file or folder and cannot be a hub id either."""
    local = Path(path)
    if local.exists():
        return path
    if local.suffix or not _HUB_ID.fullmatch(path) or local.parent.is_dir():
        raise UserError(
            f"{path}: no such folder or file; give a diffusers folder, a .safetensors, or OWNER/NAME"
        )
    if not revision:
        raise UserError(f"{path}: a hub id may change: add --revision, best a commit of 40 digits")
    return path


def same_row(path: Path, made_for: Any, chosen: Any, remedy: str) -> None:
    """Raises UserError for a file that was made for another row than the one chosen."""
    if made_for != chosen:
        raise UserError(f"{path}: was made for another model, trajectory, recipe or bits; {remedy} again")


def existing(path: Path, made_by: str) -> Path:
    """Raises UserError for a file or folder that is not there."""
    if not path.exists():
        raise UserError(f"{path}: no such file; make it with `halftone {made_by}`, or correct the path")
    return path


def prompts(path: Path, count: int | None) -> list[str]:
    """The first `count` prompts of a file (all by default). Raises UserError where there are fewer."""
    found = read_prompts(path)
    if count is not None and count > len(found):
        raise UserError(
            f"{path}: holds {len(found)} prompts, {count} were asked for; ask for fewer or add some"
        )
    return found if count is None else found[:count]


def calibration(path: Path | None, count: int) -> list[str] | int:
    """The first `count` prompts of a file; of a model without text, their number. Raises UserError."""
    return count if path is None else prompts(path, count)


def resolution(value: int | None) -> int | None:
    if value is not None and value % 8:
        raise UserError(f"--resolution {value}: must be a multiple of 8")
    return value


def axes(recipe: str, text: str | None) -> Axes:
    """The recipe's axes with those of `--axes` put in. Raises UserError."""
    overrides: Any = {}
    if text:
        try:
            overrides = json.loads(text)
        except json.JSONDecodeError as fault:
            raise UserError(
                f'--axes: not JSON ({fault}); write for example \'{{"time_axis": "per_call"}}\''
            ) from None
        if not isinstance(overrides, dict):
            raise UserError("--axes: must be a JSON object of axis and value")
    try:
        return resolve(recipe, overrides)
    except ValueError as fault:
        raise UserError(_axis_fault(fault)) from None


def _axis_fault(fault: ValueError) -> str:
    errors = getattr(fault, "errors", None)
    if errors is None:
        return str(fault)
    first = errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"--axes: {name}: no such axis; choose from {', '.join(Axes.model_fields)}"
    said = first["msg"].removeprefix("Value error, ")  # of axes that do not go together: names them itself
    return f"--axes: {name}: {said}" if name else f"--axes: {said}"


def kernels(kernels: dict[str, int], fallbacks: dict[str, list[str]]) -> list[str]:
    """Lines that say how integer execution would run on this machine."""
    counts = ", ".join(f"{count} modules by {kernel}" for kernel, count in kernels.items())
    return [f"in integers here: {counts}"] + [
        f"  {reason}: {len(names)} modules, such as {names[0]}" for reason, names in fallbacks.items()
    ]


def bits(text: str) -> Bits:
    try:
        return Bits.parse(text)
    except ValueError as fault:
        raise UserError(f"--bits: {fault}") from None


def metrics(features: str, clip: str, bootstrap: int) -> Metrics:
    try:
        return Metrics(features=features, clip=clip, bootstrap=bootstrap)
    except ValidationError as fault:
        first = fault.errors()[0]
        raise UserError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from None


def scratch(given: Path | None, output: Path) -> Path:
    return given or output.with_name(f".{output.name}.work")


def name(given: str | None, output: Path) -> str:
    return given or output.name.split(".")[0]
