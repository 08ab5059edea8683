"""Following a run: its log, its events and its row, from the files and the store that the driver writes.

A follower holds nothing that matters: it may die, or be many. One that finds a live run without a driver starts a driver
again; everything else is reading.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.actions import logs
from orchestrator.clock import Clock
from orchestrator.driver.process import driver_alive, spawn
from runs.rows import LIVE
from runs.store import Store, run_dir

POLL_SECONDS = 0.1
MAX_STARTS = 5
"""Drivers that a follower starts before it gives up: each of them failed at once."""
STAKE_SECONDS = 300.0
"""How often it is said again what is at stake while a node is waited for."""
UNCONFIRMED_SECONDS = 300.0 * float(os.environ.get("LLMCTL_TEST_PACE", "1"))
"""A termination that is not confirmed for this long ends the following, with exit code 8; the driver goes on trying."""


@dataclass(frozen=True)
class Log:
    """New bytes of the mirrored train.log, as they are."""

    data: bytes


@dataclass(frozen=True)
class Happened:
    """An event of the run or one of its nodes."""

    stream: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The run's projection row, whenever it changed, and what its driver waits for."""

    row: dict[str, Any]
    heartbeat: dict[str, Any] | None


@dataclass(frozen=True)
class Note:
    """Something about the following itself."""

    text: str


Heard = Log | Happened | Row | Note


def follow(
    home: Path,
    run: str,
    clock: Clock,
    *,
    lines: int | None = None,
    ranks: int | None = 0,
    revive: bool = True,
    stop: threading.Event | None = None,
    released: bool = False,
    keep_going: Callable[[dict[str, Any]], bool] | None = None,
) -> Iterator[Heard]:
    """What happens to `run`, until it has ended and its log is drained, or `keep_going(row)` says no; with `released`, until
    no node is left to it either, a kept one included.

    `ranks`: see `logs.open_log`. With `revive`, a live run without a driver gets one. Ends early, after a Note, when a termination stays unconfirmed.
    """
    store, stop = Store(home), stop or threading.Event()
    directory = run_dir(home, run)
    log = logs.open_log(store, run, lines, ranks)
    seq, shown, starts = 0, None, Starts(home, run, clock)
    unconfirmed_since: float | None = None
    stake_told = -math.inf
    try:
        while not stop.is_set():
            for seq, stream, body in store.since(run, seq):  # noqa: B020, B007  the last one seen is where to go on
                yield Happened(stream, body)
            row = store.summary(run)
            if row is None:
                return
            over = row["state"] not in LIVE
            while data := log.read():
                yield Log(data)
            beat, stake = heartbeat(directory)
            if stake and not over and clock.monotonic() - stake_told > STAKE_SECONDS:
                stake_told = clock.monotonic()
                yield Note(stake)
            current = (row, beat)
            if current != shown:
                yield Row(*current)
                shown = current
            held = released and any(node["unsettled"] for node in row["nodes"])
            if (over and not held) or (keep_going is not None and not keep_going(row)):
                return
            unconfirmed = any(node["terminate_unconfirmed"] for node in row["nodes"])
            unconfirmed_since = (unconfirmed_since or clock.monotonic()) if unconfirmed else None
            if unconfirmed_since is not None and clock.monotonic() - unconfirmed_since > UNCONFIRMED_SECONDS:
                yield Note("the provider does not confirm the termination; the driver goes on trying")
                return
            if revive and not starts.ensure():
                yield Note(f"the driver ended {MAX_STARTS} times at once; see {directory / 'driver.log'}")
                return
            clock.wait(stop, POLL_SECONDS)
    finally:
        store.close()


class Starts:
    """Keeps a live run driven, within bounds."""

    def __init__(self, home: Path, run: str, clock: Clock) -> None:
        self._home, self._run, self._clock = home, run, clock
        self._count, self._next = 0, clock.monotonic() + 1.0

    def ensure(self) -> bool:
        """Start a driver where there is none; False when that was tried too often."""
        now = self._clock.monotonic()
        if now < self._next:
            return True
        self._next = now + 1.0
        if driver_alive(self._home, self._run):
            self._count = 0
            return True
        if self._count >= MAX_STARTS:
            return False
        self._count += 1
        self._next = now + 2.0 * self._count
        spawn(self._home, self._run)
        return True


def heartbeat(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What `driver.json` says of its driver (None: there is none yet), and of what is at stake."""
    try:
        beat: dict[str, Any] = json.loads((directory / "driver.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, None
    return {key: beat.get(key) for key in ("why", "complaint")}, beat.get("stake")
