"""The start token, the maximum that depends on the prompt, and the law that softmax outputs follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halftone.proxy.finding import Finding, Test, median, rounded, share
from halftone.proxy.walk import Seen
from halftone.proxy.watch import ProbabilityWatch

MASS = 0.5
"""Mean probability of the start token: more than all other tokens together."""
SPREAD = 0.25
"""Standard deviation over mean. The largest of 64 prompts then lies at 1.6 x the mean (2.4 deviations), and a
scale that holds it leaves a usual prompt two thirds of the codes."""
POWER_LAW = 0.1
"""Share of layers and calls; with fewer, log2 everywhere or nowhere is as good as a choice."""

NO_TEXT = "The model has no cross-attention to a text."


def start_token(seen: Seen) -> Finding:
    """Does cross-attention put most of its probability on the first token, which carries no prompt?"""
    mass = {watch.name: float(np.mean(watch.first)) for watch in seen.cross}
    tokens = max((watch.tokens for watch in seen.cross), default=None)
    return Finding(
        key="start",
        title="Attention to the start token",
        methods=("DGQ",),
        claim="Leaving the start token's probability in float lets the quantizer's scale fit the rest.",
        tests=(
            Test(
                measure="mean probability of the start token in cross-attention (median over layers)",
                figure=median(mass.values()),
                threshold=MASS,
                reason="more than all other tokens together",
            ),
        ),
        further={
            "an even share, one over the tokens": None if tokens is None else rounded(1 / tokens),
            "median over layers, as a multiple of the even share": _times(median(mass.values()), tokens),
            "largest over layers": rounded(max(mass.values())) if mass else None,
            "smallest over layers": rounded(min(mass.values())) if mass else None,
            "share of layers above the threshold": share(value >= MASS for value in mass.values()),
        },
        note="" if seen.cross else NO_TEXT,
        data={
            "calls": {watch.name: [rounded(value) for value in watch.first] for watch in seen.cross},
            "even": None if tokens is None else 1 / tokens,
            "line": MASS,
        },
    )


def prompt_maximum(seen: Seen) -> Finding:
    """Does the largest probability of the other tokens depend on the prompt?"""
    varied = {watch.name: _variation(watch) for watch in seen.cross if seen.n_prompts > 1}
    return Finding(
        key="maximum",
        title="Largest probability of other tokens",
        methods=("DGQ",),
        claim="A scale taken from the prompt at hand beats one fixed at calibration.",
        tests=(
            Test(
                measure="standard deviation over mean, over prompts, of the largest probability of a token "
                "other than the start token (median over layers and calls)",
                figure=median(value for values in varied.values() for value in values),
                threshold=SPREAD,
                reason="the largest of 64 prompts then lies at 1.6 x the mean, and a fixed scale that holds "
                "it leaves a usual prompt two thirds of the codes",
            ),
        ),
        further={
            "mean of that largest probability (median over layers and calls)": median(
                float(np.mean(prompts)) for watch in seen.cross for prompts in watch.remaining
            ),
            "widest layer (median over its calls)": max(
                (value for value in map(median, varied.values()) if value is not None), default=None
            ),
            "prompts": seen.n_prompts,
        },
        note="" if seen.cross else NO_TEXT,
        data={"calls": varied, "line": SPREAD},
    )


def power_law(seen: Seen) -> Finding:
    """Do softmax outputs follow a power law, so that codes are better spaced by powers of two?"""
    ratios = {name: [first for first, _ in watch.ratios] for name, watch in seen.probabilities.items()}
    wins = share(ratio > 0 for values in ratios.values() for ratio in values)
    watches = seen.probabilities.values()
    return Finding(
        key="powerlaw",
        title="Power law of softmax outputs",
        methods=("DAQ",),
        claim="A log2 quantizer where a softmax output follows a power law, a uniform one elsewhere, loses "
        "less than one kind for all.",
        tests=(
            Test(
                measure="share of attention layers and calls whose values a power law fits better than an "
                "exponential",
                figure=wins,
                threshold=POWER_LAW,
                reason="below a tenth, one kind for all is as good as a choice",
            ),
        ),
        further={
            "the same in self-attention": _wins([watch for watch in watches if not watch.cross]),
            "the same in cross-attention": _wins([watch for watch in watches if watch.cross]),
            "the same, first half of the calls": _by_calls(ratios, later=False),
            "the same, later half": _by_calls(ratios, later=True),
            "layers whose better law changes from call to call": sum(
                0 < sum(ratio > 0 for ratio in values) < len(values) for values in ratios.values()
            ),
            "the same share, fitted above the median only": share(
                above > 0 for watch in watches for _, above in watch.ratios
            ),
            "layers": len(ratios),
        },
        note=_law_note(wins),
        data={"calls": {name: [rounded(value) for value in values] for name, values in ratios.items()}},
    )


def _law_note(wins: float | None) -> str:
    if wins is None:
        return "No attention of this model hands out its softmax output."
    note = (
        "Both laws are fitted from the smallest positive value on. The paper does not say where a fit "
        "begins, and much hangs on it: compare the share above the median."
    )
    if wins > 1 - POWER_LAW:
        note += (
            f" The power law wins nearly everywhere (more than {1 - POWER_LAW:.0%}): log2 against uniform "
            "can be tested, the choice between them cannot."
        )
    return note


def _variation(watch: ProbabilityWatch) -> list[float | None]:
    """Standard deviation over mean of the prompts' maxima, at every call."""
    means = [float(np.mean(prompts)) for prompts in watch.remaining]
    deviations = [float(np.std(prompts, ddof=1)) for prompts in watch.remaining]
    return [rounded(d / m) if m > 0 else None for d, m in zip(deviations, means, strict=True)]


def _wins(watches: Sequence[ProbabilityWatch]) -> float | None:
    return share(ratio > 0 for watch in watches for ratio, _ in watch.ratios)


def _by_calls(ratios: dict[str, list[float]], *, later: bool) -> float | None:
    halves = (
        values[len(values) // 2 :] if later else values[: len(values) // 2] for values in ratios.values()
    )
    return share(ratio > 0 for half in halves for ratio in half)


def _times(mass: float | None, tokens: int | None) -> float | None:
    return None if mass is None or tokens is None else rounded(mass * tokens)
