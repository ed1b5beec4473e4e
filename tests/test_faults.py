"""Faults of the machine, made for real: a full disk, a folder that may not be written, a truncated file.

Each ends in one line, exit code 2, and no file that looks whole.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from halftone.scenes.grammar import Background, Colour, Scene, SceneObject, Shape, Size, Texture, caption

SOURCE = Path(__file__).parents[1] / "src"
AS_ROOT = os.geteuid() == 0
_OBJECT = SceneObject(Size.SMALL, Colour.RED, Shape.STAR)
_PROMPT = caption(Scene(_OBJECT, Background.GREY, Texture.PLAIN), 0)


def record(model: Path, output: Path, *, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`halftone calibration-data` in a process of its own."""
    prompts = model.parent / "prompts.txt"
    prompts.write_text(_PROMPT + "\n")
    options = ["--prompts", str(prompts), "--n-prompts", "1", "--steps", "2", "--resolution", "16"]
    return subprocess.run(
        [
            *before,
            sys.executable,
            "-m",
            "halftone",
            "calibration-data",
            str(model),
            *options,
            "-o",
            str(output),
        ],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def refused(run: subprocess.CompletedProcess[str], *words: str) -> None:
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("halftone: ")
    for word in words:
        assert word in last


@pytest.mark.skipif(not AS_ROOT, reason="only root may mount a small file system")
def test_a_full_disk_is_named_and_leaves_nothing(tiny_model_folder, tmp_path):
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)], check=True)
    try:
        run = record(tiny_model_folder, disk / "data.safetensors")
        refused(run, str(disk), "the disk is full")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_may_not_be_written_is_named(tiny_model_folder, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    before: tuple[str, ...] = ()
    if AS_ROOT:  # root ignores modes until it gives that up; then another's folder is another's
        os.chown(folder, 65534, 65534)
        before = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")
    folder.chmod(0o555)
    run = record(tiny_model_folder, folder / "data.safetensors", before=before)
    refused(run, str(folder), "permission denied")
    assert list(folder.iterdir()) == []


def test_a_truncated_weight_file_is_named(tiny_model_folder, tmp_path):
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", str(tiny_model_folder), str(model)], check=True)
    weights = next((model / "unet").glob("*.safetensors"))
    with weights.open("r+b") as stream:
        stream.truncate(weights.stat().st_size * 2 // 3)
    output = tmp_path / "data.safetensors"
    refused(record(model, output), "unet")
    assert not output.exists()
