"""Simulated attention on whole numbers: float products of codes, scaled afterwards, as those of layers."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from halftone.attention import QuantizedAttnProcessor
from halftone.probability_quantizer import ProbabilityQuantizer
from halftone.quantizers.affine import SMALLEST_SCALE
from halftone.quantizers.log2 import LEAST_OCTAVE, Log2Params, fake_quantize_log2
from halftone.runtime.grouped_attention import by_factor, grouped_operand
from halftone.runtime.operands import BAND, EXACT_FLOAT32, Affine, Operand, encode, whole, wide
from halftone.runtime.reference import batched
from halftone.runtime.whole import Affines, plain
from halftone.site_quantizer import SiteQuantizer


class WholeAttnProcessor(QuantizedAttnProcessor):
    """Simulated attention: q kᵀ and probabilities x v are products of whole numbers, scaled afterwards.

    Log2 probabilities are products of their own for every `BAND` of octaves, dynamic scales are factors of
    the rows. A start token's key and column are float: scores and an outer product of their own, added.
    """

    query: SiteQuantizer
    key: SiteQuantizer
    value: SiteQuantizer
    probabilities: SiteQuantizer

    def __init__(
        self, query: SiteQuantizer, key: SiteQuantizer, value: SiteQuantizer, probabilities: SiteQuantizer
    ) -> None:
        super().__init__(query, key, value, probabilities)
        self.affines = {part.site.kind: Affines(part) for part in (query, key, value, probabilities)}

    def affine(self, quantizer: SiteQuantizer) -> Affine:
        """Of one of the four, at the present call."""
        (found,) = self.affines[quantizer.site.kind].now()
        return found

    def weights(self, attn: Attention, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        if not plain(query, self.query) or not plain(key, self.key):
            return super().weights(attn, query, key, mask)
        first, rest = self._start(key, 1)
        left, right = self.operand(query, self.query), self.operand(rest, self.key)
        right = right.turned()
        sums = self.sums(left, right)
        of_query, dtype = left.scale.to(left.steps.dtype), sums.dtype
        scores = sums.mul_(of_query * right.scale.to(dtype) * attn.scale)
        if first is not None:
            steps = left.steps if left.inner is None else left.steps * left.inner.to(dtype)
            own = (steps * first.to(dtype)).sum(-1, keepdim=True).mul_(of_query * attn.scale)
            scores = torch.cat([own, scores], dim=-1)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1, dtype=dtype).to(query.dtype)

    def mix(self, probabilities: Tensor, value: Tensor) -> Tensor:
        if not plain(probabilities, self.probabilities) or not plain(value, self.value):
            return super().mix(probabilities, value)
        first, rest = self._start(probabilities, 2)
        left, right = self.operand(rest, self.probabilities), self.operand(value, self.value)
        of_first, of_rest = self._start(right.steps, 1)
        inner = right.inner if first is None or right.inner is None else right.inner[1:]
        sums = self.sums(left, right._replace(steps=of_rest, inner=inner))
        of_value = right.scale.to(sums.dtype)
        found = sums.mul_(left.scale.to(sums.dtype) * of_value)
        if first is not None and of_first is not None:
            of_value = of_value if right.inner is None else of_value * right.inner[0].to(sums.dtype)
            found.add_(first.to(sums.dtype) * (of_first * of_value))
        return found.to(value.dtype)

    def codes(self, probabilities: Tensor) -> Tensor:
        """Codes of probabilities, without a start token's."""
        _, rest = self._start(probabilities, 2)
        if isinstance(self.probabilities, ProbabilityQuantizer):
            return self.probabilities.codes(rest)
        return encode(rest, self.affine(self.probabilities), self.probabilities.site.name)

    def operand(self, x: Tensor, quantizer: SiteQuantizer) -> Operand:
        """A tensor as whole numbers, in a float type."""
        if isinstance(quantizer, ProbabilityQuantizer):
            return _probabilities(x, quantizer)
        if quantizer.groups is not None:
            return grouped_operand(x, quantizer)
        affine = self.affine(quantizer)
        most = float(affine.reach * x.shape[-1])
        if quantizer is self.probabilities:
            most = min(most, _sum_of_codes(affine.scale, x.shape[-1]))
        return Operand(whole(x, affine), affine.scale, affine.reach, most)

    def sums(self, left: Operand, right: Operand) -> Tensor:
        """Batched product, with inner factors."""
        plain = left.inner is None and right.inner is None
        return self.product(left, right) if plain else by_factor(left, right, self.product)

    def product(self, left: Operand, right: Operand) -> Tensor:
        """Batched product of whole numbers, in their type; on a CPU by way of float64 where float32 might not
        hold a sum."""
        most = left.most * right.reach
        if left.steps.device.type == "cpu":
            if left.octaves > BAND:
                return by_bands(left, right)
            if most >= EXACT_FLOAT32:
                return batched(left.steps, right.steps, most).to(left.steps.dtype)
        return torch.bmm(left.steps, right.steps)

    def _start(self, x: Tensor, axis: int) -> tuple[Tensor | None, Tensor]:
        """A start token's part along the axis of the key tokens, None if it is not apart, and the rest."""
        if not self.start_apart:
            return None, x
        first, rest = x.split([1, x.shape[axis] - 1], axis)
        return first, rest


