"""The page: everything about a run in one file that opens anywhere, now and in ten years.

No script, no font, no request leaves it; images and plots are embedded. The same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from halftone import __version__
from halftone.columns import COLUMNS, NAMES, blank
from halftone.errors import UserError
from halftone.files import write_text, writing
from halftone.plan import MIB, Plan
from halftone.recipes import FULL_PRECISION
from halftone.report.evidence import OWN_FACTS, PROMPTS, Evidence, gather
from halftone.report.grids import png, stack
from halftone.report.outliers import OutlierPlots, outliers_of
from halftone.report.pictures import grid_of, grids, uri, worst_of
from halftone.report.plots import Errors, errors_svg
from halftone.report.summary import FLOOR, FULL_PRECISION_ROWS, Row, groups, read_csv, source_of
from halftone.report.table import FEWEST_FOR_FRECHET, name_of, percent, prompted, shown, table
from halftone.unconditional import set_of


def write_report(
    summary: Path | str,
    output: Path | str,
    *,
    results: Path | str | None = None,
    prompts: Sequence[Path | str] = (),
    grid: Path | str | None = None,
) -> None:
    """Write the page of a summary to `output`, and its grids of images to `grid` (PNG) where that is given.

    results: folder with the rules' results (default: the summary's own). prompts: files to take captions
    from, each row's told by its hash; without them prompts are numbered. Raises UserError for a bad summary
    or damaged results.
    """
    rows = read_csv(summary)
    evidence = gather(rows, Path(results or Path(summary).parent), prompts)
    if grid is not None:
        sheets = grids(rows, evidence)
        if not sheets:
            raise UserError(f"{summary}: no images beside it to make {grid} of; run halftone sample first")
        with writing(grid) as temporary:
            temporary.write_bytes(png(stack(sheets)))
    write_text(output, render(rows, evidence, outliers_of(rows, Path(results or Path(summary).parent))))


def render(
    rows: Sequence[Row], evidence: Mapping[str, Evidence], outliers: Sequence[OutlierPlots] = ()
) -> str:
    """The page as HTML.

    rows: of a summary, already checked to compare. evidence: by scenario id. outliers: of the models that
    were looked at.
    """
    tables = [_with_originals(group, evidence) for group in groups(rows)]
    quantized = [(group, row) for group in tables for row in group if not _full_precision(row)]
    planned = [(group, row, evidence.get(source_of(row), Evidence())) for group, row in quantized]
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("halftone.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("page.html.j2")
    return template.render(
        title=_title(rows),
        lede=_lede(rows),
        brief=[_brief(group, row, evidence) for group, row in quantized],
        groups=[_group(place, group, evidence) for place, group in enumerate(tables)],
        scenarios=[
            _scenario(name_of(row, group), row, found.plan, found.ranges)
            for group, row, found in planned
            if found.plan is not None
        ],
        outliers=[
            {
                "model": one.model,
                "says": one.says,
                "map": uri(one.map.encode(), "image/svg+xml"),
                "worst": uri(one.worst.encode(), "image/svg+xml"),
            }
            for one in outliers
        ],
        columns=COLUMNS,
        every=[_every(group) for group in groups(rows)],
        environment=_environment(rows, evidence),
        reproduce=_reproduce(rows, evidence),
        version=__version__,
    )


def _full_precision(row: Row) -> bool:
    return row["recipe"] in FULL_PRECISION_ROWS


def _with_originals(rows: Sequence[Row], evidence: Mapping[str, Evidence]) -> list[Row]:
    """Rows in which full precision has the size and the bit operations that the plans say it has."""
    plans = [evidence[source_of(row)].plan for row in rows if source_of(row) in evidence]
    plan = next((plan for plan in plans if plan is not None), None)
    if plan is None:
        return list(rows)
    operations = plan.bit_operations
    known = {
        "weight_mib": plan.sizes.original_mib,
        "bops": None if operations is None else operations.original,
    }
    missing = {name: value for name, value in known.items() if value is not None}
    return [
        {**row, **{k: v for k, v in missing.items() if row.get(k) is None}} if _full_precision(row) else row
        for row in rows
    ]


def _title(rows: Sequence[Row]) -> str:
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    return f"{', '.join(models)}, quantized"


def _lede(rows: Sequence[Row]) -> str:
    quantized = [row for row in rows if not _full_precision(row)]
    executions = sorted({str(row["execution"]) for row in quantized})
    number = "One quantized row" if len(quantized) == 1 else f"{len(quantized)} quantized rows"
    say = {
        "simulated": "from integer codes multiplied in float (simulated execution)",
        "integer": "by integer kernels (integer execution)",
        "float": "in float",
    }
    texts = all(prompted(row) for row in rows)
    same = "same prompts and the same noise" if texts else "same noise (and the same prompts, if any)"
    how = " or ".join(say.get(kind, kind) for kind in executions)
    return (
        f"{number} measured against full precision. Images were sampled {how}, each row from its artefact on "
        f"disk, on the {same} as full precision."
    )


def _brief(group: Sequence[Row], row: Row, evidence: Mapping[str, Evidence]) -> dict[str, str]:
    """A row in one sentence."""
    reference = next((other for other in group if other["recipe"] == FULL_PRECISION), None)
    parts = []
    if reference is not None and reference.get("weight_mib") and row.get("weight_mib"):
        parts.append(f"{reference['weight_mib'] / row['weight_mib']:.3g} times smaller")
    if row.get("alignment") is not None:
        against = ""
        if reference is not None and reference.get("alignment") is not None:
            against = f" against {percent(reference['alignment'])}"
        parts.append(f"{percent(row['alignment'])} of images as the prompt says{against}")
    found = evidence.get(source_of(row), Evidence()).verdict
    parts += [f"{found.title}, on {row.get('n_images')} images"] if found.title else []
    return {
        "name": f"{name_of(row, group)}, tier {row['tier']}",
        "text": "; ".join(parts),
        "kind": found.kind,
    }


def _group(place: int, rows: Sequence[Row], evidence: Mapping[str, Evidence]) -> dict[str, Any]:
    # what the rows share, from the first that says it
    shared = {name: next((row[name] for row in rows if not blank(row.get(name))), None) for name in rows[0]}
    verdicts = {scenario: found.verdict for scenario, found in evidence.items()}
    made = table(rows, verdicts)
    return {
        "anchor": f"rows-{place + 1}",
        "title": f"{shared['model']}, tier {shared['tier']}",
        "what": _what(shared),
        "heads": made.heads,
        "rows": made.rows,
        "reading": _reading(rows),
        "errors": _errors(rows, evidence),
        "prompted": prompted(rows[0]),
        "grid": grid_of(rows, evidence),
        "worst": worst_of(rows, evidence),
    }


def _errors(rows: Sequence[Row], evidence: Mapping[str, Evidence]) -> str | None:
    """The plot of latent errors per call; None where no row has them."""
    found = []
    for row in rows:
        known = evidence.get(source_of(row), Evidence())
        if known.latent_error and not _full_precision(row):
            value, lo, hi = (tuple(call[key] for call in known.latent_error) for key in ("value", "lo", "hi"))
            relaxed = () if known.plan is None else known.plan.relaxed_calls
            found.append(Errors(name_of(row, rows), value, lo, hi, relaxed))
    return uri(errors_svg(found).encode(), "image/svg+xml") if found else None


def _what(row: Row) -> str:
    parts = [f"{row['n_images']} images per row and seed set"] if row.get("n_images") else []
    if row.get("prompts_sha256") and prompted(row):
        parts.append(f"prompts {row['prompts_sha256'][:12]}")
    elif row.get("prompts_sha256"):
        parts.append(f"{set_of(row['prompts_sha256'], row['n_images'])} noise, without prompts")
    if row.get("features"):
        parts.append(f"{row['features']} features")
    if row.get("denoiser_calls"):
        parts.append(f"{row['denoiser_calls']} denoiser calls an image")
    return f"{'; '.join(parts)}." if parts else ""


def _reading(rows: Sequence[Row]) -> str:
    same = "prompts" if prompted(rows[0]) else "noise"
    text = (
        "Small figures are intervals of 95 %. A verdict asks whether any of its differences to full "
        f"precision on the same {same} is surely not zero, all of them together at 95 %."
    )
    if any(row["recipe"] == FLOOR for row in rows):
        text += (
            " The shaded rows are full precision itself, on the noise that all rows share and on other "
            "noise: the floor, below which a distance says nothing."
        )
    if any((row.get("n_images") or 0) < FEWEST_FOR_FRECHET for row in rows):
        text += f" Fréchet distances are left out: under {FEWEST_FOR_FRECHET} images they mean little."
    return text


def _scenario(name: str, row: Row, plan: Plan, ranges: str | None) -> dict[str, Any]:
    sizes = plan.sizes
    text = (
        f"The denoiser takes {sizes.weight_mib:.2f} MiB instead of {sizes.original_mib:.2f} MiB at "
        f"{sizes.float_bits} bits ({sizes.ratio:.3g} times smaller): {sizes.packed / MIB:.2f} MiB of packed "
        f"codes, {sizes.parameters / MIB:.2f} MiB of scales and zero points, and "
        f"{sizes.left_float / MIB:.2f} MiB left in float."
    )
    if plan.bit_operations is not None:
        text += f" A call takes {plan.bit_operations.ratio:.3g} times fewer bit operations."
    text += f" {plan.calls} calls; {plan.execution} execution."
    return {
        "name": name,
        "brief": f"{row['scenario']}, {len(plan.quantized)} sites quantized, {len(plan.left_float)} in float",
        "sizes": text,
        "counts": plan.counts(),
        "left_float": plan.float_list(),
        "ranges": uri(ranges.encode(), "image/svg+xml") if ranges else None,
    }


def _every(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures of one model and tier; distances of two of them do not compare and share no table."""

    def visible(row: Row, name: str) -> bool:
        return shown(row, name)

    names = [name for name in NAMES if any(visible(row, name) for row in rows)]
    return {
        "title": f"{rows[0]['model']}, tier {rows[0]['tier']}",
        "names": names,
        "rows": [[_plain(row[name]) if visible(row, name) else "" for name in names] for row in rows],
    }


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _environment(rows: Sequence[Row], evidence: Mapping[str, Evidence]) -> list[dict[str, Any]]:
    """Facts on which all rows that have them agree, once; then what each row has of its own."""
    said: dict[str, set[str]] = {}
    for found in evidence.values():
        for name, value in found.facts:
            said.setdefault(name, set()).add(value)
    shared = {
        name: next(iter(values))
        for name, values in said.items()
        if len(values) == 1 and name not in OWN_FACTS
    }
    entries = [{"title": "all rows", "facts": list(shared.items())}] if shared else []
    for group in groups(rows):
        for row in group:
            found = evidence.get(source_of(row), Evidence())
            own = [fact for fact in found.facts if fact[0] not in shared]
            if own and row["recipe"] != FLOOR:
                entries.append({"title": f"{name_of(row, group)}, tier {row['tier']}", "facts": own})
    return entries


def _reproduce(rows: Sequence[Row], evidence: Mapping[str, Evidence]) -> list[dict[str, str]]:
    steps = [("All of it, in a checkout of the code commit above:", "make setup\nhalftone run")]
    commands = [found.command for found in evidence.values() if found.command]
    if commands:
        file = f"; {PROMPTS} is the file of calibration prompts with the hash above"
        what = f"An artefact alone{file if any(PROMPTS in command for command in commands) else ''}:"
        steps.append((what, "\n".join(commands)))
    scenarios = dict.fromkeys(source_of(row) for row in rows if not _full_precision(row))
    if scenarios:
        checks = [f"halftone verify results/export/{scenario}" for scenario in scenarios]
        steps.append(("Whether an artefact is whole, and the one that was measured:", "\n".join(checks)))
    return [{"what": what, "commands": lines} for what, lines in steps]
