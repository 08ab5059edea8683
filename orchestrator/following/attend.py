"""Following a run to its end from a command, and what it means to stop following. The driver goes on either way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import exits
from orchestrator.actions import follow, requests
from orchestrator.clock import Clock
from orchestrator.figures import dollars
from orchestrator.render.live import Screen
from runs import charges
from runs.rows import MICRO
from runs.store import Store

CANCEL_SECONDS = 20.0
"""How long a cancelled launch waits for its driver, which may be asking the provider just now, to end the run."""


def attend(
    home: Path, run: str, clock: Clock, screen: Screen, *, lines: int | None = None, ranks: int | None = 0, cancels: bool = False,
    released: bool = False, keep_going: Callable[[dict[str, Any]], bool] | None = None,
) -> int:  # fmt: skip
    """Follow `run` until it is over, with `released` until its nodes are gone too; the exit code of what it came to.

    Ctrl-C ends the following and not the run, says so, and returns 101. With `cancels` (a launch) it cancels the run as
    long as nothing was rented, and returns 130.
    """
    try:
        screen.play(
            follow.follow(
                home, run, clock, lines=lines, ranks=ranks, released=released, keep_going=keep_going
            )
        )
    except KeyboardInterrupt:
        return _interrupted(home, run, clock, cancels=cancels)
    store = Store(home)
    try:
        record = store.record(run)
        return exits.NO_SUCH_RUN if record is None else exits.exit_code_of(record)
    finally:
        store.close()


def _interrupted(home: Path, run: str, clock: Clock, *, cancels: bool) -> int:
    store = Store(home)
    try:
        record = store.record(run)
        if record is None:
            return exits.NO_SUCH_RUN
        if record.outcome is not None:
            return exits.exit_code_of(record)
        if cancels and not requests.rented(record):
            return _cancel(store, run, clock)
        rate = charges.rate(record) / MICRO
    finally:
        store.close()
    cost = f"it costs {dollars(rate)}/h" if rate else "nothing bills at the moment"
    sys.stderr.write(
        f"\n{run} goes on without you: {cost}.\n"
        f"  come back: llmctl tail {run}\n"
        f"  look:      llmctl status {run}\n"
        f"  end it:    llmctl stop {run}\n"
    )
    code = exits.exit_code_of(record)
    return code if code == exits.MAY_BILL else exits.UNFINISHED


def _cancel(store: Store, run: str, clock: Clock) -> int:
    """Cancel a launch and see it end: its driver may have rented in the same moment, and then that is what is told."""
    requests.cancel(store, run, clock)
    end = clock.monotonic() + CANCEL_SECONDS
    for _ in follow.follow(store.home, run, clock, keep_going=lambda _: clock.monotonic() < end):
        pass
    record = store.record(run)
    assert record is not None
    if requests.rented(record):
        sys.stderr.write(f"\ncancelled {run}: what was rented in the same moment is released\n")
        return exits.exit_code_of(record)
    late = "" if record.outcome is not None else "; its driver has yet to end it"
    sys.stderr.write(f"\ncancelled {run}: nothing was rented{late}\n")
    return exits.INTERRUPTED
