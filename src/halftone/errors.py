"""The two ways a run can end early: the user's input, or our own fault.

Exit codes: 0 done, 2 the user's input (`UserError`), 1 our fault (any other exception).
"""

from __future__ import annotations

EXIT_USER = 2


class UserError(Exception):
    """Something the user can put right.

    The message is one line: what is wrong, where (file or key), and what to do about it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
