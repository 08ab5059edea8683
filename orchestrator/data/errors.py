"""The error of everything that has to do with data: what happened, why, and what to do now.

DataError      3: missing, malformed or unsuitable data
└── Offline    3: what is asked for is on the network, and the network is not there
"""

from __future__ import annotations


class DataError(Exception):
    """Data that cannot be used; `hint` is the next step."""

    exit_code = 3
    code = "data"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Offline(DataError):
    """Nobody answered, or the answer was that of a broken service."""
