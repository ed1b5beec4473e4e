"""Affine quantization against worked examples, float64 arithmetic, torch's own operators and torchao."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halftone.quantizers.affine import (
    AffineParams,
    dequantize,
    fake_quantize,
    fit_affine,
    fit_non_negative,
    fit_symmetric,
    quantize,
)

X = torch.tensor([-1.0, -0.4, 0.2, 0.9, 2.0])
modest = settings(max_examples=40, deadline=None, derandomize=True)
widths = st.integers(2, 16)
seeds = st.integers(0, 2**31)
magnitudes = st.floats(-3, 3).map(lambda e: 10**e)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "scale", "zero_point", "codes", "values"),
    [
        (4, 0.2, 5, [0, 3, 6, 9, 15], [-1, -0.4, 0.2, 0.8, 2]),
        (2, 1.0, 1, [0, 1, 1, 2, 3], [-1, 0, 0, 1, 2]),
        (3, 0.428571, 2, [0, 1, 2, 4, 7], [-0.857143, -0.428571, 0, 0.857143, 2.142857]),
    ],
)
def test_worked_examples(bits, scale, zero_point, codes, values):
    params = fit_affine(X.min(), X.max(), bits)
    assert params.scale.item() == pytest.approx(scale, abs=1e-6)
    assert params.zero_point.item() == zero_point
    assert quantize(X, params).tolist() == codes
    assert dequantize(quantize(X, params), params).tolist() == pytest.approx(values, abs=1e-6)
    assert fake_quantize(X, params).tolist() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    ("include_zero", "scale", "zero_point", "values"),
    [(True, 1, 0, [2, 2, 3]), (False, 1 / 3, -6, [2, 8 / 3, 3])],
)
def test_zero_in_the_range_is_a_choice(include_zero, scale, zero_point, values):
    x = torch.tensor([2.0, 2.5, 3.0])
    params = fit_affine(x.min(), x.max(), 2, include_zero=include_zero)
    assert params.scale.item() == pytest.approx(scale, abs=1e-6)
    assert params.zero_point.item() == zero_point
    assert fake_quantize(x, params).tolist() == pytest.approx(values, abs=1e-6)


def test_zero_point_of_a_tie_rounds_half_to_even():
    # -lo / scale is 7.5 exactly; the float32 scale would make it 7.4999995
    assert fit_affine(-2.0, 2.0, 4, include_zero=False).zero_point.item() == 8
    assert fit_affine(8.0, 12.0, 4, include_zero=False).zero_point.item() == -30


def test_ranges_per_group_keep_what_a_shared_range_loses():
    x = torch.tensor([[1.0, 1, 10, -1], [0, 2, 8, -2], [-1, 1, 12, -1]])
    layer = fit_affine(x.min(), x.max(), 4)
    assert layer.scale.item() == pytest.approx(0.933333, abs=1e-6)
    assert (fake_quantize(x, layer) - x).square().mean().item() == pytest.approx(0.0259259, abs=1e-6)
    lo, hi = torch.tensor([[-2.0, -2, 8, -2]]), torch.tensor([[2.0, 2, 12, 2]])
    grouped = fit_affine(lo, hi, 4, include_zero=False)
    assert (fake_quantize(x, grouped) - x).square().mean().item() == pytest.approx(0.0066667, abs=1e-6)


def test_shortcut_split_saves_the_small_half():
    x = torch.tensor([0.1, -0.2, 0.3, 8, -6, 4])
    whole = fake_quantize(x, fit_affine(x.min(), x.max(), 4))
    assert whole.tolist() == pytest.approx([0, 0, 0, 8.4, -5.6, 3.733333], abs=1e-5)
    lo = torch.tensor([-0.2, -6]).repeat_interleave(3)
    hi = torch.tensor([0.3, 8]).repeat_interleave(3)
    split = fit_affine(lo, hi, 4)
    assert split.scale[0].item() == pytest.approx(0.0333333, abs=1e-6)
    assert split.zero_point[0].item() == 6
    assert fake_quantize(x, split).tolist() == pytest.approx([0.1, -0.2, 0.3, 8.4, -5.6, 3.733333], abs=1e-5)


def test_symmetric_is_signed_without_zero_point():
    params = fit_symmetric(torch.tensor(7.0), 4)
    assert (params.low, params.high, params.scale.item(), params.zero_point.item()) == (-8, 7, 1.0, 0.0)
    assert quantize(torch.tensor([-9.0, -7.0, 0.4, 6.6, 9.0]), params).tolist() == [-8, -7, 0, 7, 7]


def test_non_negative_spends_no_code_below_zero():
    attention = torch.tensor([[0.9, 0.06, 0.03, 0.01], [0.2, 0.4, 0.3, 0.1]])
    params = fit_non_negative(attention.max(), 2)
    assert params.zero_point.item() == 0
    expected = torch.tensor([[0.9, 0, 0, 0], [0.3, 0.3, 0.3, 0]])
    torch.testing.assert_close(fake_quantize(attention, params), expected)


@modest
@given(seeds, widths, magnitudes, st.floats(-3, 3), st.booleans())
def test_values_in_the_range_come_back_within_half_a_scale(seed, bits, magnitude, shift, include_zero):
    x = (normal(seed, 257) + shift) * magnitude
    params = fit_affine(x.min(), x.max(), bits, include_zero=include_zero)
    error = (dequantize(quantize(x, params), params).double() - x.double()).abs().max().item()
    rounding = 4 * 2.0**-24 * x.abs().max().item()
    assert error <= params.scale.item() * 0.5 * (1 + 1e-5) + rounding


@modest
@given(seeds, widths, magnitudes, st.floats(-3, 3))
def test_codes_agree_with_float64_up_to_ties(seed, bits, magnitude, shift):
    x = (normal(seed, 4096) + shift) * magnitude
    params = fit_affine(x.min(), x.max(), bits)
    # any x / scale so close to a half that float32 cannot tell the side is a tie
    exact = x.double().numpy() / params.scale.double().item()
    reference = np.clip(np.rint(exact) + params.zero_point.item(), 0, 2**bits - 1)
    codes = quantize(x, params).numpy()
    tie = np.abs(exact - np.floor(exact) - 0.5) < 2.0**-22 * np.maximum(1, np.abs(exact))
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    np.testing.assert_array_equal(codes[~tie], reference[~tie])
    assert np.abs(codes - reference).max() <= 1


@modest
@given(seeds, widths, magnitudes, st.booleans(), st.booleans())
def test_fake_quantize_is_quantize_then_dequantize(seed, bits, magnitude, per_channel, signed):
    x = (normal(seed, 3, 5, 7) + 0.3) * magnitude
    lo, hi = (
        (x.amin((0, 2), keepdim=True), x.amax((0, 2), keepdim=True)) if per_channel else (x.min(), x.max())
    )
    params = fit_symmetric(torch.maximum(-lo, hi), bits) if signed else fit_affine(lo * 0.9, hi * 0.9, bits)
    expected = dequantize(quantize(x, params), params)
    assert torch.equal(fake_quantize(x, params), expected)
    assert torch.equal(fake_quantize(x.clone().requires_grad_(), params).detach(), expected)
    assert torch.equal(fake_quantize(fake_quantize(x, params), params), expected)


@modest
@given(seeds, st.integers(2, 8), magnitudes)
def test_torch_agrees_but_for_ties(seed, bits, magnitude):
    x = normal(seed, 20_000) * magnitude
    params = fit_affine(x.min() * 0.8, x.max() * 0.8, bits)
    theirs = torch.fake_quantize_per_tensor_affine(
        x, params.scale, params.zero_point.to(torch.int32), params.low, params.high
    )
    # torch multiplies by the reciprocal, which moves codes at ties by one
    moved = (fake_quantize(x, params) - theirs).abs() > params.scale * 0.5
    assert moved.float().mean().item() <= 1e-4
    assert (fake_quantize(x, params) - theirs).abs().max().item() <= params.scale.item() * 1.001


def test_torch_agrees_per_channel():
    x = normal(3, 16, 4, 3, 3)
    lo, hi = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    params = fit_affine(lo, hi, 4)
    theirs = torch.fake_quantize_per_channel_affine(
        x, params.scale.flatten(), params.zero_point.flatten().to(torch.int32), 0, 0, 15
    )
    torch.testing.assert_close(fake_quantize(x, params), theirs)


def test_torchao_agrees():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = normal(4, 8, 64)
    lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    params = fit_affine(lo, hi, 4)
    scale, zero_point = primitives.choose_qparams_affine_with_min_max(
        lo, hi, primitives.MappingType.ASYMMETRIC, [1, 64], torch.uint8, 0, 15, eps=1e-8
    )
    torch.testing.assert_close(params.scale.flatten(), scale.flatten().float())
    assert params.zero_point.flatten().tolist() == zero_point.flatten().tolist()
    arguments = (
        x,
        (1, 64),
        params.scale.flatten(),
        params.zero_point.flatten().to(torch.int32),
        torch.uint8,
        0,
        15,
    )
    codes = primitives.quantize_affine(*arguments)
    assert (codes.int() != quantize(x, params)).float().mean().item() <= 1e-4
    values = primitives.dequantize_affine(codes, *arguments[1:4], torch.uint8, 0, 15)
    torch.testing.assert_close(dequantize(codes, params), values)


def test_a_division_not_a_reciprocal_decides_ties():
    found = 0
    for k in range(1, 200):
        scale = torch.tensor(1.0) / k
        x = scale * 2.5
        params = AffineParams(scale, torch.tensor(0.0), 8)
        expected = int(np.rint(np.float32(x.item()) / np.float32(scale.item())))
        assert quantize(x, params).item() == expected
        found += expected != int(np.rint(np.float32(x.item()) * (np.float32(1) / np.float32(scale.item()))))
    assert found > 0


def test_gradient_passes_where_the_code_is_inside():
    x = torch.tensor([-1.4, -0.6, -0.5, 0.2, 2.0, 2.4, 3.0], requires_grad=True)
    params = AffineParams(torch.tensor(1.0), torch.tensor(1.0), 2)
    upstream = torch.arange(1.0, 8.0)
    fake_quantize(x, params).backward(upstream)
    assert x.grad is not None
    theirs = x.detach().clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(theirs, 1.0, 1, 0, 3).backward(upstream)
    assert theirs.grad is not None
    assert x.grad.tolist() == theirs.grad.tolist() == [1, 2, 3, 4, 5, 6, 0]


def test_scale_learns_when_asked():
    x = torch.tensor([0.3, 5.0])
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, AffineParams(scale, torch.tensor(0.0), 2)).sum().backward()
    # inside: rounded minus exact steps (0 - 0.3); clamped: the code itself (3)
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(2.7)


def test_error_falls_with_bits():
    x = normal(5, 4096)
    errors = [
        (fake_quantize(x, fit_affine(x.min(), x.max(), bits)) - x).square().mean().item()
        for bits in range(2, 17)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert fine < coarse / 2.5
    assert errors[8 - 2] == pytest.approx(((x.max() - x.min()).item() / 255) ** 2 / 12, rel=0.1)


@pytest.mark.parametrize("include_zero", [True, False])
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1000.1, -1e-12, 3e38])
def test_constant_tensors_survive(value, bits, include_zero):
    x = torch.full((5,), value)
    params = fit_affine(x.min(), x.max(), bits, include_zero=include_zero)
    assert params.scale.item() > 0
    assert math.isfinite(params.zero_point.item())
    assert fake_quantize(x, params).tolist() == pytest.approx(x.tolist(), rel=3e-7, abs=1e-8)


def test_one_element_and_no_axes():
    x = torch.tensor(0.7)
    assert fake_quantize(x, fit_affine(x, x, 8)).item() == pytest.approx(0.7)
    assert fake_quantize(x, fit_affine(x, x, 8)).shape == ()


def test_half_precision_keeps_its_dtype_and_is_computed_in_float32():
    x = normal(6, 1000)
    for dtype in (torch.float16, torch.bfloat16):
        params = fit_affine(-3.0, 3.0, 8)
        half = fake_quantize(x.to(dtype), params)
        assert half.dtype == dtype
        assert torch.equal(half, fake_quantize(x.to(dtype).float(), params).to(dtype))


def test_infinities_saturate_and_nan_is_not_hidden():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    for scale in (torch.tensor(1.0), torch.ones(3)):
        params = AffineParams(scale, torch.zeros_like(scale), 4)
        assert fake_quantize(x, params)[:2].tolist() == [15, 0]
        assert fake_quantize(x, params)[2].isnan()


@pytest.mark.parametrize("bits", [1, 17, 0, -4, 4.0])
def test_widths_outside_are_refused(bits):
    for fit in (
        lambda: fit_affine(0.0, 1.0, bits),
        lambda: fit_symmetric(1.0, bits),
        lambda: fit_non_negative(1.0, bits),
    ):
        with pytest.raises(ValueError, match="bits"):
            fit()


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_ranges_that_are_not_finite_are_refused(fault):
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_affine(0.0, fault, 8)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_symmetric(torch.tensor([1.0, fault]), 8)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_non_negative(fault, 8)


def test_ranges_upside_down_are_refused():
    with pytest.raises(ValueError, match="lo lies above hi"):
        fit_affine(1.0, -1.0, 8)
    with pytest.raises(ValueError, match="negative"):
        fit_non_negative(-0.1, 8)
