"""Time, passed in. Nothing else in the orchestrator reads a clock or sleeps."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time, and a monotonic one that counts a suspended laptop's sleep."""

    def now(self) -> datetime:
        """The wall clock, UTC."""

    def monotonic(self) -> float:
        """Seconds that only grow, time asleep included where the system can tell."""

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Return after `seconds`, or as soon as `event` is set."""


class SystemClock:
    """The machine's own."""

    def now(self) -> datetime:
        """The wall clock, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """CLOCK_BOOTTIME where there is one (it counts a suspend), else the ordinary monotonic clock."""
        boottime = getattr(time, "CLOCK_BOOTTIME", None)
        return time.clock_gettime(boottime) if boottime is not None else time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Return after `seconds`, or as soon as `event` is set."""
        event.wait(max(0.0, seconds))
