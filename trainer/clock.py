"""Times of day that never jump: the boot clock, and an offset that was fixed once.

A node's wall clock may be set while a run trains. Every time that is written there is compared with others (how long a phase took,
what it cost), so it is read from the clock that nobody sets. The supervisor fixes the offset when it first starts after a boot, keeps
it in supervisor.json, and hands it to the trainer; without one, a process fixes its own as it starts. Standard library only.
"""

from __future__ import annotations

import os
import time

OFFSET = "LLMCTL_CLOCK_OFFSET"
"""Environment variable: POSIX seconds at which the boot clock was zero."""


def boot() -> float:
    """Seconds since some moment of this boot, sleep included: never jumps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def now() -> float:
    """POSIX seconds, as they were when the offset was fixed and as many as have passed since."""
    return _offset + boot()


_offset = float(os.environ.get(OFFSET) or time.time() - boot())
