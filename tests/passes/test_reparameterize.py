"""Factors of TCR and of SmoothQuant, from largest magnitudes; with the published formulae by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.folding import Shared
from halftone.passes.reparameterize import factors_of, grouped, smooth_factors, tcr_factors
from halftone.policies import Reparameterization, ReparameterizedLayers

SMALL = torch.tensor([[1.0, 4.0], [2.0, 2.0]])
LARGE = torch.tensor([[1.0, 4.0, 0.5], [2.0, 2.0, 8.0]])


def test_a_mean_over_calls_weighted_by_the_channels_range() -> None:
    found = tcr_factors(SMALL)
    assert torch.allclose(found, torch.tensor([1.0, 3.0]), atol=1e-6)
    balanced = SMALL / found
    assert torch.allclose(balanced, torch.tensor([[1.0, 4 / 3], [2.0, 2 / 3]]), atol=1e-6)
    ratios = balanced.amax(1) / balanced.amin(1)  # from 4 and 1: some calls get worse
    assert torch.allclose(ratios, torch.tensor([4 / 3, 3.0]), atol=1e-6)
    assert torch.allclose(balanced.amax(0), torch.tensor([2.0, 4 / 3]), atol=1e-6)


def test_the_largest_are_truncated() -> None:
    wanted = torch.tensor([1.333333, 5.666667, 3.823529])
    assert torch.allclose(tcr_factors(LARGE), wanted, atol=1e-6)
    assert torch.allclose(tcr_factors(LARGE, limit=5.0), wanted.clamp(max=5), atol=1e-6)


def test_the_closed_form_is_the_same() -> None:
    maxima = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) + 0.1
    closed = (maxima.square() / maxima.amin(1, keepdim=True)).sum(0) / maxima.sum(0)
    assert torch.allclose(tcr_factors(maxima, limit=1000.0), closed, rtol=1e-5)


def test_the_weight_takes_what_the_activation_gives() -> None:
    weight, x, r = (torch.tensor(v) for v in ([[1.0, -2], [0.5, 3]], [[1, 0.5], [-4.0, 2]], [1.0, 3.0]))
    product = (weight * r) @ (x / r[:, None])
    assert torch.allclose(product, torch.tensor([[9, -3.5], [-11.5, 6.25]]), atol=1e-6)
    assert torch.allclose(product, weight @ x, atol=1e-6)


def test_one_call_comes_out_even_and_scale_does_not_matter() -> None:
    maxima = torch.tensor([[0.5, 2.0, 3.0]])
    found = tcr_factors(maxima)
    assert torch.allclose(found, torch.tensor([1.0, 4.0, 6.0]), atol=1e-6)
    assert torch.allclose(maxima / found, torch.full((1, 3), 0.5), atol=1e-6)
    assert torch.allclose(tcr_factors(1e4 * LARGE), tcr_factors(LARGE), atol=1e-6)


def test_a_factor_is_at_least_one_and_one_for_the_quietest() -> None:
    maxima = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    maxima[:, 3] = 0.1
    found = tcr_factors(maxima)
    assert bool((found >= 1).all())
    assert float(found[3]) == 1.0


def test_a_dead_channel_does_not_take_the_others_to_the_limit_where_a_quantile_is_asked_for() -> None:
    maxima = torch.cat(
        [torch.rand(4, 19, generator=torch.Generator().manual_seed(2)) + 1, torch.zeros(4, 1)], 1
    )
    quietest = tcr_factors(maxima)
    assert bool((quietest[:19] == 10).all())
    guarded = tcr_factors(maxima, floor=0.1)
    assert bool((guarded < 2.1).all())
    assert float(guarded[19]) == 1.0
    assert torch.equal(tcr_factors(torch.zeros(2, 3)), torch.ones(3))


def test_groups_of_calls_are_uniform_and_keep_the_largest() -> None:
    maxima = torch.tensor([[1.0, 5], [2, 4], [3, 3], [4, 2], [5, 1]])
    assert grouped(maxima, 2).tolist() == [[3.0, 5.0], [5.0, 2.0]]
    assert torch.equal(grouped(maxima, None), maxima)
    assert torch.equal(grouped(maxima, 9), maxima)


def test_smooth_shares_the_range_out() -> None:
    maxima, weights = torch.tensor([[4.0, 1.0], [2.0, 1.0]]), torch.tensor([0.25, 1.0])
    assert torch.allclose(smooth_factors(maxima, weights, 0.5), torch.tensor([4.0, 1.0]), atol=1e-6)
    assert torch.allclose(smooth_factors(maxima, weights, 1.0), torch.tensor([4.0, 1.0]), atol=1e-6)
    assert torch.allclose(smooth_factors(maxima, weights, 0.0), torch.tensor([4.0, 1.0]), atol=1e-6)
    assert torch.allclose(smooth_factors(maxima, torch.ones(2), 0.5), torch.tensor([2.0, 1.0]), atol=1e-6)
    assert torch.allclose(smooth_factors(maxima, torch.ones(2), 0.5, limit=1.5), torch.tensor([1.5, 1.0]))


@pytest.mark.parametrize("how", [Reparameterization.TCR, Reparameterization.SMOOTH])
def test_layers_with_one_input_share_factors_that_float16_holds(how: Reparameterization) -> None:
    denoiser = nn.ModuleDict({"q": nn.Linear(3, 2), "k": nn.Linear(3, 4)})
    axes = Axes(reparameterization=how, reparameterization_layers=ReparameterizedLayers.ALL)
    seen: dict[str, Tensor] = {"q": LARGE}
    found = factors_of(denoiser, [Shared(("q", "k"), "norm")], seen, axes)
    assert torch.equal(found["q"], found["k"])
    assert torch.equal(found["q"].half().float(), found["q"])
    assert found["q"].dtype is torch.float32
