"""Static calibration: ranges from the reference trajectory, resumable, exact where it must be."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from halftone.axes import Axes
from halftone.denoiser import CallContext, SiteKind, sites
from halftone.errors import UserError
from halftone.files import sha256
from halftone.layers import set_weights, wrap
from halftone.passes.calibrate import calibrate
from halftone.passes.state import CalibrationState
from halftone.passes.weights import quantize_weights
from halftone.policies import Range, TimeAxis
from halftone.provenance import Provenance, describe
from halftone.quantizers.bits import Bits
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.trajectory import Trajectory, denoiser_inputs, record, run_arguments
from parameters import equal

PROMPTS = ["a red star", "a blue ring", "a small green square"]
SETTINGS: dict[str, Any] = {"steps": 3, "guidance": 5.0, "resolution": 16, "seed": 0}
PER_CALL, SHARED = Axes(time_axis=TimeAxis.PER_CALL), Axes(time_axis=TimeAxis.SHARED)


@pytest.fixture(scope="module")
def trajectory(tiny_pipeline: Any) -> Trajectory:
    return record(tiny_pipeline, PROMPTS, **SETTINGS, batch_size=3)


class Wrapped(NamedTuple):
    denoiser: nn.Module
    quantizers: dict[str, SiteQuantizer]
    context: CallContext


def wrapped(pipeline: Any, trajectory: Trajectory, bits: str = "w8a8", axes: Axes = PER_CALL) -> Wrapped:
    denoiser = copy.deepcopy(pipeline.unet)
    context = CallContext(trajectory.timesteps, trajectory.noise_levels)
    n_calls = 1 if axes.time_axis is TimeAxis.SHARED else trajectory.n_calls
    found = wrap(denoiser, sites(denoiser), Bits.parse(bits), n_calls, context)
    return Wrapped(denoiser, found, context)


@torch.no_grad()
def outputs(model: Wrapped, trajectory: Trajectory, mode: Mode) -> torch.Tensor:
    set_mode(model.quantizers, mode)
    found = []
    for call in range(trajectory.n_calls):
        with model.context.at(call):
            found.append(model.denoiser(**denoiser_inputs(trajectory, call))[0])
    return torch.stack(found)


def error(pipeline: Any, trajectory: Trajectory, bits: str, axes: Axes = PER_CALL) -> tuple[float, float]:
    """(largest, root mean square) difference of a quantized denoiser's outputs from full precision."""
    model = wrapped(pipeline, trajectory, bits, axes)
    plain = outputs(model, trajectory, Mode.OFF)
    width = Bits.parse(bits)
    found = quantize_weights(model.denoiser, sites(model.denoiser), axes, width)
    set_weights(model.denoiser, found, width)
    calibrate(*model, trajectory, axes, batch_size=3)
    difference = outputs(model, trajectory, Mode.QUANTIZE) - plain
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def test_sixteen_bits_are_full_precision_and_fewer_are_ever_worse(
    tiny_pipeline: Any, trajectory: Trajectory
) -> None:
    largest, rms = zip(
        *(error(tiny_pipeline, trajectory, f"w{b}a{b}") for b in (4, 6, 8, 10, 16)), strict=True
    )
    assert largest[-1] < 1e-3
    for coarse, fine in pairwise(rms):
        assert fine < coarse / 2


