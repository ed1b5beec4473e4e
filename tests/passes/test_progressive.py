"""Progressive calibration: on the quantized sampler's own latents, in linear time, resumable."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind, sites
from halftone.layers import set_weights, wrap
from halftone.passes import progressive
from halftone.passes.calibrate import calibrate
from halftone.passes.lockstep import Lockstep
from halftone.passes.progressive import calibrate_progressively, denoiser_calls
from halftone.passes.state import ActivationParameters
from halftone.passes.weights import quantize_weights
from halftone.policies import CalibrationInputs, TimeAxis
from halftone.quantizers.affine import fit_affine, fit_non_negative
from halftone.quantizers.bits import Bits
from halftone.quantizers.ranges import MinMax
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.trajectory import Trajectory, denoiser_inputs, record, run_arguments
from parameters import equal, held

AXES = Axes(time_axis=TimeAxis.PER_CALL, calibration_inputs=CalibrationInputs.PROGRESSIVE)
PROMPTS = ["a large red star", "a small blue ring", "a green cross"]
HOW: dict[str, Any] = {"steps": 3, "guidance": 4.0, "resolution": 16, "seed": 0}
BATCHES = (range(2), range(2, 3))


class Case:
    """A pipeline with a wrapped denoiser, calibrated on its reference trajectory."""

    def __init__(self, pipeline: Any, bits: str = "w8a4") -> None:
        self.pipeline = pipeline
        self.draws: list[int] = []
        self.trajectory: Trajectory = record(pipeline, PROMPTS, batch_size=2, **HOW)
        self.denoiser = pipeline.unet
        width, found = Bits.parse(bits), sites(pipeline.unet)
        weights = quantize_weights(self.denoiser, found, AXES, width)
        self.context = CallContext(self.trajectory.timesteps, self.trajectory.noise_levels)
        self.quantizers = wrap(self.denoiser, found, width, self.trajectory.n_calls, self.context)
        set_weights(self.denoiser, weights, width)
        self.reference = calibrate(
            self.denoiser, self.quantizers, self.context, self.trajectory, AXES, batch_size=2
        )

    def arguments(self, ids: range, draw: int = 0) -> dict[str, Any]:
        how = {**HOW, "seed": draw}
        return {**run_arguments(self.pipeline, ids, [""] * len(ids), **how), "output_type": "latent"}

    def runs(self, draw: int) -> list[tuple[range, dict[str, Any]]]:
        self.draws.append(draw)
        return [(ids, self.arguments(ids, draw)) for ids in BATCHES]

    def run(self, checkpoint: Path, **axes: bool) -> ActivationParameters:
        return calibrate_progressively(
            self.pipeline,
            self.denoiser,
            self.quantizers,
            self.context,
            self.trajectory,
            AXES.model_copy(update=axes),
            self.reference,
            self.runs,
            checkpoint=checkpoint,
        )


@pytest.fixture
def case(tiny_pipeline: Any) -> Case:
    return Case(copy.deepcopy(tiny_pipeline))


def same(one: ActivationParameters, other: ActivationParameters) -> bool:
    return all(equal(parameters, other[name]) for name, parameters in one.items())


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler, EulerDiscreteScheduler])
def test_runs_in_lockstep_are_the_pipelines_own(tiny_pipeline: Any, scheduler: Any) -> None:
    pipeline = copy.deepcopy(tiny_pipeline)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    trajectory = record(pipeline, PROMPTS, batch_size=2, **HOW)
    arguments = [
        {**run_arguments(pipeline, ids, [""] * len(ids), **HOW), "output_type": "latent"} for ids in BATCHES
    ]
    with torch.no_grad(), Lockstep(pipeline, arguments) as runs:
        for call in range(trajectory.n_calls):
            for ids, latents in zip(BATCHES, runs.latents, strict=True):
                ours = latents[: len(ids)]
                torch.testing.assert_close(ours, trajectory.latents[call, list(ids)], atol=1e-4, rtol=1e-4)
            given = [denoiser_inputs(trajectory, call, ids) for ids in BATCHES]
            for one, latents in zip(given, runs.latents, strict=True):
                one[trajectory.input_name] = latents
            runs.answer([pipeline.unet(**one)[0] for one in given])
        assert not runs.latents
    assert "forward" not in vars(pipeline.unet)


def test_one_run_computes_at_a_time(tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(tiny_pipeline)
    encoding: list[None] = []
    seen: list[int] = []
    encode = kind.encode_prompt

    def slowly(*args: Any, **kwargs: Any) -> Any:
        encoding.append(None)
        seen.append(len(encoding))
        time.sleep(0.05)  # another run would come in between and find the tokenizer padding as this one wants
        encoding.pop()
        return encode(*args, **kwargs)

    monkeypatch.setattr(kind, "encode_prompt", slowly)
    arguments = [run_arguments(tiny_pipeline, ids, [""] * len(ids), **HOW) for ids in BATCHES]
    with Lockstep(copy.deepcopy(tiny_pipeline), arguments):
        assert seen == [1, 1]


def test_a_fault_in_a_run_ends_all_of_them(tiny_pipeline: Any) -> None:
    pipeline = copy.deepcopy(tiny_pipeline)
    good, bad = ({**run_arguments(pipeline, range(1), [""], **HOW), "output_type": "latent"} for _ in "ab")
    bad["prompt"] = 3
    with pytest.raises(ValueError, match="prompt"), Lockstep(pipeline, [good, bad]):
        pass
    assert "forward" not in vars(pipeline.unet)


@pytest.mark.parametrize(
    ("axes", "each"),
    [
        ({}, 2 * 4),
        ({"calibrate_last": False}, 2 * 3),
        ({"replay_prefix": True}, 1 + 2 + 3 + 4),
        ({"replay_prefix": True, "calibrate_last": False}, 1 + 2 + 3),
    ],
)
def test_denoiser_calls_are_what_is_said(case: Case, axes: Any, each: int, tmp_path: Path) -> None:
    computed: list[int] = []
    case.denoiser.conv_in.register_forward_hook(lambda *_: computed.append(1))
    case.run(tmp_path, **axes)
    assert case.trajectory.n_calls == 4
    said = denoiser_calls(AXES.model_copy(update=axes), 4, len(BATCHES))
    assert len(computed) == said == each * len(BATCHES)


def test_linear_time_where_replaying_takes_quadratic() -> None:
    replayed = AXES.model_copy(update={"replay_prefix": True})
    assert (denoiser_calls(AXES, 51, 50), denoiser_calls(replayed, 51, 50)) == (5100, 66_300)


def test_replayed_prefixes_give_the_same_parameters(case: Case, tmp_path: Path) -> None:
    carried = case.run(tmp_path / "carried")
    assert same(case.run(tmp_path / "replayed", replay_prefix=True), carried)
    assert set(case.draws) == {0}
    assert not same(case.run(tmp_path / "new", replay_prefix=True, refresh_noise=True), carried)
    assert set(case.draws) == set(range(4))


def test_the_last_call_may_keep_what_the_reference_gave(case: Case, tmp_path: Path) -> None:
    whole = case.run(tmp_path / "whole")
    found = case.run(tmp_path / "published", calibrate_last=False)
    for name, site in found.items():
        progressive_one, reference = held(whole[name]), held(case.reference[name])
        for part, value in held(site).items():
            assert torch.equal(value[:-1], progressive_one[part][:-1])
            assert torch.equal(value[-1], reference[part][-1])


class Halving(nn.Module):
    """A denoiser of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layer(sample),)


