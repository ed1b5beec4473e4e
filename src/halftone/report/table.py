"""The headline table of the page: which figures it shows, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from halftone.columns import COLUMNS, blank
from halftone.recipes import FULL_PRECISION
from halftone.report.summary import FLOOR, FULL_PRECISION_ROWS, Row, source_of
from halftone.unconditional import set_of

PERCENT = "\u00a0%"  # kept with its number
FEWEST_FOR_FRECHET = (
    500  # images; below, a Fréchet distance is mostly bias, and only the kernel distance is shown
)
_FRECHET = ("fid_to_fp", "fid_to_fp_unpaired", "fid_to_real", "inception_score")


@dataclass(frozen=True)
class Verdict:
    """A row against full precision. kind: `same`, `differs`, or empty where there is nothing to say; why:
    lines."""

    kind: str = ""
    title: str = ""
    why: Sequence[str] = ()


NO_VERDICT = Verdict()


@dataclass(frozen=True)
class Cell:
    label: str
    value: str = ""
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Head:
    label: str
    hint: str = ""


@dataclass(frozen=True)
class TableRow:
    name: str
    execution: str
    reference: bool
    cells: Sequence[Cell]
    verdict: Verdict


@dataclass(frozen=True)
class Table:
    heads: Sequence[Head]
    rows: Sequence[TableRow]


def percent(value: float) -> str:
    return f"{100 * value:.1f}{PERCENT}"


def _operations(value: float) -> str:
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class _Figure:
    name: str
    label: str
    write: Callable[[float], str] = field(default=lambda value: f"{value:.3g}")


_FIGURES = (
    _Figure("alignment", "alignment", percent),
    _Figure("clip_score", "CLIP score", lambda value: f"{value:.2f}"),
    _Figure("lpips", "LPIPS", lambda value: f"{value:.3f}"),
    _Figure("psnr", "PSNR, dB", lambda value: f"{value:.1f}"),
    _Figure("alignment_flips", "alignment changed", percent),
    _Figure("latent_error", "error of the final latents", percent),
    _Figure("fid_to_fp", "FID to full precision, same noise", lambda value: f"{value:.3g}"),
    _Figure("fid_to_fp_unpaired", "FID to full precision, other noise", lambda value: f"{value:.3g}"),
    _Figure("kid_to_fp", "KID to full precision", lambda value: f"{value:.3g}"),
    _Figure("fid_to_real", "FID to real images", lambda value: f"{value:.3g}"),
    _Figure("weight_mib", "weights, MiB", lambda value: f"{value:.2f}"),
    _Figure("bops", "bit operations of a call", _operations),
)
_PAIRED = ("lpips", "psnr", "fid_to_fp", "kid_to_fp")  # of full precision to itself: nothing, by definition
_RATIOS = {"weight_mib": "{:.3g} times smaller", "bops": "{:.3g} times fewer"}


def name_of(row: Row, among: Sequence[Row]) -> str:
    """`static w4a8`, or what the two full-precision rows are; where rows would share it, with what their ids
    do not.

    among: the rows that the name has to tell apart.
    """
    name = _name(row)
    ids = {str(other["scenario"]) for other in among if _name(other) == name} | {str(row["scenario"])}
    return name if len(ids) == 1 else f"{name} ({_own_part(str(row['scenario']), ids)})"


def _own_part(scenario: str, ids: Iterable[str]) -> str:
    """What is left of an id, in words between underscores, without those that all ids begin or end with."""
    parts = [name.split("_") for name in ids]
    common = [0, 0]
    for side, ordered in enumerate((parts, [words[::-1] for words in parts])):
        for column in zip(*ordered, strict=False):
            if len(set(column)) > 1:
                break
            common[side] += 1
    words = scenario.split("_")
    return "_".join(words[common[0] : len(words) - common[1]]) or scenario


def _name(row: Row) -> str:
    if row["recipe"] == FULL_PRECISION:
        return "full precision"
    if row["recipe"] == FLOOR:
        return "full precision, other noise"
    widths = [("w", row.get("weight_bits")), ("a", row.get("act_bits"))]
    if row.get("softmax_bits") != row.get("act_bits"):
        widths.append(("s", row.get("softmax_bits")))
    widths.append(("b", row.get("boundary_bits")))
    bits = "".join(f"{letter}{width}" for letter, width in widths if not blank(width))
    protocol = ", sites of its paper" if row.get("protocol") == "paper" else ""
    return f"{row['recipe']} {bits}{protocol}".strip()


def prompted(row: Row) -> bool:
    """Whether a row's images were asked for by prompts: not those of a model without text."""
    return set_of(row.get("prompts_sha256"), int(row.get("n_images") or 0)) is None


def shown(row: Row, name: str) -> bool:
    """Whether a figure of a row may be shown at all: there, and not a Fréchet distance of too few images."""
    if blank(row.get(name)):
        return False
    few = not blank(row.get("n_images")) and row["n_images"] < FEWEST_FOR_FRECHET
    return not (few and any(name.startswith(figure) for figure in _FRECHET))


def table(rows: Sequence[Row], verdicts: Mapping[str, Verdict]) -> Table:
    """The rows of one model and tier. `verdicts` by scenario id; rows without one get none."""
    better = {column.name: column.better for column in COLUMNS}
    figures = [figure for figure in _FIGURES if any(shown(row, figure.name) for row in rows)]
    heads = [Head("row")]
    for figure in figures:
        heads.append(Head(figure.label, f"{better[figure.name]} is better" if better[figure.name] else ""))
    reference = next((row for row in rows if row["recipe"] == FULL_PRECISION), None)
    written = []
    for row in rows:
        is_reference = row["recipe"] in FULL_PRECISION_ROWS
        written.append(
            TableRow(
                name=name_of(row, rows),
                execution=f"{row['execution']} execution" if not is_reference else str(row["execution"]),
                reference=is_reference,
                cells=[_cell(row, figure, reference) for figure in figures],
                verdict=NO_VERDICT if is_reference else verdicts.get(source_of(row), NO_VERDICT),
            )
        )
    return Table(heads, written)


def _cell(row: Row, figure: _Figure, reference: Row | None) -> Cell:
    if not shown(row, figure.name) or (row["recipe"] == FULL_PRECISION and figure.name in _PAIRED):
        return Cell(figure.label)
    value = row[figure.name]
    low, high = row.get(f"{figure.name}_lo"), row.get(f"{figure.name}_hi")
    interval = ""
    if low is not None and high is not None:
        interval = _minus(f"{figure.write(low).removesuffix(PERCENT)} to {figure.write(high)}")
    note = ""
    if figure.name in _RATIOS and reference is not None and reference is not row:
        whole = reference.get(figure.name)
        if whole and value and whole / value > 1.005:
            note = _RATIOS[figure.name].format(whole / value)
    return Cell(figure.label, _minus(figure.write(value)), interval, note)


def _minus(text: str) -> str:
    return text.replace("-", "\u2212") if "e" not in text else text
