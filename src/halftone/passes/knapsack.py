"""An exact choice under a budget: one option of every item, the greatest gain that the capacity allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """What an option costs, a whole number from 0, and what it gains."""

    cost: int
    gain: float


def choose(items: Sequence[Sequence[Option]], capacity: int) -> list[int]:
    """The place of the chosen option of every item (multiple-choice knapsack, by dynamic programming over
    whole costs: exact, in items x options x capacity).

    Among equal gains the cheapest choice wins. Raises ValueError where even the cheapest options cost more
    than the capacity, and for costs that are not whole numbers from 0.
    """
    if any(option.cost < 0 or option.cost != int(option.cost) for options in items for option in options):
        raise ValueError("costs must be whole numbers from 0")
    # best[c]: the greatest gain of the items so far that costs c exactly, and how it was chosen
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())] + [None] * capacity
    for options in items:
        after: list[tuple[float, tuple[int, ...]] | None] = [None] * (capacity + 1)
        for spent, found in enumerate(best):
            if found is None:
                continue
            for place, option in enumerate(options):
                total, gain = spent + option.cost, found[0] + option.gain
                if total <= capacity and ((now := after[total]) is None or gain > now[0]):
                    after[total] = (gain, (*found[1], place))
        best = after
    reached = [found for found in best if found is not None]
    if not reached:
        raise ValueError(f"no choice costs {capacity} or less")
    return list(max(reached, key=lambda found: found[0])[1])  # the first, so the cheapest, of equals
