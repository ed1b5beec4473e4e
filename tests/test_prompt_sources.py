"""Prompts of others: only from the bytes that were promised, and the same ones every time."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from halftone.cli import main
from halftone.errors import UserError
from halftone.prompt_sources import fetch
from halftone.prompts import read_prompts
from halftone.settings import PromptFormat, PromptSource

LINES = "a red star\n\na blue ring\n a  red\tstar \na\x07bell\na green square\n"


def source(path: Path, **settings: Any) -> PromptSource:
    pinned = {"url": path.as_uri(), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "count": 3}
    return PromptSource(**{**pinned, **settings})


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text(LINES)
    return path


def test_lines_are_cleaned_drawn_and_readable(lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "fetched/p.txt"
    assert fetch(source(lines), output, tmp_path / "cache") == 3
    assert sorted(read_prompts(output)) == ["a blue ring", "a green square", "a red star"]
    first = output.read_bytes()
    lines.unlink()  # the checked file was kept
    kept = PromptSource(url=lines.as_uri(), sha256=hashlib.sha256(LINES.encode()).hexdigest(), count=3)
    fetch(kept, output, tmp_path / "cache")
    assert output.read_bytes() == first


def test_the_seed_decides_which(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(100)))

    def drawn(seed: int) -> list[str]:
        fetch(source(path, seed=seed, count=10), tmp_path / "p.txt", tmp_path / "cache")
        return read_prompts(tmp_path / "p.txt")

    assert drawn(0) == drawn(0) != drawn(1)


def test_one_caption_of_an_image(tmp_path: Path) -> None:
    captions = [(3, 1, "third of one"), (1, 1, "first of one"), (2, 2, "of two"), (4, 3, "of three")]
    content = {"annotations": [{"id": i, "image_id": of, "caption": text} for i, of, text in captions]}
    path = tmp_path / "captions.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("annotations/val.json", json.dumps(content))
    coco = source(path, format=PromptFormat.COCO, member="annotations/val.json")
    assert fetch(coco, tmp_path / "p.txt", tmp_path / "cache") == 3
    assert sorted(read_prompts(tmp_path / "p.txt")) == ["first of one", "of three", "of two"]
    absent = coco.model_copy(update={"member": "other.json"})
    with pytest.raises(UserError, match=r"other\.json: cannot be read as coco"):
        fetch(absent, tmp_path / "p.txt", tmp_path / "cache")


def test_a_column_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"Prompt": ["one", "two"], "other": ["x", "y"]}), path)
    fetch(source(path, format=PromptFormat.PARQUET, count=2), tmp_path / "p.txt", tmp_path / "cache")
    assert sorted(read_prompts(tmp_path / "p.txt")) == ["one", "two"]


@pytest.fixture
def server(lines: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(lines.parent))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_over_the_network(server: str, lines: Path, tmp_path: Path) -> None:
    fetch(source(lines, url=f"{server}/lines.txt"), tmp_path / "p.txt", tmp_path / "cache")
    assert len(read_prompts(tmp_path / "p.txt")) == 3
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch(source(lines, url=f"{server}/none", sha256="0" * 64), tmp_path / "q.txt", tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "the file has changed"),
        (
            {"sha256": None},
            "sha256 is missing; what was fetched has sha256 " + hashlib.sha256(LINES.encode()).hexdigest(),
        ),
        ({"count": 4}, "holds 3 prompts, 4 were asked for"),
        ({"url": "ftp://x/y"}, "must start with one of"),
        ({"url": "hub:nowhere", "sha256": None}, "write hub:OWNER/DATASET@COMMIT/FILE"),
        ({"format": PromptFormat.COCO}, "cannot be read as coco"),
        ({"format": PromptFormat.PARQUET}, "cannot be read as parquet"),
        ({"member": "x"}, "cannot be read as lines"),
    ],
)
def test_anything_else_is_refused_and_leaves_nothing(
    lines: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        fetch(source(lines, **changes), tmp_path / "p.txt", tmp_path / "cache")
    assert not (tmp_path / "p.txt").exists()


def test_by_hand(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fetch-prompts", lines.as_uri(), "-o", str(tmp_path / "p.txt"), "--cache", str(tmp_path / "c")]
    assert main([*words, "--count", "2"]) == 2
    pin = hashlib.sha256(LINES.encode()).hexdigest()
    assert pin in capsys.readouterr().err
    assert main([*words, "--count", "2", "--sha256", pin]) == 0
    assert "2 of 3 prompts" in capsys.readouterr().out
    assert main([*words, "--sha256", "short"]) == 2