class Subtracting:
    """A sampler x <- x - w x."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.scheduler = unet, None

    def __call__(self, start: Tensor) -> Tensor:
        for timestep in (2, 1, 0):
            start = start - self.unet(start, timestep, return_dict=False)[0]
        return start


def test_a_sampler_of_one_weight_quantized_to_another(tmp_path: Path) -> None:
    denoiser, context = Halving(), CallContext()
    starts = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    seen = torch.tensor([1.0, 0.5, 0.25]).reshape(3, 1, 1, 1, 1)
    trajectory = Trajectory(starts * seen, torch.tensor([2, 1, 0]), torch.ones(3))
    site = Site("layer", SiteKind.INPUT, "Linear", None, None)
    quantizers = wrap(denoiser, [site], Bits(16, 16, 16), 3, context)
    reference = calibrate(denoiser, quantizers, context, trajectory, AXES, batch_size=2)
    nn.init.constant_(denoiser.layer.layer.weight, 0.6)
    found = calibrate_progressively(
        Subtracting(denoiser),
        denoiser,
        quantizers,
        context,
        trajectory,
        AXES,
        reference,
        lambda _: [(range(2), {"start": starts})],
        checkpoint=tmp_path,
    )
    torch.testing.assert_close(reference["layer.input"].hi, torch.tensor([1.0, 0.5, 0.25]))
    assert found["layer.input"].hi.tolist() == pytest.approx([1, 0.4, 0.16], abs=1e-4)
    assert found["layer.input"].lo.tolist() == pytest.approx([-1, -0.4, -0.16], abs=1e-4)


def test_ranges_are_those_of_the_replayed_prefix(case: Case, tmp_path: Path) -> None:
    """The algorithm as published, by hand, for the same noise: for every call run the quantized sampler from
    the start, observe that call while it uses the reference's parameters, and only then replace them."""
    found = case.run(tmp_path)
    set_all(case.quantizers, case.reference)
    for call in range(case.trajectory.n_calls):
        for quantizer in case.quantizers.values():
            quantizer.observer = MinMax()
        for ids in BATCHES:
            replay(case, ids, until=call)
        for name, quantizer in case.quantizers.items():
            lo, hi = quantizer.observer.range()  # type: ignore[union-attr]
            fit = (
                fit_non_negative(hi, quantizer.bits)
                if quantizer.non_negative
                else fit_affine(lo, hi, quantizer.bits)
            )
            assert fit.scale.reshape(()) == found[name].scale[call], (name, call)
            assert fit.zero_point.reshape(()) == found[name].zero_point[call]
            quantizer.set_call(call, type(fit)(fit.scale.reshape(()), fit.zero_point.reshape(()), fit.bits))
    assert not same(found, case.reference)


