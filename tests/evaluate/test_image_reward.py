"""ImageReward from another environment: a stand-in package in an environment that a test makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_scenario import PROMPTS, shard

from halftone.cli import main

# the reward of an image is its mean brightness, negative for prompts it does not know
PACKAGE = """
from PIL import Image
class Model:
    def score(self, prompt, image):
        pixels = list(Image.open(image).convert("L").getdata())
        return sum(pixels) / len(pixels)
def load(name):
    assert name == "ImageReward-v1.0"
    return Model()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "ImageReward.py").write_text(PACKAGE)
    import PIL

    (packages / "pillow.pth").write_text(str(Path(PIL.__file__).parents[1]) + "\n")
    return folder / "bin/python"


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "prompts.txt").write_text("".join(f"{p}\n" for p in [*PROMPTS, "one more"]))
    other = {"recipe": "static", "bits": "w4a8", "artefact_sha256": "2" * 64, "execution": "simulated"}
    return {
        "images": shard(tmp_path / "row.zip", **other),
        "reference": shard(tmp_path / "fp.zip"),
        "prompts": tmp_path / "prompts.txt",
    }


def judge(row: dict[str, Path], python: Path, output: Path, **more: Any) -> int:
    named = {**row, "python": python, "output": output, **more}
    return main(["image-reward", *(w for k, v in named.items() for w in (f"--{k}", str(v)))])


def test_rewards_of_a_row_and_of_full_precision(
    row: dict[str, Path], environment: Path, tmp_path: Path
) -> None:
    assert judge(row, environment, tmp_path / "r.json") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["n_images"], found["artefact_sha256"]) == (len(PROMPTS), "2" * 64)
    # the same renders: the same rewards, and nothing between them
    assert found["per_image"]["reward"] == found["per_image"]["reward_fp"]
    assert found["difference"] == {"value": 0, "lo": 0, "hi": 0}
    assert found["reward"]["lo"] < found["reward"]["value"] < found["reward"]["hi"]
    assert np.ptp(found["per_image"]["reward"]) > 1


def test_what_is_missing_is_said(
    row: dict[str, Path], environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "r.json"
    assert judge(row, Path(sys.executable), output) == 2
    assert "install image-reward" in capsys.readouterr().err
    assert judge(row, tmp_path / "nothing", output) == 2
    assert "cannot be run" in capsys.readouterr().err
    words = [w for k, v in row.items() for w in (f"--{k}", str(v))]
    assert main(["image-reward", *words, "-o", str(output)]) == 2
    assert "image_reward_python" in capsys.readouterr().err
    assert judge({**row, "reference": row["images"]}, environment, output) == 2
    assert not output.exists()
