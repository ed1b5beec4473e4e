"""The exact choice under a budget, against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest

from halftone.passes.knapsack import Option, choose


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better(seed: int) -> None:
    draw = random.Random(seed)
    items = [
        [Option(0, 0.0)]
        + [Option(draw.randint(0, 6), draw.uniform(-1, 2)) for _ in range(draw.randint(1, 3))]
        for _ in range(draw.randint(1, 6))
    ]
    capacity = draw.randint(0, 15)

    def worth(places: tuple[int, ...] | list[int]) -> tuple[int, float]:
        options = [options[place] for options, place in zip(items, places, strict=True)]
        return sum(option.cost for option in options), sum(option.gain for option in options)

    every = map(worth, itertools.product(*(range(len(options)) for options in items)))
    best = max(gain for cost, gain in every if cost <= capacity)
    cost, gain = worth(choose(items, capacity))
    assert cost <= capacity
    assert gain == pytest.approx(best)


def test_of_equals_the_cheapest() -> None:
    assert choose([[Option(3, 1.0), Option(1, 1.0)]], 5) == [1]
    assert choose([[Option(0, 0.0), Option(2, 0.0)]], 5) == [0]


def test_what_cannot_be_afforded_is_refused() -> None:
    with pytest.raises(ValueError, match="no choice costs 2 or less"):
        choose([[Option(3, 1.0)]], 2)
    with pytest.raises(ValueError, match="whole numbers"):
        choose([[Option(-1, 1.0)]], 2)
