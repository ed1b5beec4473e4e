"""Log2 quantization against worked examples and logarithms in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halftone.quantizers.log2 import (
    Log2Params,
    dequantize_log2,
    fake_quantize_log2,
    fit_log2,
    quantize_log2,
)

X = torch.tensor([1, 0.75, 0.7, 0.5, 0.3, 0.25, 0.1, 0.01, 0])
modest = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("bits", "codes", "tail"),
    [
        (2, [0, 0, 1, 1, 2, 2, 3, 3, 3], [0.125, 0.125]),
        (3, [0, 0, 1, 1, 2, 2, 3, 7, 7], [0.0078125, 0.0078125]),
        (4, [0, 0, 1, 1, 2, 2, 3, 7, 15], [0.0078125, 3.0517578e-05]),
        (8, [0, 0, 1, 1, 2, 2, 3, 7, 255], [0.0078125, 0]),
    ],
)
def test_worked_examples(bits, codes, tail):
    params = fit_log2(1.0, bits)
    assert quantize_log2(X, params).tolist() == codes
    expected = [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, *tail]
    assert fake_quantize_log2(X, params).tolist() == pytest.approx(expected, abs=1e-9)


def test_attention_without_its_start_column():
    attention = torch.tensor([[0.9, 0.06, 0.03, 0.01], [0.2, 0.4, 0.3, 0.1]])
    rest = attention[:, 1:]
    params = fit_log2(rest.max(), 2)
    assert params.scale.item() == pytest.approx(0.4)
    assert quantize_log2(rest, params).tolist() == [[3, 3, 3], [0, 0, 2]]
    quantized = torch.cat([attention[:, :1], fake_quantize_log2(rest, params)], dim=1)
    value = torch.tensor([1.0, 2, 3, 4])
    assert (attention @ value).tolist() == pytest.approx([1.15, 2.3])
    assert (quantized @ value).tolist() == pytest.approx([1.35, 2.6])
    assert fake_quantize_log2(rest, fit_log2(rest.max(), 3))[0].tolist() == pytest.approx(
        [0.05, 0.025, 0.0125]
    )


@modest
@given(st.integers(0, 2**31), st.integers(2, 16), st.floats(1e-3, 1e3))
def test_codes_agree_with_logarithms_in_float64(seed, bits, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.exp(-20 * torch.rand(4096, generator=generator)) * scale * 1.5
    params = fit_log2(scale, bits)
    # the ratio is formed in float32; from there on the codes are exact
    ratio = (x / params.scale).double().numpy()
    reference = np.clip(np.rint(-np.log2(ratio)), 0, 2**bits - 1)
    np.testing.assert_array_equal(quantize_log2(x, params).numpy(), reference)


def test_neighbours_of_the_square_root_fall_on_their_sides():
    root = np.float32(math.sqrt(0.5))
    for octave in (0, 5, 60, 120):
        near = [np.nextafter(root, np.float32(0)), root, np.nextafter(root, np.float32(1))]
        x = torch.tensor(near) * 2.0**-octave
        reference = np.rint(-np.log2(x.double().numpy()))
        assert quantize_log2(x, fit_log2(1.0, 8)).tolist() == reference.tolist()
        assert len(set(reference)) == 2


@modest
@given(st.integers(0, 2**31), st.integers(2, 16), st.floats(1e-3, 1e3))
def test_fake_quantize_is_quantize_then_dequantize(seed, bits, scale):
    x = torch.exp(-110 * torch.rand(512, generator=torch.Generator().manual_seed(seed))) * scale * 2
    x[0], x[1] = 0, -1
    params = fit_log2(scale, bits)
    expected = dequantize_log2(quantize_log2(x, params), params)
    assert torch.equal(fake_quantize_log2(x, params), expected)
    assert torch.equal(fake_quantize_log2(x.clone().requires_grad_(), params).detach(), expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_relative_error_does_not_fall_with_bits(bits):
    params = fit_log2(0.8, bits)
    x = torch.linspace(0.8 * 2.0**-15, 0.8, 50_000)
    relative = fake_quantize_log2(x, params) / x - 1
    assert relative.max().item() == pytest.approx(math.sqrt(2) - 1, abs=1e-3)
    assert relative.min().item() == pytest.approx(1 / math.sqrt(2) - 1, abs=1e-3)


def test_scales_broadcast():
    x = torch.tensor([[0.5, 0.25], [8.0, 4.0]])
    params = Log2Params(torch.tensor([[0.5], [8.0]]), 4)
    assert quantize_log2(x, params).tolist() == [[0, 1], [0, 1]]
    assert torch.equal(fake_quantize_log2(x, params), x)


def test_all_zeros_and_a_single_element():
    zeros = torch.zeros(3)
    assert fake_quantize_log2(zeros, fit_log2(zeros.max(), 4)).tolist() == pytest.approx([0, 0, 0], abs=1e-8)
    assert fake_quantize_log2(torch.tensor(0.3), fit_log2(0.3, 4)).item() == pytest.approx(0.3)


def test_gradient_passes_where_the_code_is_inside():
    x = torch.tensor([1.6, 1.2, 0.5, 0.12, 0.08, 0.0], requires_grad=True)
    fake_quantize_log2(x, fit_log2(1.0, 2)).backward(torch.arange(1.0, 7.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 0, 0]


def test_nan_is_not_hidden():
    assert fake_quantize_log2(torch.tensor([math.nan, 0.5]), fit_log2(1.0, 4)).isnan().tolist() == [
        True,
        False,
    ]


def test_half_precision_keeps_its_dtype():
    assert (
        fake_quantize_log2(torch.tensor([0.3], dtype=torch.bfloat16), fit_log2(1.0, 4)).dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("fault", [math.nan, math.inf, -1.0])
def test_bad_scales_are_refused(fault):
    with pytest.raises(ValueError, match="negative, NaN or infinite"):
        fit_log2(fault, 4)
    with pytest.raises(ValueError, match="bits"):
        fit_log2(1.0, 1)
