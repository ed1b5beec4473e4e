"""Attention in integers whose q, k and v have groups of tokens or of channels."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from halftone.attention import QuantizedAttnProcessor
from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind
from halftone.policies import Probabilities, Scope
from halftone.probability_quantizer import Form, ProbabilityQuantizer
from halftone.quantizers.affine import fit_non_negative
from halftone.quantizers.groups import NO_INDEX, Axis, Grouping, fit_groups
from halftone.quantizers.layout import Layout
from halftone.runtime.layers import IntegerAttnProcessor
from halftone.site_quantizer import Mode, SiteQuantizer

BITS, GROUPS, TOKENS, KEYS, WIDTH = 6, 3, 7, 9, 8


def grouped(kind: SiteKind, x: Tensor, axes: tuple[Axis, Axis], context: CallContext) -> SiteQuantizer:
    """Two calls, the groups of each along an axis of its own; ranges need not hold zero."""
    start = kind is SiteKind.KEY and x.shape[1] == KEYS - 1
    made = SiteQuantizer(Site("m", kind, "Attention", None, start=start), BITS, 2, context, layout=Layout())
    ends = Layout().extremes(x)
    longest = max(len(ends[axis][0]) for axis in axes)
    rows = []
    for call, axis in enumerate(axes):
        labels = (torch.arange(len(ends[axis][0])) * (call + 1)) % GROUPS
        params = fit_groups(*ends[axis], labels, GROUPS, BITS, include_zero=False)
        rows.append(
            (axis, torch.nn.functional.pad(labels, (0, longest - len(labels)), value=NO_INDEX), params)
        )
    groups = Grouping(
        torch.tensor([axis for axis, _, _ in rows], dtype=torch.uint8),
        torch.stack([labels for _, labels, _ in rows]).to(torch.uint8),
    )
    made.set_parameters(
        torch.stack([params.scale for _, _, params in rows]),
        torch.stack([params.zero_point for _, _, params in rows]),
        groups,
    )
    made.mode = Mode.QUANTIZE
    return made


def probabilities(start: bool, log2: bool, context: CallContext) -> SiteQuantizer:
    site = Site("m", SiteKind.PROBABILITIES, "Attention", None, start=start)
    if log2:
        form = Form(Probabilities.LOG2, Scope.SAMPLE)
        made: SiteQuantizer = ProbabilityQuantizer(site, BITS, 2, context, form, heads=2)
    else:
        made = SiteQuantizer(site, BITS, 2, context)
        params = fit_non_negative(torch.tensor([0.9, 0.7]), BITS)
        made.set_parameters(params.scale, params.zero_point)
    made.mode = Mode.QUANTIZE
    return made


CHOICES = list(itertools.product(Axis, repeat=3))


@pytest.mark.parametrize(("start", "log2"), [(False, False), (True, False), (True, True)])
def test_it_computes_what_simulated_execution_does(start: bool, log2: bool) -> None:
    attn = Attention(query_dim=16, heads=2, dim_head=WIDTH)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(4, n, WIDTH, generator=generator) + offset
        for n, offset in ((TOKENS, 3.0), (KEYS, -2.0), (KEYS, 0.5))
    )
    mask = torch.zeros(4, TOKENS, KEYS)
    mask[:, :, -2] = -1e4
    seen = []
    for at, axes in enumerate(CHOICES):
        context = CallContext()
        others = CHOICES[-1 - at]  # at the other call
        kinds = (SiteKind.QUERY, SiteKind.KEY, SiteKind.VALUE)
        tensors = query, key[:, 1:] if start else key, value
        sites = [
            grouped(kind, x, (axis, other), context)
            for kind, x, axis, other in zip(kinds, tensors, axes, others, strict=True)
        ]
        sites.append(probabilities(start, log2, context))
        slow, fast = QuantizedAttnProcessor(*sites), IntegerAttnProcessor(*sites)
        for call in range(2):
            with context.at(call), torch.inference_mode():
                wanted = slow.weights(attn, query, key, mask)
                found = fast.weights(attn, query, key, mask)
                assert (found - wanted).abs().max() <= 1e-5
                mixed, expected = fast.mix(wanted, value), slow.mix(wanted, value)
                assert (mixed - expected).abs().max() <= 2e-6 * expected.abs().max()
                double = [x.double() for x in (query, key, value)]
                exact = fast.attend(attn, *double, mask.double())
                assert exact.dtype == torch.float64
            seen.append(mixed)
    assert len({float(one.square().sum()) for one in seen}) >= 8, "groups decide what comes out"


def test_sums_of_groups_are_whole_numbers() -> None:
    """Scaled by powers of two, the products of 6-bit codes are exact: the same in float32 and float64."""
    generator = torch.Generator().manual_seed(1)
    attn = Attention(query_dim=16, heads=2, dim_head=WIDTH)
    attn.scale = 1.0
    query, key = (torch.randn(2, n, WIDTH, generator=generator) for n in (TOKENS, KEYS))
    for axes in itertools.product(Axis, repeat=2):
        context = CallContext()
        pair = [
            grouped(kind, x, (axis, axis), context)
            for kind, x, axis in zip((SiteKind.QUERY, SiteKind.KEY), (query, key), axes, strict=True)
        ]
        for site in pair:
            site.set_parameters(torch.exp2(site.scale.log2().round()), site.zero_point, site.groups)
        value = grouped(SiteKind.VALUE, key, (Axis.CHANNEL, Axis.CHANNEL), context)
        fast = IntegerAttnProcessor(*pair, value, probabilities(False, False, context))
        with context.at(0), torch.inference_mode():
            left, right = (fast.operand(x, site) for x, site in zip((query, key), pair, strict=True))
            right = right.turned()
            found = fast.sums(left, right) * (left.scale * right.scale)
            exact = torch.bmm(pair[0](query).double(), pair[1](key).double().mT)
        assert torch.equal(found.double(), exact)


@pytest.mark.parametrize("axis", list(Axis))
def test_ranges_far_from_zero_stay_exact(axis: Axis) -> None:
    """Steps of 22 bits beside octaves of 6-bit codes: narrower bands, and no sum past 2^53."""
    context = CallContext()
    far = torch.full((4, 4096, WIDTH), 1e4) + torch.linspace(0, 1e-2, WIDTH)
    value = grouped(SiteKind.VALUE, far, (axis, axis), context)
    assert value.zero_point.abs().max() > 2**21
    weights = torch.logspace(0, -9, 4096).expand(4, TOKENS, -1)
    made = probabilities(False, True, context)
    fast = IntegerAttnProcessor(value, value, value, made)
    with context.at(0), torch.inference_mode():
        found = fast.mix(weights, far)
        wanted = torch.bmm(made(weights).double(), value(far).double())
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
