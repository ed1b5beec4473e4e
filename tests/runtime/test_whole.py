"""Simulated execution on whole numbers: what fake quantization computes, without its rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from halftone.attention import QuantizedAttnProcessor
from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind
from halftone.layers import QuantizedLayer, WeightCodes, fit_weight, nearest_codes
from halftone.policies import Range
from halftone.quantizers.affine import fit_affine, fit_non_negative
from halftone.runtime.whole import WholeLayer
from halftone.runtime.whole_attention import WholeAttnProcessor
from halftone.site_quantizer import Mode, SiteQuantizer


def quantizer(kind: SiteKind, context: CallContext, split: int | None = None) -> SiteQuantizer:
    """Two calls with parameters of their own; over halves of 10 channels where the site is split."""
    made = SiteQuantizer(Site("m", kind, "Linear", None, split), 8, 2, context)
    probable = kind is SiteKind.PROBABILITIES
    fitted = [fit_non_negative(0.5 + k, 8) if probable else fit_affine(-2.0 - k, 3.0, 8) for k in range(2)]
    scale = torch.stack([params.scale for params in fitted])
    zero_point = torch.stack([params.zero_point for params in fitted])
    if split is not None:
        factor = torch.ones(10)
        factor[split:] = 0.5
        scale, zero_point = scale[:, None] * factor, zero_point[:, None].expand(2, 10)
    made.set_parameters(scale, zero_point)
    made.mode = Mode.QUANTIZE
    return made


def pair(kind: str, split: int | None = None) -> tuple[QuantizedLayer, WholeLayer, Tensor, CallContext]:
    """A layer of both kinds, and an input for it."""
    generator = torch.Generator().manual_seed(1)
    context = CallContext()

    def layer() -> Any:
        return nn.Linear(10, 6) if kind == "linear" else nn.Conv2d(10, 6, 3, stride=2, padding=1, groups=1)

    one, other = layer(), layer()
    other.load_state_dict(one.state_dict())
    params = fit_weight(one.weight.detach(), 4, Range.MINMAX, split)
    weight: WeightCodes = nearest_codes(one.weight, params)
    axis = 1 if kind != "linear" else -1
    if split is not None and kind != "linear":
        pytest.skip("the parameters of this test lie along the last axis")
    slow = QuantizedLayer(one, quantizer(SiteKind.INPUT, context, split))
    slow.set_weight_codes(weight.codes, params)
    fast = WholeLayer(other, quantizer(SiteKind.INPUT, context, split), weight)
    shape = (3, 5, 10) if axis == -1 else (2, 10, 8, 8)
    return slow, fast, torch.randn(shape, generator=generator) * 2, context


@pytest.mark.parametrize(("kind", "split"), [("linear", None), ("linear", 4), ("conv", None)])
def test_a_layer_computes_what_fake_quantization_does(kind: str, split: int | None) -> None:
    slow, fast, x, context = pair(kind, split)
    seen = []
    for call in range(2):
        with context.at(call), torch.no_grad():
            wanted, found = slow(x), fast(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        seen.append(found)
    assert not torch.equal(*seen)


def test_sums_are_exact() -> None:
    """In float32 they give what float64 gives, and depend on no batch shape."""
    _, fast, x, context = pair("linear")
    with context.at(0), torch.no_grad():
        whole = fast(x)
        alone = torch.cat([fast(row[None]) for row in x])
        wide = fast(x.double())
    assert torch.equal(whole, alone)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(whole.double(), wide, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize(("kind", "split"), [("linear", 4), ("conv", None)])
def test_gradients_are_those_of_fake_quantization(kind: str, split: int | None) -> None:
    slow, fast, x, context = pair(kind, split)
    gradients = []
    for layer in (slow, fast):
        leaf = x.clone().requires_grad_()
        with context.at(1):
            layer(leaf).square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    assert gradients[0].abs().sum() > 0


def test_parameters_that_are_set_again_are_used() -> None:
    _, fast, x, context = pair("linear")
    assert fast.input is not None
    with context.at(0), torch.no_grad():
        before = fast(x)
        fast.input.set_parameters(fast.input.scale * 2, fast.input.zero_point)
        assert not torch.equal(fast(x), before)


def test_attention_computes_what_fake_quantization_does() -> None:
    context = CallContext()
    kinds = (SiteKind.QUERY, SiteKind.KEY, SiteKind.VALUE, SiteKind.PROBABILITIES)
    sites = [quantizer(kind, context) for kind in kinds]
    attn = Attention(query_dim=8, heads=2, dim_head=4)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 7, 4, generator=generator) for _ in range(3))
    mask = torch.zeros(2, 7, 7)
    mask[:, :, -1] = -1e4
    with context.at(1), torch.no_grad():
        wanted = QuantizedAttnProcessor(*sites).attend(attn, query, key, value, mask)
        found = WholeAttnProcessor(*sites).attend(attn, query, key, value, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
