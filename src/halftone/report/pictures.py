"""The images on the page: the same prompts for every row, and the prompts where a row went most wrong."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from halftone.recipes import FULL_PRECISION
from halftone.report.evidence import GRID_ROWS, Evidence
from halftone.report.grids import Pixels, grid, png, spread
from halftone.report.summary import FLOOR, FULL_PRECISION_ROWS, Row, groups, source_of
from halftone.report.table import name_of, prompted

_SHOWN_AT = 0.72  # share of its pixels that a grid is shown at on the page; the rest is for sharp screens


def grids(rows: Sequence[Row], evidence: Mapping[str, Evidence]) -> list[Image.Image]:
    """The grid of every model and tier that has images, as on the page."""
    found = [_grid_sheet(group, evidence) for group in groups(rows)]
    return [sheet[0] for sheet in found if sheet is not None]


def uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _captions(evidence: Mapping[str, Evidence], scenarios: Sequence[str]) -> Mapping[int, str]:
    return next((evidence[s].prompts for s in scenarios if s in evidence and evidence[s].prompts), {})


def _caption(texts: Mapping[int, str], prompt: int) -> str:
    return texts.get(prompt, f"prompt {prompt}")


def _grid_sheet(
    rows: Sequence[Row], evidence: Mapping[str, Evidence]
) -> tuple[Image.Image, list[str], list[str]] | None:
    """The grid of one group with its captions and headings; None without full-precision images."""
    columns: list[tuple[str, Mapping[int, Pixels]]] = []
    for row in sorted(rows, key=lambda row: row["recipe"] == FLOOR):  # other noise stands last
        found = evidence.get(source_of(row), Evidence())
        images = found.others if row["recipe"] == FLOOR else found.images
        if images:
            columns.append((name_of(row, rows), images))
    if not columns:
        return None
    common = set.intersection(*(set(images) for _, images in columns))
    chosen = [prompt for prompt in spread(int(rows[0]["n_images"] or 0), GRID_ROWS) if prompt in common]
    if not chosen:
        return None
    texts = _captions(evidence, [source_of(row) for row in rows])
    captions = [_caption(texts, prompt) for prompt in chosen]
    headings = [heading for heading, _ in columns]
    sheet = grid(captions, headings, [[images[prompt] for _, images in columns] for prompt in chosen])
    return sheet, captions, headings


def grid_of(rows: Sequence[Row], evidence: Mapping[str, Evidence]) -> dict[str, Any] | None:
    made = _grid_sheet(rows, evidence)
    if made is None:
        return None
    sheet, captions, headings = made
    asked = "prompts" if prompted(rows[0]) else "images"
    note = f"{len(captions)} {asked}, evenly spaced from first to last, not picked."
    if any(row["recipe"] == FLOOR for row in rows):
        note += " The column of other noise shows how much full precision varies by itself."
    return {
        "uri": uri(png(sheet), "image/png"),
        "width": sheet.width,
        "height": sheet.height,
        "shown": round(sheet.width * _SHOWN_AT),
        "caption": note,
        "alt": f"images by {', '.join(headings)} (columns) for the {asked}: {'; '.join(captions)}",
    }


def worst_of(rows: Sequence[Row], evidence: Mapping[str, Evidence]) -> list[dict[str, Any]]:
    reference = next((row for row in rows if row["recipe"] == FULL_PRECISION), None)
    base = evidence.get(source_of(reference), Evidence()) if reference else Evidence()
    texts = _captions(evidence, [source_of(row) for row in rows])
    pairs = []
    asked = "prompts" if rows and prompted(rows[0]) else "images"
    for row in rows:
        found = evidence.get(source_of(row), Evidence())
        worst = [prompt for prompt in found.worst if prompt in found.images and prompt in base.images]
        if row["recipe"] in FULL_PRECISION_ROWS or not worst:
            continue
        name = name_of(row, rows)
        captions = [f"{_caption(texts, prompt)} (LPIPS\u00a0{found.lpips[prompt]:.3f})" for prompt in worst]
        images = [[base.images[prompt], found.images[prompt]] for prompt in worst]
        sheet = grid(captions, ["full precision", name], images)
        pairs.append(
            {
                "caption": name,
                "uri": uri(png(sheet), "image/png"),
                "width": sheet.width,
                "height": sheet.height,
                "alt": f"the {len(worst)} worst {asked} of {name}: {'; '.join(captions)}",
            }
        )
    return pairs
