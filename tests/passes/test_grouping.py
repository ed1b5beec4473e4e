"""Grouped calibration: partitions and ranges from what each call shows, and what composes with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.denoiser import SiteKind, sites
from halftone.errors import UserError
from halftone.layers import QuantizedLayer, wrap
from halftone.passes import calibrate as walk
from halftone.passes.calibrate import calibrate
from halftone.passes.progressive import calibrate_progressively
from halftone.passes.relax import relax_shared
from halftone.passes.state import ActivationParameters
from halftone.quantizers.affine import fit_affine
from halftone.quantizers.bits import Bits
from halftone.quantizers.granularity import PerGroup, reduce_minmax
from halftone.quantizers.groups import NO_INDEX, Axis
from halftone.relaxing import Relaxation
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.trajectory import Trajectory, denoiser_inputs, run_arguments
from parameters import equal

FREE = Axes(time_axis="per_call", groups=4)
ALIGNED = Axes(time_axis="per_call", groups=2, group_layout="aligned")
SHARED = Axes(groups=4)
FLAT = "time_embedding.linear_1.input"
CONV = "down_blocks.0.resnets.0.conv1.input"
POINT = "up_blocks.1.resnets.1.conv_shortcut.input"
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.input"
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.key"


class Case:
    """A wrapped denoiser, calibrated."""

    def __init__(
        self,
        pipeline: Any,
        trajectory: Trajectory,
        axes: Axes,
        bits: str = "w8a8",
        checkpoint: Path | None = None,
        relaxation: Relaxation | None = None,
    ) -> None:
        self.denoiser: nn.Module = copy.deepcopy(pipeline.unet)
        self.trajectory, self.axes = trajectory, axes
        self.context = CallContext(trajectory.timesteps, trajectory.noise_levels)
        slots = 1 if axes.time_axis == "shared" else trajectory.n_calls
        width, found = Bits.parse(bits), sites(self.denoiser)
        self.quantizers = wrap(self.denoiser, found, width, slots, self.context, relaxation=relaxation)
        self.parameters: ActivationParameters = {}
        self.checkpoint = checkpoint

    def calibrate(self) -> Case:
        self.parameters = calibrate(
            self.denoiser,
            self.quantizers,
            self.context,
            self.trajectory,
            self.axes,
            batch_size=2,
            checkpoint=self.checkpoint,
        )
        return self

    @torch.no_grad()
    def outputs(self, mode: Mode) -> torch.Tensor:
        set_mode(self.quantizers, mode)
        found = []
        for call in range(self.trajectory.n_calls):
            with self.context.at(call):
                found.append(self.denoiser(**denoiser_inputs(self.trajectory, call))[0])
        set_mode(self.quantizers, Mode.OFF)
        return torch.stack(found)

    def error(self) -> float:
        return (self.outputs(Mode.QUANTIZE) - self.outputs(Mode.OFF)).square().mean().sqrt().item()

    def seen(self, name: str) -> list[torch.Tensor]:
        """What a site is given, call by call."""
        kept: list[torch.Tensor] = []

        class Keep:
            def update(self, x: torch.Tensor) -> None:
                kept.append(x)

        quantizer = self.quantizers[name]
        quantizer.observer = Keep()
        with torch.no_grad():
            for call in range(self.trajectory.n_calls):
                quantizer.mode = Mode.OBSERVE
                with self.context.at(call):
                    self.denoiser(**denoiser_inputs(self.trajectory, call))
        quantizer.mode, quantizer.observer = Mode.OFF, None
        return kept


@pytest.fixture(scope="module")
def free(tiny_pipeline: Any, trajectory: Trajectory) -> Case:
    return Case(tiny_pipeline, trajectory, FREE).calibrate()


def check_ranges(case: Case, name: str, x: torch.Tensor, call: int, bits: int = 8) -> None:
    """The parameters of a site whose tensor needs no unfolding are those of its groups' extremes."""
    groups, parameters = case.parameters[name].groups, case.parameters[name]
    assert groups is not None
    axis, labels = groups.row(call)
    convolution = name in (CONV, POINT)
    rows = x.flatten(2) if convolution else x
    place = 1 if (axis is Axis.CHANNEL) == convolution else 2
    lo, hi = reduce_minmax(rows, PerGroup(place, tuple(labels.tolist())))
    wanted = fit_affine(lo.flatten(), hi.flatten(), bits, include_zero=case.axes.group_layout == "aligned")
    assert torch.allclose(parameters.scale[call][labels], wanted.scale, rtol=1e-4)
    assert (parameters.zero_point[call][labels] - wanted.zero_point).abs().max() <= 1


