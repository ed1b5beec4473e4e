"""A training that is stopped and continued is the training that was never stopped."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from halftone.scenes.denoiser import spread_timesteps, weighted_loss
from halftone.scenes.training import (
    Average,
    adamw,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
    set_rate,
    warmed_cosine,
)


def _parts() -> tuple[nn.Module, torch.optim.Optimizer, Average]:
    torch.manual_seed(0)
    # names that do not sort in the order of definition
    module = nn.ModuleDict({"z": nn.Linear(3, 5), "a": nn.Linear(5, 2)})
    return module, adamw([(list(module.parameters()), 1e-2)], decay=0.01), Average(module, 0.9)


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, average: Average, seed: int) -> None:
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    set_rate(optimizer, warmed_cosine(seed / 10, 0.2))
    optimizer.zero_grad()
    layers = dict(module.named_children())
    layers["a"](layers["z"](batch).relu()).square().mean().backward()
    optimizer.step()
    average.update(module)


def _state(module: nn.Module, average: Average) -> dict[str, Tensor]:
    return {**module.state_dict(), **{f"average {k}": v for k, v in average.values.items()}}


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole = _parts()
    for seed in range(8):
        _step(*whole, seed)
        if seed == 3:
            module, optimizer, average = whole
            parts = {
                "module": module.state_dict(),
                "average": average.values,
                "optimizer": optimizer_tensors(optimizer),
            }
            save_checkpoint(tmp_path / "c.safetensors", parts, {"steps": average.step})
    module, optimizer, average = _parts()
    stored, facts = load_checkpoint(tmp_path / "c.safetensors")
    module.load_state_dict(stored["module"])
    load_optimizer(optimizer, stored["optimizer"])
    average.load(stored["average"], facts["steps"])
    for seed in range(4, 8):
        _step(module, optimizer, average, seed)
    expected, found = _state(whole[0], whole[2]), _state(module, average)
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_the_rate_warms_up_and_anneals_to_zero() -> None:
    assert warmed_cosine(0.01, 0.02) == pytest.approx(0.5)
    assert warmed_cosine(0.02, 0.02) == pytest.approx(1.0)
    assert warmed_cosine(1.0, 0.02) == pytest.approx(0.0)


def test_timesteps_are_spread_over_the_whole_schedule() -> None:
    found = spread_timesteps(50, torch.Generator().manual_seed(0)).sort().values
    assert torch.equal(found // 20, torch.arange(50))


def test_the_loss_weighs_noise_by_limited_signal_to_noise() -> None:
    alphas = torch.tensor([0.5, 0.99])  # SNR 1 and 99
    error = torch.ones(2, 4, 16, 16)
    loss = weighted_loss(error, torch.zeros_like(error), alphas, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((1 + 5 / 99) / 2)
