"""Block reconstruction in one round, for tests that ask only for what it found."""

from __future__ import annotations

from typing import Any

from halftone.passes.reconstruct import learn_round
from halftone.passes.reconstructed import Reconstructed


def reconstruct(*given: Any, **options: Any) -> Reconstructed:
    return learn_round(*given, **options).found
