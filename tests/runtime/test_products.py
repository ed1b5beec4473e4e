"""Integer products: the reference against float64 of the dequantized operands, int8 against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from halftone.errors import UserError
from halftone.quantizers.affine import AffineParams, dequantize, fit_affine, quantize
from halftone.runtime import int8
from halftone.runtime.operands import Affine, Geometry, Weight, encode, geometry_of, whole
from halftone.runtime.reference import ReferenceProduct, batched

EXACT_FLOAT32 = 2**24


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Affine, Weight, Geometry | None]:
    """Random codes of a Linear or Conv2d, full range with extremes made likely."""
    weight_bits, bits = draw(st.integers(2, 8)), draw(st.integers(2, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    inputs, out = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 9))
    size = draw(st.sampled_from([1, 3]))
    how = draw(
        st.none()
        | st.builds(
            Geometry,
            st.sampled_from([(1, 1), (2, 2), (2, 1)]),
            st.sampled_from([(0, 0), (1, 1), (2, 1)]),
            st.sampled_from([(1, 1), (2, 2)]),
            st.just(groups),
        )
    )
    lead: tuple[int, ...] = (2, inputs, 7, 6) if how else (*draw(st.sampled_from([(5,), (2, 3)])), inputs)
    shape: tuple[int, ...] = (out, inputs // groups, size, size) if how else (out, inputs)

    def whole(high: int, shape: tuple[int, ...]) -> Tensor:
        if draw(st.booleans()):
            return torch.randint(0, high + 1, shape, generator=generator)
        return torch.randint(0, 2, shape, generator=generator) * high

    codes = whole(2**bits - 1, lead).to(torch.uint8 if bits <= 8 else torch.int32)
    scale = torch.rand((), generator=generator) + 0.01
    affine = Affine(scale, draw(st.integers(0, 2**bits - 1)), bits)
    weight = Weight(
        whole(2**weight_bits - 1, shape).to(torch.uint8),
        torch.rand(out, generator=generator) + 0.01,
        whole(2**weight_bits - 1, (out,)).float(),
    )
    return codes, affine, weight, how


@settings(max_examples=40, deadline=None)
@given(products())
def test_reference_is_the_product_of_the_dequantized_operands(
    case: tuple[Tensor, Affine, Weight, Geometry | None],
) -> None:
    codes, affine, weight, how = case
    bias = torch.randn(weight.scale.shape[0])
    x = affine.scale.double() * (codes.double() - affine.zero_point)
    spread = (-1,) + (1,) * (weight.codes.ndim - 1)
    w = weight.scale.double().reshape(spread) * (weight.codes.double() - weight.zero_point.reshape(spread))
    if how is None:
        wanted = functional.linear(x, w, bias.double())
    else:
        wanted = functional.conv2d(x, w, bias.double(), how.stride, how.padding, how.dilation, how.groups)
    found = ReferenceProduct(weight, how)(codes, affine, bias)
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max().clamp(min=1e-9)


@settings(max_examples=60, deadline=None)
@given(products())
def test_int8_sums_are_those_of_the_reference(case: tuple[Tensor, Affine, Weight, Geometry | None]) -> None:
    codes, affine, weight, how = case
    product, oracle = int8.Int8Product(weight, how), ReferenceProduct(weight, how)
    found, wanted = product.accumulate(codes, affine).double(), oracle.accumulate(codes, affine)
    # every number on the way must be exact in float32, also the part that the channel of ones gives back
    on_the_way = weight.terms * affine.reach * 2 * 255
    if on_the_way < EXACT_FLOAT32:
        assert torch.equal(found, wanted)
    assert (found - wanted).abs().max() <= on_the_way * 2**-23


@settings(max_examples=40, deadline=None)
@given(products())
def test_int8_outputs_are_those_of_the_reference_to_float32(
    case: tuple[Tensor, Affine, Weight, Geometry | None],
) -> None:
    codes, affine, weight, how = case
    bias = torch.randn(weight.scale.shape[0])
    found, wanted = (
        kernel(weight, how)(codes, affine, bias).double() for kernel in (int8.Int8Product, ReferenceProduct)
    )
    size = affine.scale * weight.scale.max() * weight.terms * affine.reach * 255 + bias.abs().max()
    assert (found - wanted).abs().max() <= 4e-7 * size


@pytest.mark.parametrize("terms", [64, 1000, 4608])
@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("weight_code", [0, 255])
def test_extremes_stay_exact_where_sums_leave_24_bits(terms: int, code: int, weight_code: int) -> None:
    codes = torch.full((3, terms), code, dtype=torch.uint8)
    weight = Weight(torch.full((5, terms), weight_code), torch.ones(5), torch.full((5,), 128.0))
    for zero_point in (0, 128, 255):
        affine = Affine(torch.ones(()), zero_point, 8)
        wanted = ReferenceProduct(weight).accumulate(codes, affine)
        assert torch.equal(int8.Int8Product(weight).accumulate(codes, affine), wanted.float())


@pytest.mark.parametrize("bits", [2, 4, 8, 10, 16])
def test_codes_are_those_of_the_quantizer(bits: int) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(bits)) * 3
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, 0.0, 1e30])
    params = fit_affine(-2.0, 5.0, bits)
    x[1] = params.scale * (torch.arange(50) - 25.5)  # ties
    affine = Affine(params.scale, int(params.zero_point), bits)
    codes = encode(x, affine)
    assert codes.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(codes.int(), quantize(x, params))
    assert torch.equal(whole(x, affine) * params.scale, dequantize(codes, params))


def test_nan_has_no_code() -> None:
    with pytest.raises(UserError, match=r"conv1\.input: holds NaN"):
        encode(torch.tensor([1.0, torch.nan]), Affine(torch.ones(()), 3, 8), "conv1.input")


def test_the_reference_pads_with_the_real_zero() -> None:
    params = AffineParams(torch.tensor(0.5), torch.tensor(7.0), 4)
    x = torch.randn(1, 2, 5, 5)
    layer = torch.nn.Conv2d(2, 3, 3, padding=1, bias=False)
    weight = Weight(torch.randint(0, 16, layer.weight.shape), torch.ones(3), torch.full((3,), 8.0))
    codes, affine = quantize(x, params), Affine(params.scale, 7, 4)
    found = ReferenceProduct(weight, geometry_of(layer))(codes, affine)
    wanted = functional.conv2d(dequantize(codes, params), weight.steps().float(), padding=1)
    assert torch.allclose(found.float(), wanted, atol=1e-4)


def test_refusals() -> None:
    wide = Weight(torch.tensor([[0, 1000]]), torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="more than 8 bits"):
        int8.Int8Product(wide)
    long = Weight(torch.ones(1, int8.MOST_TERMS + 1, dtype=torch.uint8), torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="do not fit 32 bits"):
        int8.Int8Product(long)
    sound = Weight(torch.ones(1, 2, dtype=torch.uint8), torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="no code of 8 bits"):
        int8.Int8Product(sound).accumulate(torch.zeros(1, 2), Affine(torch.ones(()), 256, 8))
    with pytest.raises(ValueError, match="padding"):
        geometry_of(torch.nn.Conv2d(1, 1, 3, padding="same"))
    with pytest.raises(ValueError, match="exceed"):
        batched(torch.ones(1, 1, 1), torch.ones(1, 1, 1), 2.0**53)


_ON_ANOTHER_CPU = """
import torch
from halftone.runtime import int8
from halftone.runtime.operands import Affine, Geometry, Weight
from halftone.runtime.reference import ReferenceProduct

