"""Convolutions as products of an unfolded input: the same as torch's, in bounded chunks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from halftone.quantizers import unfolded
from halftone.quantizers.affine import AffineParams, fake_quantize, fit_affine
from halftone.quantizers.groups import Axis
from halftone.quantizers.layout import layout_of
from halftone.quantizers.unfolded import Window, window_of

CASES = [
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 1, "stride": 2, "padding": 0},
    {"kernel_size": 3, "stride": 1, "padding": 1, "groups": 4},
]


def made(case: dict[str, object]) -> tuple[nn.Conv2d, Window, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, **case)  # type: ignore[arg-type]
    x = torch.randn(3, 8, 9, 7)
    window = window_of(layer)
    assert window is not None
    columns = functional.unfold(x, window.kernel, window.dilation, window.padding, window.stride)
    return layer, window, x, columns


@pytest.mark.parametrize("case", CASES)
def test_extremes_are_those_of_the_unfolded_tensor(case: dict[str, object]) -> None:
    layer, window, x, columns = made(case)
    layout = layout_of(layer)
    assert layout is not None
    found = layout.extremes(x)
    rows, positions = found[Axis.CHANNEL], found[Axis.POSITION]
    assert torch.equal(rows[0], columns.amin((0, 2)))
    assert torch.equal(rows[1], columns.amax((0, 2)))
    assert torch.equal(positions[0], columns.amin((0, 1)))
    assert torch.equal(positions[1], columns.amax((0, 1)))
    assert window.positions(x) == columns.shape[2]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [2**22, 1500, 1])
def test_product_is_the_convolution(
    case: dict[str, object], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfolded, "CHUNK", chunk)
    layer, window, x, _ = made(case)
    fine = AffineParams(torch.tensor([[1e-6]]), torch.tensor([[0.0]]), 16)
    monkeypatch.setattr(unfolded, "fake_quantize", lambda x, params: x)  # quantization off
    with torch.no_grad():
        found = window.convolve(x, layer.weight, layer.bias, layer.groups, fine)
        assert torch.allclose(found, layer(x), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("chunk", [2**22, 1])
def test_a_pixel_has_the_scale_of_the_row_or_column_that_reads_it(
    case: dict[str, object], by_row: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfolded, "CHUNK", chunk)
    layer, window, x, columns = made(case)
    over = (0, 2) if by_row else (0, 1)
    params = fit_affine(columns.amin(over, keepdim=True)[0], columns.amax(over, keepdim=True)[0], 3)
    weight = layer.weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)
    whole = fake_quantize(columns, params).unflatten(1, (layer.groups, -1))
    with torch.no_grad():
        wanted = torch.matmul(weight, whole).flatten(1, 2)
        found = window.convolve(x, layer.weight, None, layer.groups, params)
    assert torch.allclose(found.flatten(2), wanted, atol=1e-5)
    assert (wanted.reshape(found.shape) - layer._conv_forward(x, layer.weight, None)).abs().max() > 1e-2


def test_memory_stays_within_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, window, x, _ = made(CASES[0])
    seen: list[int] = []
    plain = functional.unfold

    def unfold(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append(plain(*args, **kwargs).numel())  # type: ignore[arg-type]
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "unfold", unfold)
    monkeypatch.setattr(unfolded, "CHUNK", 2000)
    window.convolve(
        x, layer.weight, layer.bias, 1, fit_affine(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 8)
    )
    assert len(seen) > 3
    assert max(seen) <= 2000


def test_what_needs_no_unfolding_and_what_cannot_be_unfolded() -> None:
    plain = layout_of(nn.Conv2d(8, 8, 1))
    assert plain is not None
    assert plain.window is None
    assert layout_of(nn.Conv2d(8, 8, 3, padding="same")) is None
    assert layout_of(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")) is None