def by_bands(left: Operand, right: Operand) -> Tensor:
    """Product with octaves: exact for every band of them, the bands added in float64.

    Steps beyond 16 bits on the right, of ranges far from zero, take narrower bands.
    """
    banded = left.octaves > BAND
    width = BAND - max(0, (right.reach - 1).bit_length() - 16)
    most = left.most * 2.0 ** (width - BAND if banded else 0) * right.reach
    total: Tensor | None = None
    for band in range(-(-left.octaves // width) if banded else 1):
        unit = 2.0 ** (BAND - width * (band + 1)) if banded else 1.0  # the smallest step of the band
        steps = left.steps
        if banded:
            steps = torch.where((steps >= unit) & (steps < unit * 2.0**width), steps, 0.0).div_(unit)
            if band and not bool(steps.any()):
                continue
        sums = batched(steps, right.steps, most).mul_(unit)
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total.to(left.steps.dtype)


def _probabilities(x: Tensor, quantizer: ProbabilityQuantizer) -> Operand:
    params, terms = quantizer.at_hand(x), x.shape[-1]
    dtype = wide(x.dtype)
    if isinstance(params, Log2Params):
        octaves = min(params.high + 1, LEAST_OCTAVE + 1)
        shift = min(octaves, BAND) - 1
        # octaves of the ratio: a value times its scale may be too small for float32
        unit = Log2Params(params.scale.new_ones(()), params.bits)
        steps = fake_quantize_log2(x.detach().float() / params.scale, unit).mul_(2.0**shift).to(dtype)
        most = min(2.0**shift * terms, 1.5 * 2.0**shift / _smallest(params.scale) + terms)
        if octaves > BAND:  # a lower band may be full
            most = 2.0**shift * terms
        return Operand(steps, params.scale * 2.0**-shift, 2**shift, most, octaves)
    steps = x.detach().to(dtype).div(params.scale.to(dtype)).round_().clamp_(params.low, params.high)
    most = min(float(params.high * terms), _sum_of_codes(params.scale, terms))
    return Operand(steps, params.scale, params.high, most)


def _sum_of_codes(scale: Tensor, terms: int) -> float:
    """Bound of the codes of a row: probabilities add up to 1, so these to 1 / scale + terms / 2 at most."""
    return 1.001 / _smallest(scale) + terms / 2


def _smallest(scale: Tensor) -> float:
    """The smallest scale; 0 where reading it would make a device wait."""
    return float(scale.min()) if scale.device.type == "cpu" else SMALLEST_SCALE