@pytest.mark.parametrize("name", [LINEAR, KEY, POINT])
def test_every_call_has_groups_with_their_own_ranges(free: Case, name: str) -> None:
    parameters = free.parameters[name]
    assert parameters.scale.shape == (free.trajectory.n_calls, 4)
    for call, x in enumerate(free.seen(name)):
        check_ranges(free, name, x, call)


def test_vectors_and_probabilities_keep_one_range(free: Case) -> None:
    for name, parameters in free.parameters.items():
        alone = name == FLAT or "time_emb" in name or name.endswith(SiteKind.PROBABILITIES)
        assert (parameters.groups is None) == alone
        assert parameters.scale.ndim == (1 if alone else 2)


def test_a_convolution_is_grouped_unfolded_and_aligned_by_channel(
    free: Case, tiny_pipeline: Any, trajectory: Trajectory
) -> None:
    groups = free.parameters[CONV].groups
    assert groups is not None
    assert {len(groups.row(call)[1]) for call in range(3)} <= {32 * 9, 64}
    aligned = Case(tiny_pipeline, trajectory, ALIGNED, "w8a6").calibrate()
    parameters = aligned.parameters[CONV]
    assert parameters.groups is not None
    assert len(parameters.axis) == 1, "one partition for all calls"
    axis, labels = parameters.groups.row(2)
    assert axis is Axis.CHANNEL
    assert torch.bincount(labels).tolist() == [16, 16]
    for call, x in enumerate(aligned.seen(CONV)):
        check_ranges(aligned, CONV, x, call, 6)
    assert (aligned.parameters[CONV].zero_point >= 0).all(), "padding must have a code"


