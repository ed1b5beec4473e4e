"""One line of the proxy card: figures, thresholds set beforehand, and the verdict that follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field

_DIGITS = 4


class Verdict(StrEnum):
    PRESENT = "present"
    ABSENT = "absent"
    NOT_APPLICABLE = "not applicable"


class Test(BaseModel):
    """A figure and the threshold from which on it counts; `figure` is None where there is nothing to
    measure."""

    __test__ = False  # no test case, whatever pytest makes of its name
    model_config = ConfigDict(frozen=True, extra="forbid")

    measure: str
    figure: float | None
    threshold: float
    reason: str

    @property
    def passed(self) -> bool:
        return self.figure is not None and self.figure >= self.threshold


class Finding(BaseModel):
    """A phenomenon: present where every test is passed, not applicable where one has nothing to measure.

    claim: what the methods claim to gain from it. further: other figures, by what they are. data: what the
    plot is drawn from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    title: str
    methods: tuple[str, ...]
    claim: str
    tests: tuple[Test, ...]
    further: dict[str, float | None] = {}
    note: str = ""
    data: dict[str, Any] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        if any(test.figure is None for test in self.tests):
            return Verdict.NOT_APPLICABLE
        return Verdict.PRESENT if all(test.passed for test in self.tests) else Verdict.ABSENT

    @property
    def consequence(self) -> str:
        """What the verdict means for the methods."""
        if self.verdict is Verdict.PRESENT:
            return "claim testable on this model"
        return "claim not testable on this model"


def rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def median(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None where there are none."""
    found = [value for value in values if value is not None]
    return rounded(float(np.median(found))) if found else None


def share(values: Iterable[bool]) -> float | None:
    """Of those that are true; None of nothing."""
    found = list(values)
    return rounded(sum(found) / len(found)) if found else None
