"""A blind comparison of two rows: what the page holds, and what the choices amount to."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from halftone.cli import main
from halftone.errors import UserError
from halftone.plan import Execution
from halftone.preference import draw, evaluate, page, wilson
from halftone.prompts import prompts_sha256
from halftone.shards import SeedSet, Shard, ShardIndex, write_shard

PROMPTS = [f"prompt <{k}>" for k in range(12)]


def shard(level: int, **changes: Any) -> Shard:
    """Images whose red says which row they are of, and whose green says which prompt."""
    index = ShardIndex(
        shard=0,
        n_shards=1,
        first=0,
        count=12,
        n_images=12,
        seeds={SeedSet.A: 1},
        height=4,
        width=4,
        model="models/tiny",
        model_sha256="0" * 64,
        artefact_sha256=f"{level:064d}",
        execution=Execution.SIMULATED,
        recipe=f"recipe-{level}",
        bits="w4a8",
        prompts_sha256=prompts_sha256(PROMPTS),
        steps=4,
        guidance=6.0,
        lanes=8,
        scheduler="PNDMScheduler",
        halftone="0",
        torch="0",
        diffusers="0",
    ).model_copy(update=changes)
    images = [np.full((4, 4, 3), (level, k, 0), np.uint8) for k in range(12)]
    return Shard(index, {SeedSet.A: images})


def shown(path: Path) -> list[dict[str, Any]]:
    match = re.search(r"const pairs = (\[.*?\]);\n", path.read_text(), re.DOTALL)
    assert match is not None
    found: list[dict[str, Any]] = json.loads(match[1])
    return found


def colour(source: str) -> tuple[int, int, int]:
    kind, _, content = source.partition(",")
    assert kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    red, green, blue = np.asarray(image)[0, 0].tolist()
    return red, green, blue


def answers(path: Path, output: Path, wanted: int) -> None:
    """What a person hands in who always prefers the row with this red."""
    study = re.search(r'study: "(\w+)", seed: (\d+)', path.read_text())
    assert study is not None
    pairs = shown(path)
    choices = {p["id"]: "left" if colour(p["left"])[0] == wanted else "right" for p in pairs}
    found = {"study": study[1], "seed": int(study[2]), "pairs": [p["id"] for p in pairs], "choices": choices}
    output.write_text(json.dumps(found))


def test_pairs_share_a_prompt_and_the_page_names_no_row(tmp_path: Path) -> None:
    assert page(shard(10), shard(20), tmp_path / "page.html", prompts=PROMPTS, pairs=8) == 8
    text = (tmp_path / "page.html").read_text()
    assert "recipe-" not in text
    assert "w4a8" not in text
    assert "http" not in text
    lefts = 0
    for pair in shown(tmp_path / "page.html"):
        left, right = colour(pair["left"]), colour(pair["right"])
        assert left[1] == right[1] == pair["id"]
        assert {left[0], right[0]} == {10, 20}
        assert pair["prompt"] == PROMPTS[pair["id"]]
        lefts += left[0] == 10
    assert lefts == 4


def test_order_and_sides_come_from_the_seed() -> None:
    assert draw(range(9), 3) == draw(list(reversed(range(9))), 3)
    assert draw(range(9), 3) != draw(range(9), 4)
    assert sum(pair.first_is_left for pair in draw(range(9), 3)) == 5


@pytest.mark.parametrize(("wanted", "share"), [(10, 1.0), (20, 0.0)])
def test_choices_are_read_back_whatever_the_side(wanted: int, share: float, tmp_path: Path) -> None:
    page(shard(10), shard(20), tmp_path / "page.html", pairs=12, seed=5)
    answers(tmp_path / "page.html", tmp_path / "choices.json", wanted)
    found = evaluate([tmp_path / "choices.json"])
    assert (found.value, found.first + found.second) == (share, 12)
    assert "a preference is shown" in str(found)
    both = evaluate([tmp_path / "choices.json"] * 2)
    assert both.first + both.second == 24


def test_no_difference_counts_for_neither(tmp_path: Path) -> None:
    page(shard(10), shard(20), tmp_path / "page.html", pairs=4)
    answers(tmp_path / "page.html", tmp_path / "choices.json", 10)
    found = json.loads((tmp_path / "choices.json").read_text())
    found["choices"] = dict.fromkeys(found["choices"], "neither")
    (tmp_path / "choices.json").write_text(json.dumps(found))
    said = evaluate([tmp_path / "choices.json"])
    assert (said.neither, said.value, said.lo, said.hi) == (4, 0.5, 0.0, 1.0)
    assert "no preference is shown" in str(said)


@pytest.mark.parametrize(
    ("successes", "count", "interval"),
    [(5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0)), (0, 10, (0.0, 0.2775)), (0, 0, (0.0, 1.0))],
)
def test_wilsons_interval(successes: int, count: int, interval: tuple[float, float]) -> None:
    assert wilson(successes, count) == pytest.approx(interval, abs=1e-4)


def test_rows_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    for changes, what in (
        ({"prompts_sha256": "2" * 64}, "prompts"),
        ({"seeds": {SeedSet.A: 2}}, "noise"),
        ({"width": 5}, "size"),
    ):
        with pytest.raises(UserError, match=f"differ in {what}"):
            page(shard(10), shard(20, **changes), tmp_path / "page.html")
    with pytest.raises(UserError, match="not those that the images were drawn for"):
        page(shard(10), shard(20), tmp_path / "page.html", prompts=["other"])


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for level, name in ((10, "a.zip"), (20, "b.zip")):
        found = shard(level)
        images = ((SeedSet.A, k, image) for k, image in enumerate(found.images[SeedSet.A]))
        write_shard(tmp_path / name, found.index, images)
    files = [str(tmp_path / "a.zip"), str(tmp_path / "b.zip")]
    assert main(["preference", *files, "-o", str(tmp_path / "page.html"), "--pairs", "6"]) == 0
    answers(tmp_path / "page.html", tmp_path / "choices.json", 10)
    assert main(["preference", "--read", str(tmp_path / "choices.json")]) == 0
    assert "preferred in 6 of 6 pairs: 100%" in capsys.readouterr().out
    (tmp_path / "choices.json").write_text("{}")
    assert main(["preference", "--read", str(tmp_path / "choices.json")]) == 2
    assert main(["preference", files[0]]) == 2
    assert main(["preference", *files, "-o", "x.html", "--read", files[0]]) == 2