def test_groups_cost_less_than_one_range(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    def error(**axes: Any) -> float:
        chosen = Axes(time_axis="per_call", **axes)
        return Case(tiny_pipeline, trajectory, chosen, "w8a4s16").calibrate().error()

    layer = error()
    assert error(groups=8) < 0.9 * layer
    assert error(groups=8, group_axis="position") < layer
    assert error(groups=2, group_layout="aligned") < layer


def test_one_group_is_the_recipe_without_groups(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    plain, one = (
        Case(tiny_pipeline, trajectory, axes, "w8a4").calibrate()
        for axes in (Axes(time_axis="per_call"), Axes(time_axis="per_call", groups=1, group_axis="auto"))
    )
    assert torch.equal(plain.outputs(Mode.QUANTIZE), one.outputs(Mode.QUANTIZE))


@pytest.mark.parametrize("axes", [ALIGNED, SHARED])
def test_an_interrupted_calibration_goes_on_with_the_same_bits(
    tiny_pipeline: Any, trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axes: Axes
) -> None:
    whole = Case(tiny_pipeline, trajectory, axes).calibrate()
    stopped = Case(tiny_pipeline, trajectory, axes, checkpoint=tmp_path / "calls.safetensors")
    plain = walk.Walk.start_call

    def stop(self: walk.Walk, call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt
        plain(self, call)

    with monkeypatch.context() as patch:
        patch.setattr(walk.Walk, "start_call", stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.calibrate()
    resumed = Case(tiny_pipeline, trajectory, axes, checkpoint=tmp_path / "calls.safetensors").calibrate()
    for name, wanted in whole.parameters.items():
        assert equal(resumed.parameters[name], wanted), name


@pytest.mark.parametrize("axes", [FREE, ALIGNED])
def test_progressive_calibration_fits_groups_to_the_quantized_prefix(
    tiny_pipeline: Any, fresh_pipeline: Any, trajectory: Trajectory, tmp_path: Path, axes: Axes
) -> None:
    axes = Axes(**{**axes.model_dump(), "calibration_inputs": "progressive"})
    case = Case(tiny_pipeline, trajectory, axes, "w8a4").calibrate()
    fresh_pipeline.unet = case.denoiser
    how: dict[str, Any] = {"steps": 3, "guidance": 5.0, "resolution": 16, "seed": 0}
    arguments = {**run_arguments(fresh_pipeline, range(2), [""] * 2, **how), "output_type": "latent"}
    found = calibrate_progressively(
        fresh_pipeline,
        case.denoiser,
        case.quantizers,
        case.context,
        trajectory,
        axes,
        case.parameters,
        lambda _: [(range(2), arguments)],
        checkpoint=tmp_path / "work",
    )
    before, after = case.parameters[LINEAR], found[LINEAR]
    assert after.scale.shape == before.scale.shape
    assert not torch.equal(after.scale[1:], before.scale[1:]), "later calls see quantized latents"
    if axes.group_layout == "aligned":
        assert torch.equal(after.labels, before.labels), "that partition is the reference trajectory's"
    for name, quantizer in case.quantizers.items():
        held = quantizer.groups
        assert (held is None) == (found[name].groups is None)
        if held is not None:
            assert torch.equal(held.labels, found[name].labels)
            assert torch.equal(quantizer.scale, found[name].scale)


def test_relaxed_calls_keep_the_groups(tiny_pipeline: Any, trajectory: Trajectory, free: Case) -> None:
    relaxation = Relaxation((1,), 10)
    relaxed = Case(tiny_pipeline, trajectory, FREE, relaxation=relaxation).calibrate()
    for name, parameters in relaxed.parameters.items():
        plain = free.parameters[name]
        assert (parameters.labels is None) == (plain.labels is None)
        assert plain.labels is None or torch.equal(parameters.labels, plain.labels)
        assert torch.equal(parameters.scale[0], plain.scale[0])
        assert torch.allclose(parameters.scale[1] * 1023, plain.scale[1] * 255, rtol=1e-4)
    shared = Case(tiny_pipeline, trajectory, SHARED).calibrate()
    found = relax_shared(shared.parameters, shared.quantizers, relaxation, trajectory.n_calls)[LINEAR]
    assert torch.equal(found.labels, shared.parameters[LINEAR].labels)
    assert torch.allclose(found.scale[1] * 1023, found.scale[0] * 255, rtol=1e-4)


def test_groups_of_positions_fix_the_resolution(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    axes = Axes(time_axis="per_call", groups=4, group_axis="position")
    case = Case(tiny_pipeline, trajectory, axes).calibrate()
    set_mode(case.quantizers, Mode.QUANTIZE)
    inputs = denoiser_inputs(trajectory, 0)
    inputs["sample"] = torch.nn.functional.pad(inputs["sample"], (4, 4, 4, 4))
    with torch.no_grad(), case.context.at(0), pytest.raises(UserError, match=r"positions are grouped.* 256"):
        case.denoiser(**inputs)


def test_a_convolution_that_cannot_be_unfolded_is_refused(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    case = Case(tiny_pipeline, trajectory, FREE)
    case.quantizers[CONV].layout = None
    with pytest.raises(UserError, match=r"conv1.input: groups need a convolution padded with zeros"):
        case.calibrate()


def test_permuted_channels_permute_the_groups_and_nothing_else() -> None:
    torch.manual_seed(0)
    order = torch.randperm(16)
    x = torch.randn(2, 5, 16) * torch.linspace(0.1, 5, 16)
    layer, permuted = nn.Linear(16, 8), nn.Linear(16, 8)
    permuted.load_state_dict({"weight": layer.weight[:, order], "bias": layer.bias})
    axes = Axes(time_axis="per_call", groups=4, group_axis="channel")

    def run(layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, SiteQuantizer]:
        model = nn.ModuleDict({"a": nn.Identity(), "conv_out": nn.Identity()})
        model["a"] = layer
        context = CallContext()
        quantizer = wrap(model, [s for s in sites(model) if s.module == "a"], Bits(8, 4, 4), 1, context)[
            "a.input"
        ]
        found = walk.Walk({"a.input": quantizer}, axes)
        found.start_call(0)
        quantizer.mode = Mode.OBSERVE
        wrapped = model["a"]
        assert isinstance(wrapped, QuantizedLayer)
        with torch.no_grad():
            wrapped(x)
            found.finish_call()
            quantizer.set_parameters(*found.parameters()["a.input"].quantizer)
            quantizer.mode = Mode.QUANTIZE
            return wrapped(x), quantizer

    (one, first), (two, second) = run(layer, x), run(permuted, x[..., order])
    assert torch.allclose(one, two, atol=1e-5)
    assert first.groups is not None
    assert second.groups is not None
    assert torch.equal(first.groups.labels[0][order], second.groups.labels[0])
    assert torch.equal(first.scale, second.scale)
    assert NO_INDEX not in first.groups.labels