def test_ranges_are_the_extremes_of_each_call(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    model = wrapped(tiny_pipeline, trajectory)
    found = calibrate(*model, trajectory, PER_CALL, batch_size=2)
    site = "up_blocks.1.resnets.1.conv_shortcut.input"
    seen: list[torch.Tensor] = []
    hook = model.quantizers[site].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(model, trajectory, Mode.OFF)
    hook.remove()
    extremes = torch.stack([torch.stack([x.min(), x.max()]) for x in seen])
    assert torch.allclose(torch.stack([found[site].lo, found[site].hi], 1), extremes, atol=1e-5)
    steps = (found[site].hi.clamp(min=0) - found[site].lo.clamp(max=0)) / 255
    assert torch.allclose(found[site].scale, steps)
    assert torch.equal(model.quantizers[site].scale, found[site].scale)
    assert all(q.mode is Mode.OFF and q.observer is None for q in model.quantizers.values())


def test_probabilities_have_zero_point_zero(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    model = wrapped(tiny_pipeline, trajectory)
    found = calibrate(*model, trajectory, PER_CALL, batch_size=3)
    for name, quantizer in model.quantizers.items():
        if quantizer.site.kind is SiteKind.PROBABILITIES:
            assert (found[name].zero_point == 0).all()
            assert torch.allclose(found[name].scale, found[name].hi / 255)
            assert (found[name].lo >= 0).all()


def test_shared_ranges_hold_every_call(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    per_call = calibrate(*wrapped(tiny_pipeline, trajectory), trajectory, PER_CALL, batch_size=3)
    model = wrapped(tiny_pipeline, trajectory, axes=SHARED)
    shared = calibrate(*model, trajectory, SHARED, batch_size=3)
    for name, parameters in shared.items():
        assert parameters.scale.shape == (1,)
        assert parameters.lo.shape == (trajectory.n_calls,)  # what was seen is kept per call all the same
        assert torch.equal(parameters.lo, per_call[name].lo)
        if name.endswith(".input"):
            wanted = (parameters.hi.max().clamp(min=0) - parameters.lo.min().clamp(max=0)) / 255
            assert torch.allclose(parameters.scale, wanted)


class Killed(Exception):
    pass


def kill_at(model: Wrapped, call: int) -> Any:
    def hook(*_: Any) -> None:
        if model.context.index == call:
            raise Killed

    return model.denoiser.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    "axes",
    [
        PER_CALL,
        SHARED,
        Axes(time_axis=TimeAxis.SHARED, activation_range=Range.MOVING_AVERAGE),
        Axes(time_axis=TimeAxis.SHARED, activation_range=Range.PERCENTILE, percentile=99.0),
    ],
    ids=["per call", "shared", "moving average", "percentile"],
)
def test_an_interrupted_calibration_goes_on_with_the_same_bits(
    tiny_pipeline: Any, trajectory: Trajectory, tmp_path: Path, axes: Axes
) -> None:
    whole = calibrate(*wrapped(tiny_pipeline, trajectory, axes=axes), trajectory, axes, batch_size=2)
    checkpoint = tmp_path / "checkpoint.safetensors"
    first = wrapped(tiny_pipeline, trajectory, axes=axes)
    kill_at(first, 2)
    with pytest.raises(Killed):
        calibrate(*first, trajectory, axes, batch_size=2, checkpoint=checkpoint)
    second = wrapped(tiny_pipeline, trajectory, axes=axes)
    calls: list[int] = []
    second.denoiser.register_forward_pre_hook(lambda *_: calls.append(second.context.index))
    resumed = calibrate(*second, trajectory, axes, batch_size=2, checkpoint=checkpoint)
    assert sorted(set(calls)) == [2, 3]
    assert resumed.keys() == whole.keys()
    for name, parameters in whole.items():
        assert equal(parameters, resumed[name]), name


def test_a_checkpoint_of_another_run_is_not_used(
    tiny_pipeline: Any, trajectory: Trajectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    calibrate(*wrapped(tiny_pipeline, trajectory), trajectory, PER_CALL, batch_size=3, checkpoint=checkpoint)
    model = wrapped(tiny_pipeline, trajectory, "w8a6")
    found = calibrate(*model, trajectory, PER_CALL, batch_size=3, checkpoint=checkpoint)
    assert "starts over" in capsys.readouterr().err
    fresh = calibrate(*wrapped(tiny_pipeline, trajectory, "w8a6"), trajectory, PER_CALL, batch_size=3)
    assert all(torch.equal(found[name].scale, fresh[name].scale) for name in fresh)
    checkpoint.write_bytes(b"cut short")
    calibrate(*model, trajectory, PER_CALL, batch_size=3, checkpoint=checkpoint)
    assert "starts over" in capsys.readouterr().err


def test_a_value_that_is_not_finite_is_reported_with_site_and_call(
    tiny_pipeline: Any, trajectory: Trajectory
) -> None:
    model = wrapped(tiny_pipeline, trajectory)
    conv = model.denoiser.get_submodule("mid_block.resnets.0.conv1")

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * torch.nan if model.context.index == 2 else None

    conv.register_forward_hook(spoil)
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv2\.input, call 2: .*NaN"):
        calibrate(*model, trajectory, PER_CALL, batch_size=3)
    assert all(quantizer.mode is Mode.OFF for quantizer in model.quantizers.values())


def test_the_state_file_makes_the_same_denoiser_again(
    tiny_pipeline: Any, trajectory: Trajectory, tmp_path: Path
) -> None:
    bits = Bits.parse("w4a8")
    model = wrapped(tiny_pipeline, trajectory, "w4a8")
    weights = quantize_weights(model.denoiser, sites(model.denoiser), PER_CALL, Bits(4, 8, 8))
    set_weights(model.denoiser, weights, Bits(4, 8, 8))
    activations = calibrate(*model, trajectory, PER_CALL, batch_size=3)
    state = CalibrationState(weights, activations, trajectory.timesteps, trajectory.noise_levels)
    for name in ("one", "two"):
        state.save(tmp_path / name, provenance(tiny_pipeline))
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")
    again, known = CalibrationState.load(tmp_path / "one")
    assert known == provenance(tiny_pipeline)
    other = wrapped(tiny_pipeline, trajectory, "w4a8")
    again.apply(other.denoiser, other.quantizers, bits)
    expected = outputs(model, trajectory, Mode.QUANTIZE)
    assert torch.equal(outputs(other, trajectory, Mode.QUANTIZE), expected)
    (tmp_path / "damaged").write_bytes(b"{}")
    with pytest.raises(UserError, match="not a calibration"):
        CalibrationState.load(tmp_path / "damaged")
    other.quantizers.pop("mid_block.resnets.0.conv1.input")
    with pytest.raises(ValueError, match="differ in sites"):
        again.apply(other.denoiser, other.quantizers, bits)


def provenance(pipeline: Any) -> Provenance:
    return describe(
        pipeline, model_path="tiny", model_revision=None, model_sha256="0" * 64, prompts=PROMPTS, **SETTINGS
    )


def test_a_calibrated_denoiser_samples_in_its_pipeline(fresh_pipeline: Any, trajectory: Trajectory) -> None:
    """Per-call parameters inside the real sampler, on the noise they were calibrated for."""

    def sample() -> torch.Tensor:
        arguments = run_arguments(fresh_pipeline, range(len(PROMPTS)), PROMPTS, **SETTINGS)
        return fresh_pipeline(**arguments, output_type="latent").images

    plain = sample()
    context = CallContext(trajectory.timesteps, trajectory.noise_levels)
    found = sites(fresh_pipeline.unet)
    quantizers = wrap(fresh_pipeline.unet, found, Bits(16, 16, 16), trajectory.n_calls, context)
    calibrate(fresh_pipeline.unet, quantizers, context, trajectory, PER_CALL, batch_size=3)
    context.attach(fresh_pipeline.unet, fresh_pipeline)
    set_mode(quantizers, Mode.QUANTIZE)
    with context.run(expected=trajectory.n_calls):
        error = (sample() - plain).abs().max()
    assert error < 0.02
    with context.at(0):  # the first call's parameters for every call: values are clipped
        assert (sample() - plain).abs().max() > 3 * error
