"""Verdicts: from figures and thresholds, and from models that show a phenomenon or lack it."""

from __future__ import annotations

import pytest
import torch

from halftone.proxy.activations import outliers, range_drift, shortcut_halves
from halftone.proxy.attention import power_law, prompt_maximum, start_token
from halftone.proxy.finding import Finding, Test, Verdict
from halftone.proxy.plots import svg
from halftone.proxy.walk import Seen
from halftone.proxy.watch import ActivationWatch, Place, ProbabilityWatch

CALLS, PROMPTS = 4, 6


def finding(*figures: float | None) -> Finding:
    tests = tuple(Test(measure="m", figure=figure, threshold=0.5, reason="r") for figure in figures)
    return Finding(key="k", title="t", methods=("A",), claim="c", tests=tests)


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((0.5,), Verdict.PRESENT),
        ((0.49,), Verdict.ABSENT),
        ((0.9, 0.6), Verdict.PRESENT),
        ((0.9, 0.4), Verdict.ABSENT),
        ((None,), Verdict.NOT_APPLICABLE),
        ((0.9, None), Verdict.NOT_APPLICABLE),
    ],
)
def test_verdict_follows_from_all_tests(figures: tuple[float | None, ...], verdict: Verdict) -> None:
    found = finding(*figures)
    assert found.verdict is verdict
    testable = "claim testable on this model"
    assert (found.consequence == testable) is (verdict is Verdict.PRESENT)
    assert found.model_dump()["verdict"] == verdict


def activations(*, drift: float = 1.0, outlier: float = 0.0, halves: float = 1.0) -> Seen:
    """Four sites of noise: ranges that grow by `drift` over the calls, an outlier in channel 3 of every
    sample, and halves whose ranges differ `halves`-fold."""
    seen = Seen(n_prompts=PROMPTS)
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        watch = ActivationWatch(f"mid_block.{number}.input", Place(prompts=PROMPTS), split=10)
        for call in range(CALLS):
            x = torch.rand(PROMPTS, 64, 20, generator=generator) - 0.5
            x[:, :, 5] *= 0.1  # so that channels differ more than tokens
            x[:, :, 10:] *= halves
            x[:, 11, 3] += outlier
            watch.update(x * drift ** (call / (CALLS - 1)))
            watch.finish_call()
        seen.activations[watch.name] = watch
    return seen


def test_drift() -> None:
    assert range_drift(activations()).verdict is Verdict.ABSENT
    found = range_drift(activations(drift=3.0))
    assert found.verdict is Verdict.PRESENT
    assert found.further["median drift"] == pytest.approx(3.0, rel=0.02)
    assert found.tests[0].figure == 1.0


def test_outliers() -> None:
    assert outliers(activations()).verdict is Verdict.ABSENT
    found = outliers(activations(outlier=9.0))
    assert found.verdict is Verdict.PRESENT
    assert [test.figure for test in found.tests] == [1.0, 1.0]
    assert outliers(Seen()).verdict is Verdict.NOT_APPLICABLE


def test_halves() -> None:
    assert shortcut_halves(activations()).verdict is Verdict.ABSENT
    found = shortcut_halves(activations(halves=5.0))
    assert found.tests[0].figure == pytest.approx(5.0, rel=0.02)
    assert found.verdict is Verdict.PRESENT
    assert shortcut_halves(Seen()).verdict is Verdict.NOT_APPLICABLE


def attention(*, sink: float = 0.0, by_prompt: float = 0.0, width: float = 1.0, cross: bool = True) -> Seen:
    """Two layers: scores of deviation `width`, `sink` more on token 0, scaled by prompt."""
    seen = Seen(n_prompts=PROMPTS)
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        watch = ProbabilityWatch(
            f"mid_block.{number}.probabilities", Place(prompts=PROMPTS), heads=2, cross=cross
        )
        for _ in range(CALLS):
            scores = width * torch.randn(PROMPTS * 2, 256, 32, generator=generator)
            scores *= 1 + by_prompt * torch.arange(PROMPTS).repeat_interleave(2).reshape(-1, 1, 1)
            scores[..., 0] += sink
            watch.update(scores.softmax(-1))
            watch.finish_call()
        seen.probabilities[watch.name] = watch
    return seen


def test_start_token() -> None:
    found = start_token(attention())
    assert found.verdict is Verdict.ABSENT
    assert found.tests[0].figure == pytest.approx(1 / 32, rel=0.05)
    assert start_token(attention(sink=6.0)).verdict is Verdict.PRESENT
    assert start_token(attention(sink=6.0, cross=False)).verdict is Verdict.NOT_APPLICABLE


def test_maximum_over_prompts() -> None:
    assert prompt_maximum(attention()).verdict is Verdict.ABSENT
    assert prompt_maximum(attention(width=0.2, by_prompt=1.0)).verdict is Verdict.PRESENT
    assert prompt_maximum(attention(cross=False)).verdict is Verdict.NOT_APPLICABLE


def test_power_law() -> None:
    assert power_law(attention(width=0.5)).verdict is Verdict.ABSENT
    found = power_law(attention(width=4.0, cross=False))
    assert found.verdict is Verdict.PRESENT
    assert "the choice between them cannot" in found.note
    assert found.further["the same in cross-attention"] is None


def test_plots_are_the_same_bytes_and_left_out_where_nothing_was_measured() -> None:
    found = range_drift(activations(drift=3.0))
    assert svg(found) == svg(found)
    for one in (outliers(activations(outlier=9.0)), start_token(attention()), power_law(attention())):
        text = svg(one)
        assert text is not None
        assert text.lstrip().startswith("<?xml")
    assert svg(start_token(Seen())) is None
