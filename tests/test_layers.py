"""Wrapped denoisers: silent when off, exact when on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from halftone.attention import QuantizedAttnProcessor, install
from halftone.axes import Axes
from halftone.denoiser import CallContext, Site, SiteKind, blocks, modules_in_order, sites
from halftone.errors import UserError
from halftone.layers import QuantizedLayer, fit_weight, nearest_codes, quantized_layers, set_weights, wrap
from halftone.passes.weights import quantize_weights
from halftone.policies import Range
from halftone.quantizers.affine import AffineParams, dequantize, fake_quantize, fit_affine
from halftone.quantizers.bits import Bits
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode

INPUT = Site("layer", SiteKind.INPUT, "Linear")


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([501, 1]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "return_dict": False,
    }


def wrapped(denoiser: nn.Module, bits: str = "w8a8", n_calls: int = 1) -> dict[str, SiteQuantizer]:
    return wrap(denoiser, sites(denoiser), Bits.parse(bits), n_calls, CallContext())


@torch.no_grad()
def output(denoiser: nn.Module) -> torch.Tensor:
    return denoiser(**inputs())[0]


def test_off_a_wrapped_denoiser_is_the_plain_one(tiny_pipeline: Any) -> None:
    denoiser = copy.deepcopy(tiny_pipeline.unet)
    denoiser.set_attn_processor(AttnProcessor2_0())
    fused = output(denoiser)
    denoiser.set_attn_processor(AttnProcessor())
    plain = output(denoiser)
    quantizers = wrapped(denoiser)
    assert torch.equal(output(denoiser), plain)
    assert torch.allclose(output(denoiser), fused, atol=1e-5)
    assert len(quantizers) == sum(s.quantized and s.kind is not SiteKind.WEIGHT for s in sites(denoiser))


def test_off_an_unconditional_denoiser_is_the_plain_one(tiny_unconditional: Any) -> None:
    given = {"sample": torch.randn(2, 3, 8, 8), "timestep": 3}
    for module in tiny_unconditional.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    with torch.no_grad():
        plain = tiny_unconditional(**given).sample
        wrapped(tiny_unconditional)
        assert torch.equal(tiny_unconditional(**given).sample, plain)


@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_attention_masks_and_query_norms(norm: str | None) -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8, qk_norm=norm).eval()
    mask = torch.zeros(3, 1, 5)
    mask[:, :, 3:] = -10000.0
    given = (torch.randn(3, 4, 16), torch.randn(3, 5, 12), mask)
    with torch.no_grad():
        expected = attention(*given)
        install(attention, QuantizedAttnProcessor())
        assert torch.allclose(attention(*given), expected, atol=1e-6)


def test_wrapping_keeps_sites_blocks_and_names(tiny_pipeline: Any) -> None:
    denoiser = copy.deepcopy(tiny_pipeline.unet)
    before = sites(denoiser), blocks(denoiser), [name for name, _ in modules_in_order(denoiser)]
    quantizers = wrapped(denoiser)
    after = [name for name, _ in modules_in_order(denoiser) if ".processor" not in name]
    assert (sites(denoiser), blocks(denoiser), after) == before
    assert isinstance(denoiser.get_submodule("conv_in"), nn.Conv2d)
    assert isinstance(denoiser.get_submodule("down_blocks.0.resnets.0.conv1"), QuantizedLayer)
    assert (
        denoiser.get_submodule("down_blocks.0.resnets.0.conv1.input")
        is quantizers["down_blocks.0.resnets.0.conv1.input"]
    )
    with pytest.raises(ValueError, match="wrapped already"):
        wrapped(denoiser)


def test_another_attention_processor_is_refused(fresh_pipeline: Any) -> None:
    wrapped(fresh_pipeline.unet)
    with pytest.raises(UserError, match="SlicedAttnProcessor cannot replace"):
        fresh_pipeline.enable_attention_slicing(1)
    with pytest.raises(UserError, match="AttnProcessor2_0"):
        fresh_pipeline.unet.set_attn_processor(AttnProcessor2_0())


def test_the_replaced_processor_can_be_put_back() -> None:
    attention = Attention(query_dim=16, heads=2, dim_head=8)
    before = attention.processor
    install(attention, QuantizedAttnProcessor())
    twin = copy.deepcopy(attention)
    attention.set_processor(before)
    assert attention.processor is before
    attention.set_processor(AttnProcessor())
    with pytest.raises(UserError):
        twin.set_processor(before)  # a copy has a copy of it


def test_half_precision_runs_with_float32_parameters(tiny_pipeline: Any) -> None:
    denoiser = copy.deepcopy(tiny_pipeline.unet).bfloat16()
    quantizers = wrapped(denoiser)
    for quantizer in quantizers.values():
        quantizer.set_call(0, fit_affine(-8.0, 8.0, 8))
    set_mode(quantizers, Mode.QUANTIZE)
    given = {k: v.bfloat16() if k != "timestep" and k != "return_dict" else v for k, v in inputs().items()}
    with torch.no_grad():
        found = denoiser(**given)[0]
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_a_copy_has_its_own_context(tiny_pipeline: Any) -> None:
    denoiser = copy.deepcopy(tiny_pipeline.unet)
    context = CallContext()
    wrap(denoiser, sites(denoiser), Bits(8, 8, 8), 2, context)
    context.attach(denoiser)
    twin = copy.deepcopy(denoiser)
    output(twin)
    assert context.index == 0
    quantizer = twin.get_submodule("mid_block.resnets.0.conv1.input")
    assert isinstance(quantizer, SiteQuantizer)
    assert quantizer.context.index == 1


# --- one site


def quantizer_with(params: list[AffineParams], bits: int = 8) -> SiteQuantizer:
    quantizer = SiteQuantizer(INPUT, bits, len(params), CallContext())
    for call, one in enumerate(params):
        quantizer.set_call(call, one)
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def test_every_call_has_its_parameters() -> None:
    x = torch.randn(4, 9, 16) * 3
    params = [fit_affine(-1.0, 2.0, 8), fit_affine(-7.0, 0.0, 8), fit_affine(0.0, 9.0, 8)]
    quantizer = quantizer_with(params)
    for call in (2, 0, 1):
        with quantizer.context.at(call):
            assert torch.equal(quantizer(x), fake_quantize(x, params[call]))
    shared = quantizer_with(params[:1])
    with shared.context.at(5):
        assert torch.equal(shared(x), fake_quantize(x, params[0]))


def test_parameters_that_are_not_per_tensor_broadcast() -> None:
    x = torch.randn(4, 9, 16)
    spread = torch.linspace(0.5, 2, 16).reshape(1, 1, 16)
    params = fit_affine(-spread, spread, 4)
    quantizer = quantizer_with([params], bits=4)
    assert torch.equal(quantizer(x), fake_quantize(x, params))


def test_a_cast_leaves_the_parameters_in_float32() -> None:
    params = fit_affine(-1.0, 2.001, 8)
    quantizer = quantizer_with([params]).half()
    assert quantizer.scale.dtype == torch.float32
    assert quantizer.scale.item() == params.scale.item()
    x = torch.randn(50).half()
    assert torch.equal(quantizer(x), fake_quantize(x, params))


def test_gradients_pass_inside_the_range_only() -> None:
    quantizer = quantizer_with([fit_affine(-1.0, 1.0, 4)], bits=4)
    x = torch.tensor([-3.0, 0.25, 3.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_quantizing_or_observing_unprepared_fails() -> None:
    quantizer = SiteQuantizer(INPUT, 8, 2, CallContext())
    quantizer.set_call(0, fit_affine(-1.0, 1.0, 8))
    quantizer.mode = Mode.QUANTIZE
    with pytest.raises(RuntimeError, match=r"layer\.input"):
        quantizer(torch.zeros(3))
    quantizer.mode = Mode.OBSERVE
    with pytest.raises(RuntimeError, match="no observer"):
        quantizer(torch.zeros(3))
    with pytest.raises(ValueError, match="2 calls"):
        quantizer.set_parameters(torch.ones(3), torch.zeros(3))


def test_probabilities_have_their_own_width(tiny_pipeline: Any) -> None:
    quantizers = wrapped(copy.deepcopy(tiny_pipeline.unet), "w4a8s6")
    widths = {(q.site.kind, q.bits) for q in quantizers.values()}
    assert (SiteKind.PROBABILITIES, 6) in widths
    assert {bits for kind, bits in widths if kind is not SiteKind.PROBABILITIES} == {8}
    assert all(q.non_negative == (q.site.kind is SiteKind.PROBABILITIES) for q in quantizers.values())


# --- weights


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 5, 3, padding=1, stride=2)])
def test_a_layer_computes_with_the_weight_of_its_codes(layer: Any) -> None:
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 7, 7)
    full = layer.weight.detach().clone()
    params = fit_weight(full, 4, Range.MINMAX)
    assert params.scale.shape == (5,) + (1,) * (full.ndim - 1)
    codes = nearest_codes(full, params)
    assert codes.codes.dtype == torch.uint8
    expected = copy.deepcopy(layer)
    expected.weight.data = dequantize(codes.codes, params)
    plain = layer(x)

    wrapped_layer = QuantizedLayer(layer, None)
    wrapped_layer.set_weight_codes(codes.codes, params, keep_full_precision=True)
    assert torch.equal(wrapped_layer(x), expected(x))
    wrapped_layer.use_full_precision(True)
    assert torch.equal(wrapped_layer(x), plain)
    wrapped_layer.use_full_precision(False)
    assert torch.equal(wrapped_layer(x), expected(x))
    wrapped_layer.set_weight_codes(codes.codes, params)
    assert wrapped_layer.full_precision_weight is None
    assert not wrapped_layer.weight.requires_grad
    with pytest.raises(ValueError, match="codes of shape"):
        wrapped_layer.set_weight_codes(codes.codes[:2], params)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 5, 3, padding=1)])
def test_a_soft_weight_receives_gradients(layer: Any) -> None:
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 7, 7)
    soft = layer.weight.detach().clone().requires_grad_()
    wrapped_layer = QuantizedLayer(layer, None)
    plain = wrapped_layer(x)
    wrapped_layer.soft_weight = lambda: soft * 2
    wrapped_layer(x).square().sum().backward()
    assert soft.grad is not None
    assert soft.grad.abs().sum() > 0
    wrapped_layer.soft_weight = None
    assert torch.equal(wrapped_layer(x), plain)


def test_nearest_weights_of_a_whole_denoiser(tiny_pipeline: Any) -> None:
    denoiser = copy.deepcopy(tiny_pipeline.unet)
    plain = output(denoiser)
    found = sites(denoiser)
    wrap(denoiser, found, Bits(4, 8, 8), 1, CallContext())
    errors = []
    for bits in (4, 8, 16):
        twin = copy.deepcopy(denoiser)
        weights = quantize_weights(twin, found, Axes(), Bits.parse(f"w{bits}a8"))
        assert weights.keys() == quantized_layers(twin).keys()
        set_weights(twin, weights, Bits.parse(f"w{bits}a8"))
        errors.append((output(twin) - plain).abs().max().item())
    assert errors[0] > 3 * errors[1] > 3 * errors[2]
    assert errors[2] < 1e-3


def test_a_searched_weight_range_rounds_better_than_min_max() -> None:
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    errors = []
    for weight_range in (Range.MINMAX, Range.LP):
        params = fit_weight(weight, 3, weight_range)
        codes = nearest_codes(weight, params).codes
        errors.append((dequantize(codes, params) - weight).square().mean(1))
    assert (errors[1] < errors[0]).all()


def test_weight_ranges_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="choose minmax or lp"):
        fit_weight(torch.ones(2, 2), 4, Range.MOVING_AVERAGE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(tiny_pipeline: Any, value: float) -> None:
    denoiser = copy.deepcopy(tiny_pipeline.unet)
    denoiser.mid_block.resnets[1].conv2.weight.data[3, 2, 1, 0] = value
    with pytest.raises(UserError, match=r"mid_block\.resnets\.1\.conv2\.weight: 1 of"):
        quantize_weights(denoiser, sites(denoiser), Axes(), Bits(8, 8, 8))


def test_set_mode_takes_a_mapping_or_a_list() -> None:
    quantizer = SiteQuantizer(INPUT, 8, 1, CallContext())
    set_mode({"layer.input": quantizer}, Mode.QUANTIZE)
    assert quantizer.mode is Mode.QUANTIZE
    set_mode([quantizer], Mode.OFF)
    assert quantizer.mode is Mode.OFF