def set_all(quantizers: dict[str, SiteQuantizer], found: ActivationParameters) -> None:
    for name, quantizer in quantizers.items():
        quantizer.set_parameters(found[name].scale.clone(), found[name].zero_point.clone())


def replay(case: Case, ids: range, until: int) -> None:
    with torch.no_grad(), Lockstep(case.pipeline, [case.arguments(ids)]) as run:
        for call in range(until + 1):
            given = denoiser_inputs(case.trajectory, call, ids)
            given[case.trajectory.input_name] = run.latents[0]
            set_mode(case.quantizers, Mode.OBSERVE_QUANTIZED if call == until else Mode.QUANTIZE)
            with case.context.at(call):
                output: Tensor = case.denoiser(**given)[0]
            run.answer([output])


def test_at_sixteen_bits_it_is_the_reference(tiny_pipeline: Any, tmp_path: Path) -> None:
    case = Case(copy.deepcopy(tiny_pipeline), "w16a16")
    found = case.run(tmp_path)
    for name in found:
        torch.testing.assert_close(found[name].scale, case.reference[name].scale, rtol=0.02, atol=1e-7)


def test_an_interrupted_run_goes_on_with_the_same_bits(
    case: Case, tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = case.run(tmp_path / "whole")
    keep, kept = progressive._keep, list[Path]()

    def fail(path: Path, *rest: Any) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(path)
        keep(path, *rest)

    again = Case(copy.deepcopy(tiny_pipeline))
    with monkeypatch.context() as patch:
        patch.setattr(progressive, "_keep", fail)
        with pytest.raises(KeyboardInterrupt):
            again.run(tmp_path / "cut")
    resumed = Case(copy.deepcopy(tiny_pipeline))
    computed: list[int] = []
    resumed.denoiser.conv_in.register_forward_hook(lambda *_: computed.append(1))
    assert same(resumed.run(tmp_path / "cut"), whole)
    assert len(computed) == 2 * len(BATCHES) * (case.trajectory.n_calls - 2)
