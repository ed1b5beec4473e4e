"""Text keys and values are projected once per prompt, where that is exact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halftone
from halftone.denoiser import denoiser_of
from halftone.site_quantizer import SiteQuantizer
from halftone.text_memory import TextMemory
from quantized import GUIDANCE, PROMPTS, RESOLUTION, STEPS, Calibrated, shared_artefact


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[Calibrated, Path]:
    return shared_artefact(tmp_path_factory, tiny_model_folder)


def counted(pipeline: Any) -> Counter[str]:
    """How often each projection of the denoiser runs from now on."""
    counts: Counter[str] = Counter()
    for name, module in denoiser_of(pipeline).named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn1.to_k")):
            module.register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


def run(pipeline: Any, prompt: str) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": RESOLUTION, "width": RESOLUTION, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return pipeline(
            prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator, **size
        ).images


@pytest.mark.parametrize("execution", ["simulated", "integer"])
def test_once_per_prompt_and_the_same_images(made: tuple[Calibrated, Path], execution: str) -> None:
    calls = made[0].plan.calls
    pipeline = halftone.load(made[1], execution=execution)
    counts = counted(pipeline)
    images = [run(pipeline, prompt) for prompt in PROMPTS]
    assert {counts[name] for name in counts if "attn2" in name} == {len(PROMPTS)}
    assert {counts[name] for name in counts if "attn1" in name} == {len(PROMPTS) * calls}

    forgetful = halftone.load(made[1], execution=execution)
    for module in denoiser_of(forgetful).modules():
        if isinstance(getattr(module, "memory", None), TextMemory):
            module.memory.project = lambda _name, layer, text: layer(text)
    assert torch.equal(run(forgetful, PROMPTS[1]), images[1])


def test_not_where_a_call_has_parameters_of_its_own(made: tuple[Calibrated, Path]) -> None:
    pipeline = halftone.load(made[1])
    for name, module in denoiser_of(pipeline).named_modules():
        if isinstance(module, SiteQuantizer) and name.endswith("attn2.to_k.input"):
            scale = module.scale.clone()
            scale[1:3] *= 1.01
            module.set_parameters(scale, module.zero_point)
    counts = counted(pipeline)
    run(pipeline, PROMPTS[0])
    # calls 0, 1 and 2, 3 and the rest: three sets of parameters in a row
    assert {counts[name] for name in counts if name.endswith("attn2.to_k")} == {3}
    assert {counts[name] for name in counts if name.endswith("attn2.to_v")} == {1}


def test_not_outside_a_run_nor_with_gradients(made: tuple[Calibrated, Path]) -> None:
    pipeline = halftone.load(made[1])
    denoiser, counts = denoiser_of(pipeline), counted(pipeline)
    inputs = torch.randn(1, 4, 8, 8), 500
    text = torch.randn(1, 20, 32)
    context = pipeline._halftone_context
    with torch.no_grad(), context.at(0):
        for _ in range(2):
            denoiser(*inputs, encoder_hidden_states=text)
    assert {counts[name] for name in counts if "attn2" in name} == {2}
    with context.run():
        denoiser(*inputs, encoder_hidden_states=text)
        denoiser(*inputs, encoder_hidden_states=text)
    assert {counts[name] for name in counts if "attn2" in name} == {4}
    with torch.no_grad(), context.run():
        denoiser(*inputs, encoder_hidden_states=text)
        text.add_(1)  # changed in place: the same tensor, another text
        denoiser(*inputs, encoder_hidden_states=text)
    assert {counts[name] for name in counts if "attn2" in name} == {6}
