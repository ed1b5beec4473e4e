"""The whole card of a tiny model, through the command line, and what is told of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from halftone.cli import main
from halftone.proxy.card import Card

PROMPTS = ["a red star", "a blue ring", "a small green square"]
HOW = ["--steps", "3", "--guidance", "2", "--resolution", "16"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return path


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "tiny"
    words = ["proxy", str(tiny_model_folder), "--prompts", str(prompts), *HOW]
    assert main([*words, "-n", "3", "-o", str(folder)]) == 0
    return folder


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return found


def test_every_phenomenon_has_a_verdict_and_a_plot(folder: Path) -> None:
    card = read(folder)
    found = {finding["key"]: finding for finding in card["findings"]}
    assert list(found) == ["drift", "outliers", "start", "maximum", "halves", "powerlaw", "accumulation"]
    assert {finding["verdict"] for finding in found.values()} <= {"present", "absent"}
    assert sorted(p.name for p in folder.glob("*.svg")) == sorted(f"proxy-{key}.svg" for key in found)
    assert card["n_prompts"] == 3
    assert card["calls"] == 4
    assert len(found["halves"]["data"]["per_call"]) == 4  # two concatenations a level
    # an untrained model attends to everything alike
    assert found["start"]["tests"][0]["figure"] == pytest.approx(1 / 32, rel=0.1)
    assert found["start"]["verdict"] == "absent"


def test_errors_are_the_same_at_the_first_call_and_inherited_after_it(folder: Path) -> None:
    data = next(f for f in read(folder)["findings"] if f["key"] == "accumulation")["data"]
    assert data["latents"][0] == 0.0
    assert data["ratio"][0] == pytest.approx(1.0, abs=1e-3)
    assert all(0 < error < 0.2 for error in data["teacher_forced"])
    assert data["latents"][-1] > 0


def test_the_card_says_what_an_absent_phenomenon_means(folder: Path) -> None:
    text = (folder / "card.md").read_text()
    assert "| Attention to the start token | DGQ |" in text
    assert "DGQ: claim not testable on this model." in text
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (folder / name).is_file()


def test_a_recorded_trajectory_gives_the_same_card(
    folder: Path, tiny_model_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_model_folder), "--prompts", str(prompts)]
    data = tmp_path / "tiny.safetensors"
    assert main(["calibration-data", *words, *HOW, "--n-prompts", "3", "-o", str(data)]) == 0
    assert main(["proxy", *words, "--trajectory", str(data), "-o", str(tmp_path / "tiny")]) == 0
    for name in ("card.json", "card.md", "proxy-accumulation.svg"):
        assert (tmp_path / "tiny" / name).read_bytes() == (folder / name).read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{prompt}\n" for prompt in reversed(PROMPTS)))
    words[2] = str(other)
    capsys.readouterr()
    assert main(["proxy", *words, "--trajectory", str(data), "-o", str(tmp_path / "x")]) == 2
    assert "recorded with other prompts" in capsys.readouterr().err


def test_a_model_without_text_says_so(tiny_unconditional: UNet2DModel, prompts: Path, tmp_path: Path) -> None:
    DDPMPipeline(tiny_unconditional, DDPMScheduler()).save_pretrained(tmp_path / "model")
    words = ["proxy", str(tmp_path / "model"), "--steps", "2", "-n", "2", "-o", str(tmp_path / "card")]
    assert main([*words, "--prompts", str(prompts)]) == 2
    assert main(words) == 0
    found = {finding["key"]: finding for finding in read(tmp_path / "card")["findings"]}
    assert found["start"]["verdict"] == found["maximum"]["verdict"] == "not applicable"
    assert found["powerlaw"]["verdict"] != "not applicable"
    text = (tmp_path / "card" / "card.md").read_text()
    assert "## Attention to the start token: not applicable" in text
    assert "no cross-attention to a text" in text
    assert not (tmp_path / "card" / "proxy-start.svg").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone", "--prompts", "prompts.txt"], "gone: no such folder or file"),
        (["owner/name", "--prompts", "prompts.txt"], "add --revision"),
        (["model", "--prompts", "gone.txt"], "gone.txt: no such prompt file"),
        (["model", "--prompts", "empty.txt"], "holds no prompts"),
        (["model", "--prompts", "prompts.txt"], "holds 1 prompts, 16 were asked for"),
        (["model", "--prompts", "prompts.txt", "-n", "1", "--bits", "8"], "write them as w4a8"),
        (["model", "--prompts", "prompts.txt", "-n", "1", "--resolution", "12"], "a multiple of 8"),
        (
            ["model", "--prompts", "prompts.txt", "--trajectory", "gone"],
            "make it with `halftone calibration-data`",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["proxy", *words, "-o", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("halftone: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out").exists()


def test_zero_prompts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["proxy", str(tmp_path), "--prompts", "p.txt", "-n", "0", "-o", "out"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_figures_of_a_card_have_short_names(folder: Path) -> None:
    card = read(folder)
    for finding in card["findings"]:
        finding.pop("verdict")
    figures = Card.model_validate(card).figures()
    assert {"drift", "outliers", "outliers_2", "start", "accumulation"} <= figures.keys()
