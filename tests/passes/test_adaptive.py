"""Codes of attention probabilities chosen by layer and call (DAQ), from calibration to the artefact."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

import halftone
from halftone import artefact
from halftone.analysis import analyze
from halftone.artefact import tensors
from halftone.artefact.load import describe as described
from halftone.artefact.load import empty_denoiser
from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind
from halftone.errors import UserError
from halftone.passes.adaptive import Chooser
from halftone.passes.calibrate import calibrate
from halftone.passes.call_groups import group_of
from halftone.passes.state import CalibrationState
from halftone.plan import describe
from halftone.policies import Probabilities, Scope, TimeAxis
from halftone.probability_quantizer import Form, ProbabilityQuantizer
from halftone.recipes import resolve
from halftone.report.plots import SiteCodes, SiteRange, ranges_svg
from halftone.source import load_source
from halftone.trajectory import run_arguments
from quantized import GUIDANCE, RESOLUTION, STEPS, Calibrated, calibrated

ADAPTIVE: dict[str, Any] = {"probabilities": "adaptive"}


def axes(**further: Any) -> Axes:
    return Axes(time_axis=TimeAxis.PER_CALL, **ADAPTIVE, **further)


def chooser(bits: int = 4, **further: Any) -> Chooser:
    site = Site("attn1", SiteKind.PROBABILITIES, "Attention")
    form = Form(Probabilities.ADAPTIVE, Scope.SAMPLE)
    return Chooser(axes(**further), ProbabilityQuantizer(site, bits, 4, CallContext(), form, 2))


def probabilities(spread: float) -> Tensor:
    scores = torch.randn(4, 64, 77, generator=torch.Generator().manual_seed(0))
    return (scores * spread).softmax(-1)


@pytest.mark.parametrize(
    ("further", "spread", "log2"),
    [
        ({}, 1.0, False),
        ({}, 4.0, True),
        ({"adaptive_xmin": 0.5}, 2.0, True),
        ({"adaptive_alternative": "half_normal"}, 2.0, True),
        ({"adaptive_alternative": "lognormal"}, 4.0, False),
    ],
)
def test_heavy_tails_get_octaves(further: dict[str, Any], spread: float, log2: bool) -> None:
    found = chooser(**further)
    for _ in range(2):
        found.update(probabilities(spread), None, call=0)
    assert found.log2() is log2


def test_the_error_of_the_output_may_choose() -> None:
    """One large value makes even steps of 4 bits lose all others; those of 8 bits beat octaves."""
    attention = torch.rand(4, 64, 77, generator=torch.Generator().manual_seed(0)) * 0.02
    attention[:, 0, 5] = 0.9
    value = torch.randn(4, 77, 8, generator=torch.Generator().manual_seed(1))
    found = {}
    for bits in (4, 8):
        one = chooser(bits, adaptive_selector="output_error")
        one.update(attention, value, call=0)
        found[bits] = one.log2()
    assert found == {4: True, 8: False}
    rest = chooser(4, adaptive_selector="output_error")
    rest.update(attention[..., 1:], value, call=0)  # the values of the last tokens
    assert rest.log2()


def test_groups_of_calls() -> None:
    assert [group_of(call, 6, 2) for call in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [group_of(call, 5, 2) for call in range(5)] == [0, 0, 0, 1, 1]
    assert [group_of(call, 3, None) for call in range(3)] == [0, 1, 2]
    assert [group_of(call, 3, 9) for call in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"time_axis": "shared"}, "chosen call by call"),
        ({"adaptive_groups": 2, "calibration_inputs": "progressive"}, "adaptive_groups: progressive"),
        ({"probabilities": "log2", "adaptive_xmin": 0.5}, "adaptive_xmin: write probabilities: adaptive"),
        ({"adaptive_selector": "output_error", "adaptive_xmin": 0.5}, "adaptive_xmin: of laws"),
        ({"adaptive_groups": 0}, "adaptive_groups"),
    ],
)
def test_axes_that_make_no_sense(further: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        resolve("static", {**ADAPTIVE, **further})


def images(pipeline: Any) -> Any:
    how: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "resolution": RESOLUTION, "seed": 3}
    arguments = run_arguments(pipeline, [0, 1], ["a large red star", "a blue ring"], **how)
    with torch.inference_mode():
        return np.asarray(pipeline(**arguments, output_type="np").images)


def sharpened(pipeline: Any) -> Any:
    """A denoiser whose self-attention has heavy tails at half of its layers."""
    unet = copy.deepcopy(pipeline.unet)
    for name, module in unet.named_modules():
        if name.startswith("down") and name.endswith("attn1.to_q"):
            module.weight.data *= 12
    return unet


@pytest.fixture(scope="module")
def made(tiny_model_folder: Path, tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    state = tmp_path_factory.mktemp("adaptive") / "state.safetensors"
    return calibrated(tiny_model_folder, state, "w4a4", unet=sharpened(tiny_pipeline), **ADAPTIVE)


def test_choices_and_scales_of_every_call(made: Calibrated) -> None:
    state, _ = CalibrationState.load(made.state)
    seen = set()
    for name, quantizer in made.quantizers.items():
        found = state.activations[name]
        if not isinstance(quantizer, ProbabilityQuantizer):
            assert found.log2 is None
            continue
        assert found.log2 is not None
        assert quantizer.chosen == found.log2.tolist()
        steps = 2**quantizer.bits - 1
        torch.testing.assert_close(found.scale, torch.where(found.log2, found.hi, found.hi / steps))
        seen |= {(name.split(".")[0], name.split(".")[-2], chosen) for chosen in quantizer.chosen}
    assert {(part, kind) for part, kind, log2 in seen if log2} == {("down_blocks", "attn1")}
    assert ("down_blocks", "attn2", False) in seen


def test_an_artefact_keeps_every_choice(
    made: Calibrated, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of choices that differ from call to call; simulated and in integers alike."""
    state, known = CalibrationState.load(made.state)
    generator = torch.Generator().manual_seed(0)
    for name, parameters in state.activations.items():
        if parameters.log2 is not None:
            log2 = torch.randint(2, parameters.log2.shape, generator=generator).bool()
            state.activations[name] = parameters._replace(log2=log2)
    state.save(tmp_path / "state.safetensors", known)
    folder = tmp_path / "artefact"
    artefact.write(folder, tmp_path / "state.safetensors", made.plan, load_source(tiny_model_folder))
    loaded = halftone.load(folder)
    chosen = {m.site.name: m.chosen for m in loaded.unet.modules() if isinstance(m, ProbabilityQuantizer)}
    assert chosen == {n: p.log2.tolist() for n, p in state.activations.items() if p.log2 is not None}
    assert len({tuple(row) for row in chosen.values() if row}) > 3
    whole = images(loaded)
    assert np.array_equal(images(halftone.load(folder, execution="integer")), whole)
    assert not artefact.info(folder)["integer"]["fallbacks"]

    path = folder / "unet" / tensors.FILE
    bits = load_file(path)[tensors.CHOICES]
    assert bits.numel() == -(-len(chosen) * (STEPS + 1) // 8)
    plan, denoiser = made.plan, empty_denoiser(described(folder))
    for damaged in (bits[:-1], bits.int(), bits + 0 * bits + (bits.new_tensor(128) * (bits == bits[-1]))):
        save_file({**load_file(path), tensors.CHOICES: damaged}, tmp_path / "damaged.safetensors")
        with pytest.raises(UserError, match=tensors.CHOICES):
            tensors.load(tmp_path / "damaged.safetensors", plan, denoiser)
    save_file({k: v for k, v in load_file(path).items() if k != tensors.CHOICES}, tmp_path / "less")
    with pytest.raises(UserError, match=tensors.CHOICES):
        tensors.load(tmp_path / "less", plan, denoiser)


def test_analysis_shows_the_choices(
    made: Calibrated, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, known = CalibrationState.load(made.state)
    state.save(tmp_path / "state", known.model_copy(update={"model_path": str(tiny_model_folder)}))
    plan = analyze(tmp_path / "state", tmp_path / "analysis")
    said = {describe(site) for site in plan.quantized if site.kind == "probabilities"}
    assert said == {"4-bit affine or log2, per tensor, per call"}
    found = json.loads((tmp_path / "analysis" / "statistics.json").read_text())["activations"]
    calls = {entry["site"]: entry["log2_calls"] for entry in found if "log2_calls" in entry}
    log2 = {n: p.log2 for n, p in state.activations.items() if p.log2 is not None}
    assert calls == {name: row.nonzero().flatten().tolist() for name, row in log2.items()}
    share = torch.stack(list(log2.values())).float().mean()
    assert f"log2 codes (blue) at {share:.0%}" in (tmp_path / "analysis" / "ranges.svg").read_text()
    plain = [SiteRange("a.probabilities", (1.0, 2.0), 2.0)]
    assert "log2" not in ranges_svg(plain, "static")
    both = ranges_svg(plain, "static", [SiteCodes("a.probabilities", (True, False))])
    assert "log2" in both
    assert both.count("pure noise") == 1  # above another panel the label would meet its title


GROUPED = {"adaptive_groups": 2, "probabilities_scale": "dynamic", "start_token": "apart"}


@pytest.mark.parametrize("further", [GROUPED, {"adaptive_selector": "output_error", "adaptive_groups": 1}])
def test_an_interrupted_calibration_goes_on_with_the_same_choices(
    further: dict[str, Any], fresh_pipeline: Any, tmp_path: Path
) -> None:
    from halftone.denoiser import sites
    from halftone.layers import wrap
    from halftone.quantizers.bits import Bits
    from halftone.trajectory import record

    prompts = ["a large red star", "a blue ring", "a small green cross"]
    how: dict[str, Any] = {"steps": 3, "guidance": 3.0, "resolution": 16, "seed": 0}
    trajectory = record(fresh_pipeline, prompts, batch_size=2, **how)
    chosen, context = axes(**further), CallContext(trajectory.timesteps, trajectory.noise_levels)
    whole = sharpened(fresh_pipeline)

    def run(checkpoint: Path | None, dies_at: int | None = None) -> Any:
        denoiser = copy.deepcopy(whole)
        found = sites(denoiser, start_token="start_token" in further)
        calls, form = trajectory.n_calls, Form.of(chosen)
        made = wrap(denoiser, found, Bits(8, 4, 4), calls, context, probabilities=form)
        if dies_at is not None:
            denoiser.register_forward_pre_hook(lambda *_: 1 / 0 if context.index == dies_at else None)
        return calibrate(denoiser, made, context, trajectory, chosen, batch_size=2, checkpoint=checkpoint)

    wanted = run(None)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "calls", dies_at=1)
    found = run(tmp_path / "calls")
    rows = {tuple(p.log2.tolist()) for p in found.values() if p.log2 is not None}
    assert all(len(set(row[:2])) == len(set(row[2:])) == 1 for row in rows), "a group shares its choice"
    for name, parameters in wanted.items():
        for one, other in zip(parameters, found[name], strict=True):
            assert one is other is None or torch.equal(one, other)


def test_progressive_calibration_chooses_too(tiny_model_folder: Path, tmp_path: Path) -> None:
    further = {
        **ADAPTIVE,
        "rounding": "nearest",
        "calibration_inputs": "progressive",
        "calibrate_last": False,
    }
    how: dict[str, Any] = {"steps": 3, "guidance": 3.0, "resolution": 16, "batch_size": 2, "bits": "w4a4"}
    prompts = ["a small red star", "a large blue ring"]
    further |= {"rounding": "nearest", "weight_range": "minmax"}
    folder = halftone.quantize(str(tiny_model_folder), "static", prompts, tmp_path / "o", axes=further, **how)
    assert all(check.passed for check in artefact.verify(folder))
