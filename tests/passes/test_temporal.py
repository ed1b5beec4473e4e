"""The temporal block: what depends on the timestep alone, learned apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

from halftone.axes import Axes
from halftone.denoiser import SiteKind, sites
from halftone.errors import UserError
from halftone.passes.temporal import NAME, TemporalBlock
from halftone.policies import Rounding
from halftone.policies import TemporalBlock as Choice
from halftone.quantizers.bits import Bits
from halftone.settings import Budget, Reconstruction
from halftone.trajectory import Trajectory, denoiser_inputs
from reconstruction import reconstruct

SMOKE = Reconstruction(budget=Budget.SMOKE, batch_size=4)
APART = Axes(rounding=Rounding.ADAROUND, temporal_block=Choice.APART)


def seen_by_the_projections(denoiser: Any, trajectory: Trajectory, seed: int) -> list[torch.Tensor]:
    """Outputs of every time_emb_proj when the denoiser runs on random latents."""
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: found.append(output))
        for name, module in denoiser.named_modules()
        if name.endswith("time_emb_proj")
    ]
    given = denoiser_inputs(trajectory, 1)
    given["sample"] = torch.randn(given["sample"].shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        denoiser(**given)
    for hook in hooks:
        hook.remove()
    return found


def test_it_is_a_function_of_the_timestep_alone(tiny_pipeline: Any, trajectory: Trajectory) -> None:
    one, other = (seen_by_the_projections(tiny_pipeline.unet, trajectory, seed) for seed in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    block = TemporalBlock(tiny_pipeline.unet)
    data = block.data(tiny_pipeline.unet, trajectory)
    _, targets = data.batch([1])
    inside = {tuple(t[0].tolist()) for t in targets}
    assert len(one) == len(targets) == len(block.names) - 2
    assert inside == {tuple(t[0].tolist()) for t in one}


def test_its_layers_are_learned_first_and_nowhere_else(
    tiny_pipeline: Any, trajectory: Trajectory, tmp_path: Path
) -> None:
    denoiser = tiny_pipeline.unet
    modules = [s.module for s in sites(denoiser) if s.kind is SiteKind.WEIGHT and s.quantized]
    found = reconstruct(denoiser, trajectory, APART, Bits.parse("w4a8"), SMOKE, 0, tmp_path, modules)
    assert found.units[0].name == NAME
    assert [unit.name for unit in found.units].count(NAME) == 1
    assert not any("time_embedding" in unit.name for unit in found.units)
    assert found.weights.keys() == set(modules)
    assert found.units[0].ratio >= 1


def test_a_denoiser_without_one_is_refused() -> None:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    with pytest.raises(UserError, match="choose temporal_block joint"):
        TemporalBlock(transformer)
