"""The call a sampling run is in, and the parameters that serve it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
)

from halftone.calls import CallContext, legacy_slots, noise_level
from halftone.errors import UserError


def run(pipeline: Any, steps: int = 3, prompt: str = "a red star", **options: Any) -> Any:
    options = {"output_type": "latent", "guidance_scale": 1.0, **options}
    return pipeline(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **options)


class Slots:
    """The slot of every denoiser call."""

    def __init__(self, pipeline: Any, context: CallContext) -> None:
        self.seen: list[int] = []
        context.attach(pipeline.unet, pipeline)
        pipeline.unet.register_forward_pre_hook(lambda *_: self.seen.append(context.slot))

    def take(self) -> list[int]:
        seen, self.seen = self.seen, []
        return seen


@pytest.mark.parametrize(("steps", "calls"), [(25, 26), (50, 51)])
def test_pndm_makes_one_call_more_than_steps_and_repeats_a_timestep(
    fresh_pipeline: Any, steps: int, calls: int
) -> None:
    fresh_pipeline.scheduler.set_timesteps(steps)
    timesteps = fresh_pipeline.scheduler.timesteps
    assert timesteps[1] == timesteps[2]
    context = CallContext(
        timesteps, [noise_level(fresh_pipeline.scheduler, float(t)) or 0 for t in timesteps]
    )
    slots = Slots(fresh_pipeline, context)
    # the numbers are about calls, so the network itself may be left out
    fresh_pipeline.unet.forward = lambda sample, *_, **__: (torch.zeros_like(sample),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fresh_pipeline, steps)
        assert slots.take() == list(range(calls))
        run(fresh_pipeline, steps)
        assert slots.take() == list(range(calls))


def test_an_exception_in_a_run_resets_the_context(fresh_pipeline: Any) -> None:
    context = CallContext()
    slots = Slots(fresh_pipeline, context)

    def fail(pipeline: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fresh_pipeline, callback_on_step_end=fail)
    assert slots.take() == [0]
    assert context.index == 0
    run(fresh_pipeline)
    assert slots.take() == [0, 1, 2, 3]


def test_a_run_that_makes_too_few_calls_is_noticed(fresh_pipeline: Any) -> None:
    context = CallContext()
    context.attach(fresh_pipeline.unet, fresh_pipeline)
    with context.run(expected=4):
        run(fresh_pipeline)
    with pytest.raises(RuntimeError, match="made 4 denoiser calls, 5"), context.run(expected=5):
        run(fresh_pipeline)
    assert context.index == 0


def calibrated(pipeline: Any, steps: int) -> CallContext:
    pipeline.scheduler.set_timesteps(steps)
    timesteps = pipeline.scheduler.timesteps
    return CallContext(timesteps, [noise_level(pipeline.scheduler, float(t)) or 0 for t in timesteps])


def test_another_step_count_takes_the_nearest_noise_level_and_warns_once(fresh_pipeline: Any) -> None:
    context = calibrated(fresh_pipeline, 4)  # timesteps 751, 501, 501, 251, 1
    slots = Slots(fresh_pipeline, context)
    with pytest.warns(UserWarning, match="nearest calibrated noise level"):
        run(fresh_pipeline, 8)  # 876, 751, 751, 626, 501, 376, 251, 126, 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fresh_pipeline, 8)
    first = slots.take()[:9]
    assert first == sorted(first)
    assert (first[0], first[1], first[4], first[6], first[8]) == (0, 0, 2, 3, 4)


def test_another_scheduler_put_in_later_works(fresh_pipeline: Any) -> None:
    context = calibrated(fresh_pipeline, 4)
    slots = Slots(fresh_pipeline, context)
    run(fresh_pipeline, 4)
    assert slots.take() == [0, 1, 2, 3, 4]
    for kind in (DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        fresh_pipeline.scheduler = kind.from_config(fresh_pipeline.scheduler.config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(fresh_pipeline, 4)
        seen = slots.take()
        assert len(seen) == 4
        assert seen == sorted(seen)
        assert seen[0] == 0
        assert seen[-1] >= 3


def test_another_pipeline_around_the_same_denoiser_works(fresh_pipeline: Any) -> None:
    context = calibrated(fresh_pipeline, 4)
    slots = Slots(fresh_pipeline, context)
    other = StableDiffusionImg2ImgPipeline(**fresh_pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    picture = torch.zeros(1, 3, 16, 16)
    with pytest.warns(UserWarning, match="nearest"):
        run(other, 4, image=picture, strength=0.5)  # from the middle of the schedule, by the same timesteps
    first = slots.take()
    assert first[-1] == 4
    assert all(context.timesteps[slot] <= 501 for slot in first)  # type: ignore[index]
    run(other, 4, image=picture, strength=0.5)
    assert slots.take() == first


def test_the_pipeline_keeps_its_class_name_and_signature(fresh_pipeline: Any) -> None:
    before = type(fresh_pipeline)
    CallContext().attach(fresh_pipeline.unet, fresh_pipeline)
    CallContext().attach(fresh_pipeline.unet, fresh_pipeline)  # a second time puts the new context in
    assert type(fresh_pipeline).__name__ == before.__name__
    assert type(fresh_pipeline).__mro__[1] is before
    assert isinstance(fresh_pipeline, before)


def test_calls_by_hand_start_over_when_the_timestep_rises(tiny_unconditional: UNet2DModel) -> None:
    denoiser = tiny_unconditional
    context = CallContext([900.0, 500.0, 100.0])
    context.attach(denoiser)
    slots = []
    denoiser.register_forward_pre_hook(lambda *_: slots.append(context.slot))
    denoiser.forward = lambda sample, timestep: sample  # type: ignore[method-assign,assignment]
    for timestep in (900, 500, 100, 900, 500):
        denoiser(torch.zeros(1, 3, 8, 8), timestep)
    with context.at(2):
        denoiser(torch.zeros(1, 3, 8, 8), 900)
    denoiser(torch.zeros(1, 3, 8, 8), timestep=torch.tensor(100))
    assert slots == [0, 1, 2, 0, 1, 2, 2]


def test_unconditional_pipeline_counts_its_calls(tiny_unconditional: UNet2DModel) -> None:
    pipeline = DDIMPipeline(tiny_unconditional, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    context = CallContext()
    context.attach(pipeline.unet, pipeline)
    with context.run(expected=5):
        pipeline(num_inference_steps=5, output_type="np")


def test_noise_levels() -> None:
    pndm = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    products = pndm.alphas_cumprod.double()
    expected = ((1 - products) / products).sqrt()
    assert noise_level(pndm, 500) == pytest.approx(expected[500].item(), rel=1e-6)
    assert expected[500] < noise_level(pndm, 500.5) < expected[501]  # type: ignore[operator]
    euler = EulerDiscreteScheduler.from_config(pndm.config, timestep_spacing="trailing")
    euler.set_timesteps(10)
    for timestep, sigma in zip(euler.timesteps, euler.sigmas, strict=False):
        assert noise_level(euler, float(timestep)) == pytest.approx(float(sigma), rel=1e-4)
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    sigma = float(flow.sigmas[1])
    assert noise_level(flow, float(flow.timesteps[1])) == pytest.approx(sigma / (1 - sigma))
    assert noise_level(flow, float(flow.timesteps[1]) / 1000) == pytest.approx(sigma / (1 - sigma))
    assert noise_level(object(), 3.0) is None


def test_legacy_lookup_is_that_of_the_published_code() -> None:
    pndm = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pndm.set_timesteps(25)
    times = pndm.timesteps.tolist()
    slots = legacy_slots(times)
    assert slots == [0, 1, 1, *range(2, 25)], "slot 25 is never used"
    context = CallContext(times, lookup=slots)
    assert [context.slot_for(k, t) for k, t in enumerate(times)] == list(range(26))
    for call, slot in enumerate(slots):
        with context.at(call):
            assert context.slot == slot
    assert legacy_slots([999, 749, 499, 249]) == [0, 1, 2, 3]


@pytest.mark.parametrize("times", [[999.5, 499.5], [999, 900, 10], [499, 999], [1200, 600]])
def test_legacy_lookup_is_refused_where_there_is_none(times: list[float]) -> None:
    with pytest.raises(UserError, match="legacy_lookup"):
        legacy_slots(times)
