"""Groups of calls that share what is decided for them."""

from __future__ import annotations


def group_of(call: int, n_calls: int, groups: int | None) -> int:
    """The group of a call: one of `groups` runs of as equal length as can be; None: every call its own."""
    return call if groups is None else call * min(groups, n_calls) // n_calls
