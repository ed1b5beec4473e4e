"""`analyze`: the same bytes again, statistics by hand, and a calibration that does not fit its model."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from diffusers import StableDiffusionPipeline

from halftone import provenance
from halftone.analysis import PLAN, RANGES, STATISTICS, analyze, resolve
from halftone.axes import Axes
from halftone.denoiser import SiteKind, sites
from halftone.errors import UserError
from halftone.passes.state import CalibrationState, SiteParameters
from halftone.passes.weights import quantize_weights
from halftone.plan import Plan
from halftone.policies import TimeAxis
from halftone.quantizers.bits import Bits
from halftone.report.plots import SiteRange, ranges_svg, short
from halftone.settings import Protocol
from halftone.skeleton import read_skeleton, skeleton_of

CALLS = 6
DRIFTING = "down_blocks.0.resnets.0.conv1.input"
Made = tuple[Path, CalibrationState, provenance.Provenance]


@pytest.fixture(scope="module")
def made(
    tiny_pipeline: StableDiffusionPipeline, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """A calibration as `halftone calibrate` leaves it, with ranges of our choice: one site grows fourfold."""
    unet = tiny_pipeline.unet
    found = sites(unet)
    weights = quantize_weights(unet, found, Axes(), Bits(4, 8, 8))
    activations = {}
    for site in found:
        if site.quantized and site.kind is not SiteKind.WEIGHT:
            hi = torch.linspace(1, 4, CALLS) if site.name == DRIFTING else torch.full((CALLS,), 1.5)
            one = torch.ones(CALLS)
            activations[site.name] = SiteParameters(one, one * 0, torch.zeros(CALLS), hi)
    state = CalibrationState(
        weights, activations, torch.linspace(961, 1, CALLS), torch.linspace(10, 0.1, CALLS)
    )
    known = provenance.describe(
        tiny_pipeline,
        model_path=str(tiny_model_folder),
        model_revision=None,
        model_sha256="0" * 64,
        prompts=["a red ring"],
        steps=5,
        guidance=6.0,
        resolution=16,
        seed=0,
    )
    axes = Axes(time_axis=TimeAxis.PER_CALL)
    chosen = {"recipe": "static", "bits": "w4a8", "axes": axes, "protocol": Protocol.EQUAL}
    known = known.model_copy(update=chosen)
    path = tmp_path_factory.mktemp("calibrate") / "state.safetensors"
    state.save(path, known)
    return path, state, known


@pytest.fixture(scope="module")
def analyzed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analyze")
    analyze(made[0], folder, name="row")
    return folder


def test_the_same_bytes_again(made: Made, analyzed: Path, tmp_path: Path) -> None:
    analyze(made[0], tmp_path, name="row")
    for name in (PLAN, STATISTICS, RANGES):
        assert (tmp_path / name).read_bytes() == (analyzed / name).read_bytes(), name


def test_statistics_by_hand(made: Made, analyzed: Path) -> None:
    plan = Plan.load(analyzed / PLAN)
    found = json.loads((analyzed / STATISTICS).read_text())
    drift = {entry["site"]: entry["drift"] for entry in found["activations"]}
    assert drift.pop(DRIFTING) == 4
    assert set(drift.values()) == {1}
    assert found["median_drift"] == 1
    assert len(drift) + 1 + len(found["weights"]) == len(plan.quantized)
    assert (found["timesteps"][0], len(found["noise_levels"])) == (961, CALLS)
    scale = made[1].weights["down_blocks.0.resnets.0.conv1"].scale
    spread = next(
        e["spread"] for e in found["weights"] if e["site"] == "down_blocks.0.resnets.0.conv1.weight"
    )
    assert spread == pytest.approx(float(scale.max()) / float(scale.double().median()), rel=0.05)
    assert all(entry["spread"] >= 1 for entry in found["weights"])


def test_the_plan_is_the_one_made_from_the_pipeline(
    made: Made, analyzed: Path, tiny_pipeline: StableDiffusionPipeline
) -> None:
    plan = resolve(
        skeleton_of(tiny_pipeline, 16),
        recipe="static",
        axes=Axes(time_axis=TimeAxis.PER_CALL),
        bits=Bits.parse("w4a8"),
        protocol=Protocol.EQUAL,
        calls=CALLS,
    )
    assert plan == Plan.load(analyzed / PLAN)


def test_skeleton_of_a_folder(
    tiny_model_folder: Path, fresh_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    whole = read_skeleton(str(tiny_model_folder), None, 32)
    assert all(parameter.is_meta for parameter in whole.denoiser.parameters())
    assert whole.calls(25) == 26  # PNDM repeats one
    assert (whole.latent_size, whole.text_tokens, whole.float_bits) == (16, 32, 32)
    fresh_pipeline.unet.half().save_pretrained(tmp_path / "half")
    half = skeleton_of(fresh_pipeline)
    fresh_pipeline.unet.float()
    assert (half.float_bits, skeleton_of(fresh_pipeline).float_bits) == (16, 16)


def test_a_calibration_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    _, state, known = made
    activations = dict(state.activations)
    activations["nowhere.input"] = activations.pop(DRIFTING)
    odd = CalibrationState(state.weights, activations, state.timesteps, state.noise_levels)
    odd.save(tmp_path / "odd.safetensors", known)
    with pytest.raises(UserError, match=r"lacks activation site down_blocks\.0\.resnets\.0\.conv1\.input"):
        analyze(tmp_path / "odd.safetensors", tmp_path / "out")
    state.save(tmp_path / "early.safetensors", known.model_copy(update={"recipe": None}))
    with pytest.raises(UserError, match="its provenance has no recipe"):
        analyze(tmp_path / "early.safetensors", tmp_path / "out")
    state.save(tmp_path / "lost.safetensors", known.model_copy(update={"model_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone"):
        analyze(tmp_path / "lost.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_plot_names_the_sites_that_drift_most() -> None:
    ranges = [SiteRange(f"mid_block.resnets.{k}.conv1.input", (1.0, 1.0 + k), 1.0 + k) for k in range(12)]
    ranges.append(SiteRange("mid_block.resnets.99.conv1.input", (1.0, 12.0), 12.0))
    svg = ranges_svg(ranges, "row")
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert "mid · resnets.11.conv1.input and 1 alike ×12" in text
    assert "mid · resnets.4.conv1.input" in text
    assert "mid · resnets.3.conv1.input" not in text  # eight lines can be told apart, twelve cannot
    assert svg == ranges_svg(ranges, "row")
    assert "http://" not in svg.replace("http://www.w3.org", "")


def test_the_plot_takes_silent_sites_and_a_single_call() -> None:
    assert "row" in ranges_svg([SiteRange("conv_in.input", (0.0, 0.0), None)], "row")
    assert "conv" in ranges_svg([SiteRange("conv.input", (2.0,), None)], "row")


def test_short_names_stay_apart() -> None:
    assert (
        short("down_blocks.1.attentions.0.transformer_blocks.2.attn1.query")
        == "down 1 · attentions.0.2.attn1.query"
    )
    assert short("time_embedding.linear_1.input") == "time_embedding.linear_1.input"
