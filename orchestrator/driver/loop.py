"""The driver: observe, decide, perform, until nothing is left to do. Always a detached process of its own.

It may be killed between any two instructions: what it had committed is where the next one carries on.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.clock import Clock
from orchestrator.life import world as w
from orchestrator.life.effects import Hands
from orchestrator.life.rules import decide
from orchestrator.life.stake import at_stake
from runs import events as e
from runs.lock import Lock, ProcessId, driver_lock
from runs.record import RunRecord
from runs.store import NotYours, StaleEpoch, Store, run_dir

MAX_ERRORS = 50
"""Unexpected errors in a row before a driver gives up (with half a minute between them: about twenty minutes)."""
TICK_SECONDS = 0.5
"""The longest nap: other processes leave their requests in the store, which cannot wake us."""


@dataclass
class Driver:
    """One run's driver. `step` is also what the simulation runs."""

    run: str
    hands: Hands
    after: list[Callable[[RunRecord], None]] = field(default_factory=list)
    """Called with the record after each observation: wandb, notifications."""
    stake: str | None = None
    """What may be lost with a node from which nothing can be had now, in words."""

    def step(self) -> w.Effect | w.Wait | w.Done:
        """Observe, decide, perform one effect. Raises StaleEpoch where another driver took over.

        Where another run took a node over meanwhile nothing was done: the next record shows it.
        """
        try:
            return self._step()
        except NotYours as error:
            return w.Wait(0.1, str(error))

    def _step(self) -> w.Effect | w.Wait | w.Done:
        hands = self.hands
        record = self._record()
        view = hands.site.observe(record)
        if view.events:
            hands.commit(*view.events)
            record = self._record()
        for tell in self.after:
            tell(record)
        world = hands.sight.world(hands.provider, view, hands.given_up(record))
        answer = decide(record, world, hands.clock.now())
        self.stake = at_stake(record, world, hands.clock.now())
        if not isinstance(answer, w.Wait | w.Done):
            hands.perform(answer, record)
        return answer

    def _record(self) -> RunRecord:
        record = self.hands.store.record(self.run)
        if record is None:
            raise StaleEpoch(f"{self.run} was removed")
        return record


def drive(
    driver: Driver, wake: threading.Event, log: Callable[[str], None], heartbeat: Callable[[str], None]
) -> None:
    """Step until the run is done. An unexpected error is logged and tried again: a driver that dies leaves a bill behind."""
    clock, errors, last = driver.hands.clock, 0, ""
    while True:
        wake.clear()
        try:
            answer = driver.step()
            errors = 0
        except StaleEpoch as error:
            log(f"ending: {error}")
            return
        except Exception:
            errors += 1
            log(traceback.format_exc())
            if errors >= MAX_ERRORS:
                raise
            clock.wait(wake, min(30.0, 0.5 * 2**errors))
            continue
        if isinstance(answer, w.Done):
            log("done")
            return
        if isinstance(answer, w.Wait):
            heartbeat(answer.why)
            clock.wait(wake, min(answer.seconds, TICK_SECONDS))
            continue
        if repr(answer) != last:
            log(repr(answer))
        last = repr(answer)


def take_over(store: Store, run: str, clock: Clock, *, force: bool = False) -> tuple[Lock, int] | None:
    """Become the driver of `run`: the lock, then a new epoch, then the end of a process that still believes it drives.

    None where a living driver has the lock (with `force` it is ended first).
    """
    lock = Lock(driver_lock(run_dir(store.home, run)))
    record = store.record(run)
    assert record is not None
    old = ProcessId(record.driver_pid or 0, record.driver_start_time, record.driver_boot_id)
    if force and old.pid != os.getpid():
        old.end()
    if not lock.acquire(patience=5.0 if force else 0.5):
        return None
    if old.pid != os.getpid():
        old.end()
    record = store.record(run)
    assert record is not None
    me = ProcessId.mine()
    epoch = record.epoch + 1
    started = e.DriverStarted(
        at=clock.now(), epoch=epoch, pid=me.pid, start_time=me.start_time, boot_id=me.boot_id
    )
    store.commit([(e.run_stream(run), started)], epoch=epoch)
    return lock, epoch


def write_heartbeat(path: Path, why: str, complaint: str | None, at: float, stake: str | None = None) -> None:
    """`driver.json`: what the driver waits for, and what is at stake meanwhile; read by those who follow. Not durable, replaced as a whole, and left as it
    is while the disk is full."""
    temporary = path.with_suffix(".tmp")
    with suppress(OSError):
        temporary.write_text(
            json.dumps({"pid": os.getpid(), "time": at, "why": why, "complaint": complaint, "stake": stake})
        )
        temporary.replace(path)
