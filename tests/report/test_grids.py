"""Grids: images untouched but for their size, captions that stay in their place."""

from __future__ import annotations

import numpy as np
import pytest

from halftone.report.grids import CELL, _lines, grid, png, spread, stack

WHITE = (255, 255, 255)


def cell(sheet, row: int, column: int, rows: int) -> np.ndarray:
    pixels = np.asarray(sheet)
    top = sheet.height - rows * (CELL + 10) + row * (CELL + 10)
    left = 300 + column * (CELL + 10)
    return pixels[top : top + CELL, left : left + CELL]


def test_images_are_enlarged_pixel_by_pixel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sheet = grid(["a", "b"], ["x", "y"], [[image, None], [None, 255 - image]])
    assert np.array_equal(cell(sheet, 0, 0, 2)[1::3, 1::3], image)
    assert np.array_equal(cell(sheet, 1, 1, 2)[::3, ::3], 255 - image)
    assert len(np.unique(cell(sheet, 0, 1, 2).reshape(-1, 3), axis=0)) == 1


def test_large_images_are_made_smaller() -> None:
    sheet = grid(["a"], ["x"], [[np.full((512, 512, 3), 7, np.uint8)]])
    assert (cell(sheet, 0, 0, 1) == 7).all()


@pytest.mark.parametrize("caption", ["word " * 400, "x" * 4000, "", "日本 " * 50, "a b"])
def test_captions_never_reach_the_images(caption: str) -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    pixels = np.asarray(grid([caption], ["x"], [[black]]))
    assert (pixels[-(CELL + 10) :, 281:299] == 255).all()
    assert (pixels[-5:, :300] == 255).all()


def test_words_are_broken_and_dropped_with_an_ellipsis() -> None:
    lines = _lines("one two " + "x" * 30, 100, 18, 3)
    assert lines[0] == "one two"
    assert lines[1].strip("x") == ""
    assert lines[2].endswith("…")
    assert _lines("one two", 500, 18, 3) == ["one two"]
    assert _lines("LPIPS\u00a00.594", 60, 18, 9) != ["LPIPS", "0.594"]


def test_the_same_bytes_again() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    first, second = (png(stack([grid(["a"], ["x"], [[image]])] * 2)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("n", "count"), [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 10)])
def test_prompts_are_chosen_by_place(n: int, count: int) -> None:
    places = spread(n, count)
    assert len(places) == min(n, count)
    assert places == sorted(set(places))
    if n > 1:
        assert (places[0], places[-1]) == (0, n - 1)
