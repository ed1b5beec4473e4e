"""Verbs that judge: `evaluate` an artefact against its model, `compare` two rows or two artefacts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halftone.axes import Axes
from halftone.cli import options
from halftone.cli.sample import images
from halftone.errors import UserError
from halftone.files import read_json

if TYPE_CHECKING:
    from halftone.compare import Change


def evaluate(
    artefact: Annotated[Path, typer.Argument(help="Folder of an artefact.", show_default=False)],
    prompts: options.Prompts = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of images, figures and report. (Default: beside the artefact.)"
        ),
    ] = None,
    n_images: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Images per seed set. (Default: all prompts.)")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Feature network of FID and KID: scenes or inception.")
    ] = "inception",
    image_set: options.ImageSet = None,
    real_images: options.RealImages = None,
    clip: Annotated[
        str, typer.Option(help="`scenes`, or an open_clip model as ARCHITECTURE/WEIGHTS.")
    ] = "ViT-B-32/laion2b_s34b_b79k",
    bootstrap: Annotated[
        int, typer.Option(min=100, help="Resamples of paired intervals.")
    ] = options.METRICS.bootstrap,
) -> int:
    """Sample from an artefact and from the model it was made of, measure, and write the report.

    Each step is a process of its own, so that the artefact's images come from one that never saw the original
    weights.
    """
    options.existing(artefact, "quantize")
    options.metrics(features, clip, bootstrap)
    count = images(prompts, n_images)
    output = output or artefact.with_name(f"{artefact.name}-evaluation")

    from halftone.artefact import provenance

    known = provenance(artefact)
    full = [
        known.model_path,
        *_flags(revision=known.model_revision, steps=known.steps, guidance=known.guidance),
    ]
    full += _flags(resolution=known.resolution)
    own = artefact.name if artefact.name != "fp" else "artefact"
    rows = {"fp": full, own: [str(artefact)]}
    common = _flags(prompts=prompts)
    zips = {row: output / "sample" / row / "0-of-1.zip" for row in rows}
    figures = {row: output / "metrics" / f"{row}.json" for row in rows}
    for row, source in rows.items():
        which = _flags(**{"n-images": count, "image-set": image_set})
        _step("sample", *source, *common, *which, "-o", str(zips[row]))
    for row in rows:
        of = [] if row == "fp" else ["--artefact", str(artefact)]
        how = _flags(features=features, clip=clip, bootstrap=bootstrap, model=Path(known.model_path).name)
        how += _flags(**{"real-images": real_images})
        pair = ["--images", str(zips[row]), "--reference", str(zips["fp"])]
        _step("metrics", *pair, *common, *of, *how, "-o", str(figures[row]))
    _step("summary", *map(str, figures.values()), "-o", str(output / "summary.csv"))
    page = output / "report.html"
    _step(
        "report",
        "--summary",
        str(output / "summary.csv"),
        *common,
        "--grid",
        str(output / "grid.png"),
        "-o",
        str(page),
    )
    print(f"{artefact.name}: {read_json(figures[own])['verdict']}\nreport: {page}")
    return 0


def _flags(**values: Any) -> list[str]:
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def _step(verb: str, *words: str) -> None:
    code = subprocess.run([sys.executable, "-m", "halftone", verb, *words], check=False).returncode
    if code:
        raise typer.Exit(code)


def compare(
    first: Annotated[
        str,
        typer.Argument(help="Scenario, its metrics file, artefact, or zip of images.", show_default=False),
    ],
    second: Annotated[
        str, typer.Argument(help="What to compare it with, of the same kind.", show_default=False)
    ],
    full: Annotated[
        str | None,
        typer.Option(
            help="Full precision, of the same kind: its row, for the share of the first row's loss that the "
            "second gives back; its zip, which two zips need.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Of two zips: their prompts; none without text.", show_default=False)
    ] = None,
    features: Annotated[
        str, typer.Option(help="Of two zips: network of the perceptual distance, scenes or inception.")
    ] = options.METRICS.features,
) -> None:
    """Compare two rows figure by figure, with paired intervals; two artefacts setting by setting; or two zips
    of images, of two executions say, image by image.
    """
    if first.endswith(".zip") and second.endswith(".zip"):
        _images(Path(first), Path(second), None if full is None else Path(full), prompts, features)
    elif Path(first).is_dir() and Path(second).is_dir():
        _artefacts(Path(first), Path(second))
    else:
        # a folder beside what is no folder: the fault is the other's, if that is absent
        rows = {name: _metrics(name) for name in sorted((first, second), key=os.path.isdir)}
        _rows(rows[first], rows[second], None if full is None else _metrics(full))


def _metrics(given: str) -> Path:
    path = Path(given)
    if path.is_dir():
        raise UserError(f"{given}: is a folder, what it is compared with is not; give two artefacts")
    if path.suffix != ".json":
        path = Path("results/metrics") / f"{given}.json"
    if not path.is_file():
        raise UserError(
            f"{given}: no artefact, and no figures of this name ({path}); run halftone metrics first"
        )
    return path


def _artefacts(first: Path, second: Path) -> None:
    from halftone.artefact import info

    facts = [dict(_flat(info(path))) for path in (first, second)]
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        a, b = (fact.get(name) for fact in facts)
        if a != b:
            print(f"{name:22} {a!s:>24} {b!s:>24}  differs")
        elif "/" not in name:  # of what lies deeper, only what differs
            print(f"{name:22} {a!s:>24} {b!s:>24}")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if name == "axes":
            if prefix:  # the provenance's, which are the same
                continue
            value = dict(Axes.model_validate(value))
        if name == "sites":  # kind, how, number
            value = {f"{kind} {how}": number for kind, how, number in value}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _rows(first: Path, second: Path, full: Path | None) -> None:
    from halftone.compare import changes

    _table(first.stem, second.stem, changes(first, second))
    if full is None:
        return
    from halftone.recovery import recoveries

    print(f"{second.stem} as a share of {first.stem}, 95 %")
    for name, one in recoveries(first, second, full).items():
        print(f"{name:42} {one.value:.3f} ({one.lo:.3f} to {one.hi:.3f})")


def _images(first: Path, second: Path, full: Path | None, prompts: Path | None, features: str) -> None:
    if full is None:
        raise UserError("compare: two zips need --full, the zip of full precision")
    for path in (first, second, full):
        options.existing(path, "sample")
    if prompts is not None:
        options.prompts(prompts, None)

    from halftone.compare_images import RARE, compare_images
    from halftone.evaluate.features import open_network

    found = compare_images(first, second, full, prompts, open_network(features))
    _table("first", "second", found.changes)
    print(f"{found.identical} of {found.count} images identical")
    rare = f"{RARE}th percentile {found.psnr_rare:.1f} dB"
    print(f"PSNR between them: median {found.psnr_median:.1f} dB, {rare}")
    print(f"not distinguishable in {', '.join(c.name for c in found.changes if not c.clear) or 'nothing'}")


def _table(first: str, second: str, changes: Iterable[Change]) -> None:
    width = max(12, len(first), len(second))
    print(f"{'':18} {first:>{width}} {second:>{width}}   second minus first, 95 %")
    for one in changes:
        interval = f"{one.change:+.4g} ({one.low:+.4g} to {one.high:+.4g}){'  *' if one.clear else ''}"
        print(f"{one.name:18} {one.first:{width}.4g} {one.second:{width}.4g}   {interval}")
    print("* clear: the interval leaves out zero")
