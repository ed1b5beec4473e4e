"""Grids of images with their prompts drawn beside them, as one PNG that any viewer shows."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]

CELL = 192  # pixels an image is shown at: 64 x 64 images three times as large, pixel by pixel
_CAPTION, _GAP, _LINE, _TEXT, _HEADING = 300, 10, 24, 18, 17
_INK, _MUTED, _PAPER, _HOLE = (27, 31, 36), (91, 100, 112), (255, 255, 255), (238, 240, 243)


def grid(
    captions: Sequence[str], headings: Sequence[str], images: Sequence[Sequence[Pixels | None]]
) -> Image.Image:
    """An image with one row per caption and one column per heading.

    images: [rows][columns] of uint8 (height, width, 3); None leaves a hole. Captions are broken over lines
    and cut with an ellipsis where they would leave their row; headings likewise, over their column.
    """
    width = _CAPTION + len(headings) * (CELL + _GAP) + _GAP
    heads = [_lines(text, CELL, _HEADING, 3, bold=True) for text in headings]
    top = max((len(lines) for lines in heads), default=0) * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (width, top + len(captions) * (CELL + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads):
        left = _CAPTION + column * (CELL + _GAP)
        for k, line in enumerate(lines):  # headings stand on the images
            y = top - _GAP - (len(lines) - k) * _LINE
            draw.text((left, y), line, _INK, _font(_HEADING, bold=True))
    for row, caption in enumerate(captions):
        y = top + row * (CELL + _GAP)
        lines = _lines(caption, _CAPTION - 3 * _GAP, _TEXT, CELL // _LINE)
        start = y + (CELL - len(lines) * _LINE) // 2
        for k, line in enumerate(lines):
            draw.text((_GAP, start + k * _LINE), line, _MUTED, _font(_TEXT))
        for column in range(len(headings)):
            left = _CAPTION + column * (CELL + _GAP)
            pixels = images[row][column]
            if pixels is None:
                draw.rectangle((left, y, left + CELL - 1, y + CELL - 1), _HOLE)
            else:
                sheet.paste(_cell(pixels), (left, y))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Grids one below the other."""
    width = max(sheet.width for sheet in sheets)
    whole = Image.new("RGB", (width, sum(s.height for s in sheets) + 2 * _GAP * (len(sheets) - 1)), _PAPER)
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height + 2 * _GAP
    return whole


def png(sheet: Image.Image) -> bytes:
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def spread(n: int, count: int) -> list[int]:
    """`count` of n places, evenly spaced from first to last: chosen by place, never by how they look."""
    return sorted({round(place) for place in np.linspace(0, n - 1, min(count, n))}) if n else []


def _cell(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    largest = max(image.size)
    if largest <= CELL:
        factor = CELL // largest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        size = tuple(max(1, round(side * CELL / largest)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    return image


def _lines(text: str, width: int, size: int, most: int, *, bold: bool = False) -> list[str]:
    """The text in at most `most` lines of at most `width` pixels, an ellipsis where something is left out."""
    font = _font(size, bold)
    longest = 2 * width // size * most  # letters, far more than fit: a prompt may be a page long
    words = text[:longest].split(" ")  # at blanks only: a no-break space holds its line together
    lines = [""]
    for word in filter(None, words):
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = lines[-1] or word
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:  # broken where the line ends
            whole = lines[-1]
            fits = bisect_right(range(1, len(whole)), width, key=lambda k: font.getlength(whole[:k]))
            lines[-1:] = [whole[: max(fits, 1)], whole[max(fits, 1) :]]
    if len(lines) > most or len(text) > longest:
        last = lines[:most][-1]
        while last and font.getlength(last + " …") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + " …"]
    return [line for line in lines if line]


@cache
def _font(size: int, bold: bool = False) -> Any:
    import matplotlib

    # the font that matplotlib carries: the same glyphs on every machine
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