ability = int8.ability()
assert ability.usable and not ability.wide and "16 bits" in ability.reason, ability
grouped = Geometry((1, 1), (1, 1), (1, 1), 2)
for bits, how, weight_code in [(8, None, 255), (8, grouped, 0), (10, None, 0), (4, None, 15)]:
    shape = (8, 96) if how is None else (8, 24, 3, 3)
    zero_points = torch.full((8,), 128.0 if bits > 4 else 0.0)
    weight = Weight(torch.full(shape, weight_code), torch.ones(8), zero_points)
    codes = torch.full((4, 96) if how is None else (2, 48, 6, 6), 2**bits - 1)
    codes = codes.to(torch.uint8 if bits <= 8 else torch.int32)
    affine = Affine(torch.ones(()), 3, bits)
    wanted = ReferenceProduct(weight, how).accumulate(codes, affine)
    assert torch.equal(int8.Int8Product(weight, how).accumulate(codes, affine).double(), wanted), (bits, how)

# scaled and biased in one order, whatever the CPU: the one of simulated execution
for weight_code in (15, 255):
    weight = Weight(torch.randint(0, weight_code, (8, 96)), torch.rand(8), torch.full((8,), weight_code // 2))
    codes, affine, bias = torch.randint(0, 256, (40, 96)), Affine(torch.rand(()), 3, 8), torch.randn(8)
    product = int8.Int8Product(weight)
    sums = product.accumulate(codes.to(torch.uint8), affine)
    found = product(codes.to(torch.uint8), affine, bias)
    assert torch.equal(found, sums * (affine.scale * weight.scale) + bias), weight_code
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_cpus_that_saturate_are_noticed_and_served(instructions: str) -> None:
    source = str(Path(int8.__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": instructions,
        "PYTHONPATH": source,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _ON_ANOTHER_CPU], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
