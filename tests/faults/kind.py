"""What a kind of fault is: it launches the tiny run, injects its fault at a seeded moment, carries on, and says how that ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.harness import Case

LAUNCH, TERMINATE = "/instance-operations/launch", "/instance-operations/terminate"
LONG = 12.0
"""Seconds that a run takes here at least: random moments lie within."""


@dataclass(frozen=True)
class End:
    """How a case ended, and how it should have."""

    code: int
    expected: int = 0
    exact: bool = True
    """The run was completed, and must equal the undisturbed one."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    words: str
    inject: Callable[[Case], End]
    times: int = 1
    """How many faults a case injects."""


KINDS: dict[str, Kind] = {}
SKIPPED = {
    "no space left (ENOSPC) here": "files that cannot grow (RLIMIT_FSIZE) stand for it",
    "a new boot id": "needs a machine that reboots; the power cut keeps the boot id, and tests/faults/test_supervisor.py changes it",
    "CUDA that stops answering": "needs a GPU; stopped ranks stand for it",
}


def kind(words: str, times: int = 1) -> Callable[[Callable[[Case], End]], Callable[[Case], End]]:
    """Add a kind, named as its function."""

    def add(function: Callable[[Case], End]) -> Callable[[Case], End]:
        name = function.__name__.replace("_", "-")
        KINDS[name] = Kind(name, words, function, times)
        return function

    return add
