"""The driver's step and how a run is taken over."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from orchestrator.actions import follow, requests
from orchestrator.actions.requests import SILENT_SECONDS, silent_seconds
from orchestrator.clock import SystemClock
from orchestrator.driver.loop import take_over, write_heartbeat
from orchestrator.driver.main import patient
from orchestrator.driver.process import driver_alive
from runs import events as e
from runs.lock import Lock, ProcessId, boot_id, driver_lock
from runs.store import Store
from tests.seeds import Seed
from tests.simulation.builders import RUN, Story, at


def test_one_driver_a_run_and_each_has_a_new_epoch(tmp_path: Path) -> None:
    store, clock = Store(tmp_path, synchronous="OFF"), SystemClock()
    store.commit(Story().changes)
    first = take_over(store, RUN, clock)
    assert first is not None
    assert driver_alive(tmp_path, RUN)
    assert take_over(Store(tmp_path), RUN, clock) is None
    first[0].release()
    second = take_over(store, RUN, clock)
    assert second is not None
    assert second[1] == first[1] + 1
    record = store.record(RUN)
    assert record is not None
    me = ProcessId.mine()
    assert (record.epoch, record.driver_pid, record.driver_boot_id) == (second[1], me.pid, me.boot_id)
    second[0].release()
    assert not driver_alive(tmp_path, RUN)


class Watched:
    """A clock that a test reads: whatever waits has waited at once, and `look` was called after it."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.time, self._look = at(0), look

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return self.time.timestamp()

    def wait(self, event: threading.Event, seconds: float) -> None:
        assert not event.is_set()
        self.time += timedelta(seconds=seconds)
        self._look()


def test_a_driver_that_waits_for_its_turn_is_not_taken_for_dead(tmp_path: Path) -> None:
    silences: list[float] = []
    clock = Watched(lambda: silences.append(silent_seconds(tmp_path, clock)))
    patient(tmp_path / "driver.json", clock)(200.0)
    assert clock.time == at(200)
    assert silences
    assert max(silences) < SILENT_SECONDS / 2


def test_whoever_follows_is_told_what_is_at_stake(tmp_path: Path) -> None:
    """As the driver says it, and again every few minutes, not at every glance."""
    seed = Seed(tmp_path).rented()
    write_heartbeat(
        seed.directory / "driver.json", "collecting again soon", None, 0.0, "step 100 is at stake"
    )
    glances = iter(range(10_000))
    clock = Watched(lambda: None)
    heard = list(
        follow.follow(tmp_path, seed.run, clock, revive=False, keep_going=lambda _: next(glances) < 4000)
    )
    told = [item.text for item in heard if isinstance(item, follow.Note)]
    assert told == ["step 100 is at stake"] * 2, "in 400 seconds"


def test_who_takes_over_ends_the_old_driver_first(tmp_path: Path) -> None:
    import psutil

    store = Store(tmp_path, synchronous="OFF")
    store.commit(Story().changes)
    old = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        started = psutil.Process(old.pid).create_time()
        store.commit(
            [
                (
                    f"run:{RUN}",
                    e.DriverStarted(at=at(1), epoch=2, pid=old.pid, start_time=started, boot_id=boot_id()),
                )
            ],
            epoch=2,
        )
        taken = take_over(store, RUN, SystemClock())
        assert taken is not None
        assert taken[1] == 3
        assert not ProcessId(old.pid, started, boot_id()).alive()
        taken[0].release()
    finally:
        old.kill()
        old.wait()


def test_stop_lets_go_of_what_a_run_kept_that_ended_as_it_was_asked(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().trained()
    before = seed.record
    seed.tell(e.NodeKept(at=at(260), until=None)).ended()
    with Lock(driver_lock(seed.directory)):  # a driver lives
        requests.stop(seed.store, before, SystemClock(), now=False)
    assert seed.record.stop is None, "there was nothing to stop"
    assert seed.record.release_requested == {seed.key}
