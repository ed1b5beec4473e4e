"""Rows of a model without text beside rows of one with: no job of theirs reads a prompt file or names one."""

from __future__ import annotations

import shutil
from pathlib import Path

from trees import copy_workflow, edit, snakemake, with_stub

MODEL = """\
  plain:
    {path: data/models/plain, steps: 50, resolution: 32, unconditional: true, real_images: scenes}
"""
ROWS = """\
  plain_fp_demo: {model: plain, recipe: fp, tier: demo}
  plain_static_w4a8_demo: {model: plain, recipe: static, bits: w4a8, tier: demo}
"""


def test_no_job_of_theirs_has_prompts(tmp_path: Path) -> None:
    tree = with_stub(copy_workflow(tmp_path / "tree"))
    shutil.copytree(tree / "data/models/scenes-t2i", tree / "data/models/plain")
    edit(tree, "\nprompts:\n", f"\n{MODEL}\nprompts:\n")
    (tree / "params.yaml").write_text((tree / "params.yaml").read_text() + ROWS)
    said = snakemake(tree, "--dry-run", "--printshellcmds")
    assert said.returncode == 0, said.stderr
    commands = [line for line in (said.stdout + said.stderr).splitlines() if "-m halftone " in line]
    asked = {
        verb: [line for line in commands if f"-m halftone {verb} " in line]
        for verb in ("calibration-data", "sample", "metrics")
    }
    for lines in asked.values():
        plain = [line for line in lines if "plain" in line]
        prompted = [line for line in lines if "plain" not in line]
        assert plain
        assert prompted
        assert not any("--prompts" in line or "--guidance" in line for line in plain)
        assert all("--prompts" in line for line in prompted)
    assert all("--image-set validation" in line for line in asked["sample"] if "plain" in line)
    assert all("--real-images scenes" in line for line in asked["metrics"] if "plain" in line)
