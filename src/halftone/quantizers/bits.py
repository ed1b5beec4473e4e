"""Bit widths of a scenario, as a type: `w4a8`, or `w4a4s8` where the attention probabilities differ."""

from __future__ import annotations

import re
from dataclasses import dataclass

LOWEST, HIGHEST = 2, 16
_PATTERN = re.compile(r"w(\d+)a(\d+)(?:s(\d+))?")


@dataclass(frozen=True)
class Bits:
    """Width of weights, of activations, and of the attention probabilities (the softmax output), in bits."""

    weight: int
    activation: int
    softmax: int

    @classmethod
    def parse(cls, text: str) -> Bits:
        """`w4a8` -> Bits(4, 8, 8). Raises ValueError for another form or a width outside 2..16."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"bits {text!r}: write them as w4a8, or w4a4s8 for 8-bit attention probabilities"
            )
        weight, activation, softmax = match.groups()
        bits = cls(int(weight), int(activation), int(softmax or activation))
        for name in ("weight", "activation", "softmax"):
            if not LOWEST <= getattr(bits, name) <= HIGHEST:
                raise ValueError(f"bits {text!r}: {name} width must lie in {LOWEST}..{HIGHEST}")
        return bits

    def __str__(self) -> str:
        tail = "" if self.softmax == self.activation else f"s{self.softmax}"
        return f"w{self.weight}a{self.activation}{tail}"
