"""The verb `summary`: the rows of every scenario's metrics, with the timings of their rules, as one table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halftone.columns import DISTRIBUTION, NAMES, blank
from halftone.errors import UserError
from halftone.files import read_json, write_text
from halftone.recipes import FULL_PRECISION

Row = dict[str, Any]

_REQUIRED = ("model", "scenario", "recipe", "tier", "execution")
_SAME = ("n_images", "prompts_sha256", "features")
_QUANTIZE = ("reconstruct", "calibrate", "export")
FLOOR = "fp-floor"
FULL_PRECISION_ROWS = (FULL_PRECISION, FLOOR)


def summarize(metrics: Iterable[Path | str], output: Path | str, timings: Path | str | None = None) -> None:
    """Write the rows of all metrics files to a CSV of `halftone.columns`; what is absent is empty.

    timings: folder of Snakemake's benchmark files, `RULE/SCENARIO.tsv` and `sample/SCENARIO/SHARD.tsv`.
    Rows come model by model and tier by tier, full precision first, otherwise in the order given.
    Raises UserError for a file that holds no rows, an unknown column, a row given twice, or rows of one model
    and tier whose distribution figures do not compare.
    """
    rows: list[Row] = []
    sources: list[str] = []
    for path in metrics:
        for row in read_rows(path):
            rows.append({**row, **_timings(row, Path(timings) if timings else None)})
            sources.append(str(path))
    if not rows:
        raise UserError("summary: no metrics given; name at least one results/metrics/*.json")
    _check_unique(rows, sources)
    check_comparable(rows)
    firsts = list(dict.fromkeys((row["model"], row["tier"]) for row in rows))
    rows.sort(key=lambda row: (firsts.index((row["model"], row["tier"])), _place(row)))
    write_text(output, to_csv(rows))


def read_rows(path: Path | str) -> list[Row]:
    """The rows of one metrics file, checked against the columns."""
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: holds no rows; run halftone metrics again")
    for row in rows:
        _check_row(row, str(path))
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, NAMES, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(row.get(name)) for name in NAMES})
    return stream.getvalue()


def read_csv(path: Path | str) -> list[Row]:
    """The rows of a summary, numbers as numbers, empty cells as None. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run halftone summary first") from None
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != NAMES:
        absent = [name for name in NAMES if name not in (reader.fieldnames or ())]
        what = f"lacks the column {absent[0]}" if absent else "has other columns than a summary"
        raise UserError(f"{path}: {what}; run halftone summary again")
    rows = [{name: _value(name, cell) for name, cell in row.items()} for row in reader]
    if not rows:
        raise UserError(f"{path}: has no rows; run halftone summary again")
    for row in rows:
        _check_row(row, str(path))
    check_comparable(rows)
    return rows


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may stand in one table: those of one model and tier."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["tier"]), []).append(row)
    return list(found.values())


def check_comparable(rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse rows of one model and tier with distribution figures of different images, prompts or networks.

    Such figures must not stand in one table. Raises UserError.
    """
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        if all(blank(row.get(name)) for name in DISTRIBUTION):
            continue
        before = first.setdefault((row["model"], row["tier"]), row)
        for name in _SAME:
            if before.get(name) != row.get(name):
                raise UserError(
                    f"tier {row['tier']!r}: {name} is {before.get(name)!r} for {before['scenario']} and "
                    f"{row.get(name)!r} for {row['scenario']}, so their Fréchet distances do not compare: "
                    "measure both alike, or use two tiers"
                )


def _check_row(row: Mapping[str, Any], where: str) -> None:
    for name in _REQUIRED:
        if blank(row.get(name)):
            raise UserError(f"{where}: a row lacks {name}; run halftone metrics again")
    if unknown := sorted(set(row) - set(NAMES)):
        raise UserError(f"{where}: unknown column {unknown[0]!r}; run halftone metrics again")
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name} of {row['scenario']} is {value}; measure the scenario again")


def _check_unique(rows: Sequence[Row], sources: Sequence[str]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for row, source in zip(rows, sources, strict=True):
        key = (row["scenario"], row["recipe"])
        if key in seen:
            raise UserError(
                f"{source}: {row['recipe']} of {row['scenario']} is also in {seen[key]}; leave one out"
            )
        seen[key] = source


def source_of(row: Mapping[str, Any]) -> str:
    """The scenario that a row's images come from: the floor row's are those of full precision."""
    return str(row["scenario"]).removesuffix("-floor") if row["recipe"] == FLOOR else str(row["scenario"])


def _place(row: Mapping[str, Any]) -> int:
    return (
        FULL_PRECISION_ROWS.index(row["recipe"])
        if row["recipe"] in FULL_PRECISION_ROWS
        else len(FULL_PRECISION_ROWS)
    )


def _timings(row: Mapping[str, Any], folder: Path | None) -> Row:
    """quantize_seconds, sample_seconds and peak_mib of a row, as far as its rules left benchmark files."""
    if folder is None:
        return {}
    scenario = source_of(row)
    quantize = [folder / "calibration_data" / f"{row['model']}.tsv"]
    quantize += [folder / rule / f"{scenario}.tsv" for rule in _QUANTIZE]
    if row["recipe"] in FULL_PRECISION_ROWS:
        quantize = []
    quantized = [_benchmark(path) for path in quantize if path.is_file()]
    sampled = [_benchmark(path) for path in sorted((folder / "sample" / scenario).glob("*.tsv"))]
    found: Row = {}
    for name, runs in (("quantize_seconds", quantized), ("sample_seconds", sampled)):
        if seconds := [run["s"] for run in runs if "s" in run]:
            found[name] = round(sum(seconds), 3)
    if peaks := [run["max_rss"] for run in quantized + sampled if "max_rss" in run]:
        found["peak_mib"] = round(max(peaks), 1)
    return found


def _benchmark(path: Path) -> dict[str, float]:
    """The last line of a benchmark file; what Snakemake could not measure ("-", "NA") is left out."""
    with path.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream, delimiter="\t"))
    if not lines or "s" not in lines[-1]:
        raise UserError(f"{path}: not a benchmark file of Snakemake; remove it and run its rule again")
    measured = {}
    for name, text in lines[-1].items():
        try:
            value = float(text)
        except (TypeError, ValueError):
            continue
        if name is not None and math.isfinite(value):
            measured[name] = value
    return measured


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


_TEXT = {"model", "scenario", "recipe", "protocol", "tier", "execution", "features"}
_TEXT |= {"prompts_sha256", "artefact_sha256"}


def _value(name: str | None, text: str | None) -> Any:
    if not text:
        return None
    if name in _TEXT:
        return text
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise UserError(f"summary: {name} is {text!r}, not a number; run halftone summary again") from None
