"""Bit widths of a scenario, as a type: `w4a8`, `w4a4s8` where the attention probabilities differ, `w4a4b8`
where the first and the last layer are quantized too, to a width of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LOWEST, HIGHEST = 2, 16
_PATTERN = re.compile(r"w(\d+)a(\d+)(?:s(\d+))?(?:b(\d+))?")


@dataclass(frozen=True)
class Bits:
    """Width of weights, of activations, of the attention probabilities (the softmax output), and of weights
    and inputs of the first and the last layer, in bits. boundary: None where these two are left to the
    protocol, which keeps them in float or treats them like the others."""

    weight: int
    activation: int
    softmax: int
    boundary: int | None = None

    @classmethod
    def parse(cls, text: str) -> Bits:
        """`w4a8` -> Bits(4, 8, 8). Raises ValueError for another form or a width outside 2..16."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"bits {text!r}: write them as w4a8, w4a4s8 for 8-bit attention probabilities, or w4a4b8 "
                "for a first and last layer of 8 bits"
            )
        weight, activation, softmax, boundary = match.groups()
        bits = cls(
            int(weight), int(activation), int(softmax or activation), int(boundary) if boundary else None
        )
        for name in ("weight", "activation", "softmax", "boundary"):
            width = getattr(bits, name)
            if width is not None and not LOWEST <= width <= HIGHEST:
                raise ValueError(f"bits {text!r}: {name} width must lie in {LOWEST}..{HIGHEST}")
        return bits

    def __str__(self) -> str:
        tail = "" if self.softmax == self.activation else f"s{self.softmax}"
        end = "" if self.boundary is None else f"b{self.boundary}"
        return f"w{self.weight}a{self.activation}{tail}{end}"
