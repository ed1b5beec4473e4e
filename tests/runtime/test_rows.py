"""Layers whose positions are grouped, as row scales of one integer product."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind
from halftone.errors import UserError
from halftone.layers import QuantizedLayer, WeightCodes, fit_weight, nearest_codes
from halftone.policies import Range
from halftone.quantizers import unfolded
from halftone.quantizers.affine import AffineParams, quantize
from halftone.quantizers.groups import Axis, Grouping, fit_groups
from halftone.quantizers.layout import layout_of
from halftone.runtime import int8
from halftone.runtime.int8 import Int8Product
from halftone.runtime.operands import Affine
from halftone.runtime.reference import ReferenceProduct
from halftone.runtime.rows import RowLayer
from halftone.runtime.whole_rows import WholeRowLayer, middle_of, takes_rows
from halftone.site_quantizer import Mode, SiteQuantizer

CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "tokens of two axes": {},
    "padded": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    "plain": {"kernel_size": 1},
    "no padding": {"kernel_size": 3, "stride": 2},
}
GROUPS = 3


def quantizer(
    layer: nn.Module, x: Tensor, context: CallContext, bits: int, calls: int, shared: bool
) -> SiteQuantizer:
    """Positions grouped by turns, otherwise at every call or alike at all; ranges need not hold zero."""
    layout = layout_of(layer)
    assert layout is not None
    name = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
    made = SiteQuantizer(Site("m", SiteKind.INPUT, name, None), bits, calls, context, layout=layout)
    lo, hi = layout.extremes(x)[Axis.POSITION]
    partitions = 1 if shared else calls
    labels = torch.stack([(torch.arange(len(lo)) * (call + 1)) % GROUPS for call in range(partitions)])
    fitted = [
        fit_groups(lo - call, hi, labels[call % partitions], GROUPS, bits, include_zero=False)
        for call in range(calls)
    ]
    groups = Grouping(
        torch.full((partitions,), int(Axis.POSITION), dtype=torch.uint8), labels.to(torch.uint8)
    )
    scale, zero_point = (
        torch.stack([getattr(one, key) for one in fitted]) for key in ("scale", "zero_point")
    )
    made.set_parameters(scale, zero_point, groups)
    made.mode = Mode.QUANTIZE
    return made


def layers(
    case: str, bits: int = 8, weight_bits: int = 4, calls: int = 2, shared: bool = False, offset: float = 0.0
) -> tuple[QuantizedLayer, RowLayer, Tensor, CallContext]:
    """A simulated layer and the integer one, and an input for them."""
    generator = torch.Generator().manual_seed(len(case))
    context = CallContext()
    if CASES[case]:
        layer: Any = nn.Conv2d(6, 5, **CASES[case])
        x = torch.randn(3, 6, 9, 7, generator=generator)
    else:
        layer = nn.Linear(10, 5)
        x = torch.randn(2, *((4, 3) if case == "tokens of two axes" else (12,)), 10, generator=generator)
    if offset:
        x = x.abs() + offset  # no range holds zero
    params = fit_weight(layer.weight.detach(), weight_bits, Range.MINMAX)
    weight: WeightCodes = nearest_codes(layer.weight, params)
    input = quantizer(layer, x, context, bits, calls, shared)
    fast = RowLayer(layer, input, weight, Int8Product)
    slow = QuantizedLayer(copy.deepcopy(layer), input)
    slow.set_weight_codes(weight.codes, params)
    return slow, fast, x, context


def exact(layer: RowLayer, x: Tensor, call: int) -> tuple[Tensor, Tensor]:
    """Codes (batch, positions, terms) and outputs, from the definition, in float64 and all at once."""
    input, window = layer.input, layer.rows.window
    assert input.groups is not None
    _, labels = input.groups.row(call)
    params = AffineParams(
        *(getattr(input, key)[call][labels][:, None] for key in ("scale", "zero_point")), input.widths[call]
    )
    rows = (
        x.flatten(1, -2)
        if window is None
        else functional.unfold(x, window.kernel, window.dilation, window.padding, window.stride).mT
    )
    codes = quantize(rows, params)
    values = (codes.double() - params.zero_point) * params.scale
    weight = layer.matrix.steps().double() * layer.weight_scale[0].double()[:, None]
    assert layer.bias is not None
    out = values @ weight.T + layer.bias.detach().double()
    if window is None:
        return codes, out.unflatten(1, x.shape[1:-1])
    return codes, out.mT.unflatten(2, (-1, window.output_width(x)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_what_simulated_execution_does(case: str, shared: bool) -> None:
    slow, fast, x, context = layers(case, shared=shared)
    assert takes_rows(fast.input)
    seen = []
    for call in range(2):
        with context.at(call), torch.inference_mode():
            found, wanted = fast(x), slow(x)
            codes, oracle = exact(fast, x, call)
            assert torch.equal(
                torch.cat([fast.codes_of(p) for p in fast.rows.pieces(x, fast.input)], 1).int(), codes
            )
            for mine, simulated in fast.beside(x, fast.input):
                assert torch.equal(mine.int(), simulated)
        assert found.shape == wanted.shape
        assert found.stride() == wanted.stride(), "norms after it add in the order of memory"
        assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()
        assert (found - oracle).abs().max() <= 1e-6 * oracle.abs().max()
        seen.append(found)
    assert not torch.equal(*seen), "each call has parameters of its own"


def whole(fast: RowLayer, layer: nn.Linear | nn.Conv2d) -> WholeRowLayer:
    """The simulated layer of an integer one."""
    codes = WeightCodes(fast.codes, fast.weight_scale[0], fast.weight_zero_point[0])
    return WholeRowLayer(copy.deepcopy(layer), fast.input, codes)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("bits", "weight_bits", "offset"), [(4, 4, 0.0), (8, 8, 0.0), (10, 8, 0.0), (8, 8, 1e5)]
)
def test_simulated_and_integer_execution_give_the_same_bits(
    case: str, bits: int, weight_bits: int, offset: float
) -> None:
    slow, fast, x, context = layers(case, bits, weight_bits, offset=offset)
    simulated = whole(fast, slow.layer)
    with context.at(1), torch.inference_mode():
        found, wanted = simulated(x), fast(x)
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride(), "norms after it add in the order of memory"


@pytest.mark.parametrize("case", ["linear", "padded"])
def test_what_is_learned_or_observed_is_dequantized(case: str) -> None:
    slow, fast, x, context = layers(case)
    simulated = whole(fast, slow.layer)
    with context.at(0):
        found, wanted = simulated(x.clone().requires_grad_()), slow(x.clone().requires_grad_())
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert found.requires_grad
        fast.input.mode = Mode.OFF
        assert torch.allclose(simulated(x), slow(x), rtol=1e-5, atol=1e-5)


def test_a_cast_leaves_scales_and_sums_as_they_are() -> None:
    slow, fast, _, _ = layers("padded")
    simulated = whole(fast, slow.layer)
    kept = {name: value.clone() for name, value in simulated.rows.named_buffers()}
    simulated.half()
    assert simulated.layer.weight.dtype == torch.float16
    assert all(torch.equal(value, kept[name]) for name, value in simulated.rows.named_buffers())


@pytest.mark.parametrize("case", ["linear", "no padding"])
@pytest.mark.parametrize(
    ("bits", "weight_bits", "offset"), [(4, 4, 0.0), (8, 8, 0.0), (10, 8, 0.0), (8, 4, 20.0), (8, 8, 1e5)]
)
def test_sums_are_exact_whatever_the_zero_points(
    case: str, bits: int, weight_bits: int, offset: float
) -> None:
    """Without scales and bias outputs are whole numbers, also where zero points lie far outside the codes."""
    _, fast, x, context = layers(case, bits, weight_bits, offset=offset)
    with context.at(0):
        for piece in fast.rows.pieces(x, fast.input):
            whole = AffineParams(torch.ones_like(piece.params.scale), piece.params.zero_point, bits)
            if offset:
                assert (whole.zero_point < -(2**bits)).any()
            codes = fast.codes_of(piece)
            steps = codes.double() - whole.zero_point.double().reshape(-1, 1)
            fast.rows.weight_scale.fill_(1.0)
            middle = Affine(torch.ones(()), middle_of(whole), bits)
            found = fast.rows.scaled(Int8Product(fast.matrix).accumulate(codes, middle), whole, None)
            assert torch.equal(found.double(), steps @ fast.matrix.steps().double().T)


@pytest.mark.parametrize("chunk", [1500, 1])
def test_bands_change_nothing_and_bound_what_is_unfolded(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast, x, context = layers("stride")
    sizes = []

    def unfold(*args: Any) -> Tensor:
        found = functional_unfold(*args)
        sizes.append(found.numel())
        return found

    functional_unfold = functional.unfold
    monkeypatch.setattr(unfolded.functional, "unfold", unfold)
    with context.at(1), torch.inference_mode():
        whole = fast(x)
        monkeypatch.setattr(unfolded, "CHUNK", chunk)
        sizes.clear()
        assert torch.equal(fast(x), whole)
    line = 6 * 9 * 4
    assert len(sizes) >= 3
    assert max(sizes) <= max(chunk, line)


@pytest.mark.parametrize("case", ["linear", "padded"])
def test_the_reference_is_exact_in_float64(case: str) -> None:
    _, fast, x, context = layers(case, offset=3.0)
    fast.make = ReferenceProduct
    with context.at(1), torch.inference_mode():
        found = fast(x.double())
        _, oracle = exact(fast, x.double(), 1)
    assert found.dtype == torch.float64
    assert (found - oracle).abs().max() <= 1e-13 * oracle.abs().max()


def test_a_factor_divides_before_codes_are_made() -> None:
    slow, fast, x, context = layers("linear")
    fast.input.divisor = torch.linspace(0.5, 2.0, 10)
    with context.at(0), torch.inference_mode():
        wanted, found = slow(x), fast(x)
        fast.input.divisor = None
        assert not torch.equal(fast(x), found)
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_other_positions_and_nan_are_refused() -> None:
    _, fast, x, _ = layers("linear")
    with pytest.raises(UserError, match="12 positions are grouped, and here are 11"):
        fast(x[:, :-1])
    with pytest.raises(UserError, match=r"m\.input: holds NaN"):
        fast(x.where(x < x.max(), torch.nan))
    _, fast, x, _ = layers("padded")
    with pytest.raises(UserError, match="63 positions are grouped, and here are 56"):
        fast(x[:, :, :-1])


_ON_ANOTHER_CPU = """
import torch
from halftone.runtime import int8
import test_rows
assert int8.ability().usable and not int8.ability().wide
for case in ("linear", "no padding"):
    for bits, weight_bits in ((8, 8), (8, 4), (10, 8)):
        test_rows.test_sums_are_exact_whatever_the_zero_points(case, bits, weight_bits, 0.0)
        test_rows.test_sums_are_exact_whatever_the_zero_points(case, bits, weight_bits, 20.0)
"""


def test_cpus_that_saturate_compute_the_same() -> None:
    here = Path(__file__).resolve().parent
    paths = [str(here), str(Path(int8.__file__).resolve().parents[2])]
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _ON_ANOTHER_CPU], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
