"""The outlier analysis: an outlier that was put in is found where it is, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halftone.outlier_plots import MOST_ROWS, Row, map_svg
from halftone.outliers import DATA, MAP, WORST, Outliers, find
from halftone.proxy.watch import ActivationWatch
from halftone.report.outliers import outliers_of
from halftone.report.page import render
from halftone.source import load_source
from halftone.steps.record import record

LOUD = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.input"
CALLS = 4


@pytest.fixture(scope="module")
def found(tiny_model_folder: Path) -> tuple[Outliers, dict[str, ActivationWatch]]:
    source = load_source(tiny_model_folder)
    norm: Any = source.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].norm1
    with torch.no_grad():
        norm.weight[5] *= 60
    prompts = ["a red star", "a blue ring", "a green cross"]
    trajectory, known = record(source, prompts, steps=3, guidance=4.0, resolution=16)
    made, watches = find(source, trajectory, known, name="tiny", batch_size=2)
    return made, dict(watches)


def test_the_channel_that_was_made_loud_leads_at_every_call(found: tuple[Outliers, Any]) -> None:
    site = next(site for site in found[0].sites if site.site == LOUD)
    assert site.wins is site.channels
    assert site.channel_calls == CALLS
    assert (site.channels.indices, site.positions.indices) == (64, 16)
    assert (site.channels.leaders[0].index, site.channels.leaders[0].calls) == (5, 1.0)
    assert site.contrast > 20
    assert len(site.channels.spread) == len(site.channels.contrast) == len(site.peak) == CALLS


def test_it_stands_first_among_the_worst_each_tensor_once(found: tuple[Outliers, Any]) -> None:
    worst = [site.site for site in found[0].worst()]
    assert worst[0] in {LOUD.replace("to_q", f"to_{k}") for k in "qkv"}
    assert sum("mid_block.attentions.0.transformer_blocks.0.attn1.to_" in name for name in worst) == 1
    assert "time_embedding.linear_1.input" in found[0].left_out


def test_files_are_the_same_bytes_and_tell_it_in_words(found: tuple[Outliers, Any], tmp_path: Path) -> None:
    made, watches = found
    for name in ("a", "b"):
        assert made.save(tmp_path / name, watches) == [tmp_path / name / file for file in (DATA, MAP, WORST)]
    for file in (DATA, MAP, WORST):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    said = json.loads((tmp_path / "a" / DATA).read_text())
    assert said["says"] == made.say()
    assert any("channels 5" in line for line in said["says"])
    assert said["made_for"]["model_sha256"]
    assert "leads in half of the calls" in (tmp_path / "a" / WORST).read_text()
    drawn = (tmp_path / "a" / MAP).read_text()
    assert "mid · attentions.0.0.attn1.to_q +2" in drawn, "layers that read one tensor share a line"


def test_a_large_model_shows_the_layers_that_matter() -> None:
    rows = [Row(f"down_blocks.0.l{k}.input", (1.0, k), (1.0, 1.0), (1.0, k / 10)) for k in range(1, 201)]
    drawn = map_svg(rows, "large")
    assert drawn.count("down 0 · l") == MOST_ROWS
    assert "down 0 · l200" in drawn
    assert "down 0 · l80<" not in drawn


def test_the_page_shows_models_that_were_looked_at(found: tuple[Outliers, Any], tmp_path: Path) -> None:
    made, watches = found
    rows = [
        {"model": model, "recipe": "fp", "scenario": f"{model}_fp_demo", "tier": "demo"}
        for model in ("a", "b")
    ]
    made.save(tmp_path / "outliers" / "b", watches)
    plots = outliers_of(rows, tmp_path)
    assert [one.model for one in plots] == ["b"]
    for row in rows:
        row |= {"execution": "float", "protocol": "equal", "n_images": 4}
    page = render(rows, {}, plots)
    assert 'id="outliers"' in page
    assert made.say()[0] in page
    assert 'id="outliers"' not in render(rows, {})
