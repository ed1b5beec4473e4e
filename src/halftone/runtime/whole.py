"""Simulated execution on whole numbers: float products of code - zero point, scaled afterwards.

Float32 holds every sum below 2^24 exactly, whatever the order of its terms. So these modules give the same
bits for any batch shape and thread count, and the same as integer execution, which makes the sums in integers
and then scales and adds in the same order. Beyond 2^24 a sum is rounded, as in any float product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from halftone.layers import QuantizedLayer, WeightCodes
from halftone.runtime.operands import Affine, geometry_of, spread, whole, wide
from halftone.runtime.parts import parts_of
from halftone.site_quantizer import Mode, SiteQuantizer

_KEPT = ("weight_scale",)  # float32, whatever the model is cast to


class Affines:
    """Parameters of an activation site as numbers, read from its quantizer once and not at every call."""

    def __init__(self, quantizer: SiteQuantizer) -> None:
        self.quantizer = quantizer
        self._read: list[list[Affine]] = []
        self._scale: Tensor | None = None

    def now(self) -> list[Affine]:
        """Those that serve the present call: one, or one for each part of a layer's input."""
        if self._scale is not self.quantizer.scale:  # it has been set again, or has moved
            self._read = [self._at(slot) for slot in range(self.quantizer.n_calls)]
            self._scale = self.quantizer.scale
        return self._read[self.quantizer.context.slot if len(self._read) > 1 else 0]

    def _at(self, slot: int) -> list[Affine]:
        params, parts = self.quantizer.params(slot), parts_of(self.quantizer)
        assert parts is not None
        scales, zero_points = params.scale.flatten(), params.zero_point.flatten()
        return [Affine(scales[k], int(zero_points[k]), params.bits) for k in parts.columns]


class WholeLayer(QuantizedLayer):
    """A simulated Linear or Conv2d: both operands are whole numbers in a float type.

    Its `weight` holds code - zero point, input channels in the order of the parts of the input. Buffer:
    weight_scale float32, (parts, out).
    """

    weight_scale: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, input: SiteQuantizer, weight: WeightCodes) -> None:
        super().__init__(layer, input)
        self.geometry, self.affines = geometry_of(layer), Affines(input)
        self.axis = -1 if self.geometry is None else 1
        parts = parts_of(input)
        assert parts is not None
        self.parts, weights = parts, parts.of_weight(weight)
        steps = torch.cat([part.steps() for part in weights], dim=1).to(layer.weight.dtype)
        layer.weight = nn.Parameter(steps, requires_grad=False)
        self.register_buffer("weight_scale", torch.stack([part.scale for part in weights]))

    def forward(self, x: Tensor) -> Tensor:
        if not plain(x, self.input):
            return self._dequantized(x)
        assert self.input is not None
        dtype = wide(x.dtype)
        along = spread(self.geometry)
        x = self.parts.ordered(self.input.divided(x), self.axis)
        weight, bias = self.layer.weight.to(dtype), self.layer.bias
        total: Tensor | None = None
        parts = self.parts.cut(x, self.axis), self.parts.cut(weight, 1)
        for part, steps, affine, scale in zip(*parts, self.affines.now(), self.weight_scale, strict=True):
            out = self._product(whole(part, affine), steps, None)
            out = out.mul_((affine.scale.to(dtype) * scale.to(dtype)).reshape(along))
            if bias is not None:
                out, bias = out.add_(bias.to(dtype).reshape(along)), None
            total = out if total is None else total.add_(out)
        assert total is not None
        return total.to(x.dtype)

    def _dequantized(self, x: Tensor) -> Tensor:
        """As `QuantizedLayer` does it: the same to float rounding, with gradients, in any mode."""
        out_first = (-1,) + (1,) * (self.layer.weight.ndim - 1)
        parts = zip(self.parts.cut(self.layer.weight, 1), self.weight_scale, strict=True)
        values = [steps.to(x.dtype) * scale.to(x.dtype).reshape(out_first) for steps, scale in parts]
        assert self.input is not None
        left = self.parts.ordered(self.input(x), self.axis)
        return self._product(left, torch.cat(values, dim=1), self.layer.bias)

    def _product(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        how = self.geometry
        if how is None:
            return functional.linear(left, right, bias)
        if left.device.type == "cpu":
            # the layout that 8-bit convolutions leave: norms after them add in the order of memory
            left = left.contiguous(memory_format=torch.channels_last)
        return functional.conv2d(left, right, bias, how.stride, how.padding, how.dilation, how.groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WholeLayer:
        keep_float32(self, _KEPT, lambda: super(WholeLayer, self)._apply(fn, recurse))
        return self


def keep_float32(module: nn.Module, names: tuple[str, ...], move: Callable[[], object]) -> None:
    """Let `move` take a module to another device or type, with some of its buffers to the device alone."""
    kept = {name: module._buffers[name] for name in names}
    move()
    for name, buffer in kept.items():
        moved = module._buffers[name]
        if buffer is not None and moved is not None:
            module._buffers[name] = buffer.to(moved.device)


def plain(x: Tensor, quantizer: nn.Module | None) -> bool:
    """Whether a tensor is to be quantized and no more: not observed, not differentiated."""
    assert isinstance(quantizer, SiteQuantizer)
    learned = quantizer.soft_params is not None or (x.requires_grad and torch.is_grad_enabled())
    return quantizer.mode is Mode.QUANTIZE and not learned
