"""One schedule: a world, its drivers one after the other, and the user."""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orchestrator.driver.loop import Driver
from orchestrator.life import world as w
from orchestrator.life.effects import Hands
from provisioning.base import LaunchRequest
from runs import events as e
from runs.facts import Marker, Offer
from runs.record import RunRecord
from runs.store import Store

from .cloud import Cloud
from .neighbour import Neighbour
from .nodes import Box, Nodes
from .plan import Fault, Plan
from .rules import Broken, Rules

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
MOST_SECONDS = 40 * 3600.0
MOST_STEPS = 6000
MOST_EFFECTS = 60
"""Effects in a row without a wait between them."""


class Crash(BaseException):
    """`kill -9`: nothing that the driver had in memory is left."""


class Disk(Store):
    """A connection. What `status` shows is made at each commit of a schedule that wants it, and compared there; the others
    save a fifth of their time."""

    shown = True

    def __init__(self, home: Path) -> None:
        super().__init__(home, synchronous="OFF")

    def _summary(self, record: RunRecord, at: datetime) -> str:
        return super()._summary(record, at) if self.shown else "{}"


class Watched(Disk):
    """A driver's connection, whose commits are places to crash at."""

    passage: Callable[[str], None]

    def restart(self, passage: Callable[[str], None]) -> Watched:
        """The connection of another process, which has nothing but what is on disk."""
        self.passage = passage
        self._runs, self._nodes, self._views, self._seen_version = {}, {}, {}, -1
        return self

    def commit(self, changes: Any, *, epoch: int | None = None, run: str | None = None) -> None:
        """Commit, or die before or after it."""
        self.passage("commit<")
        super().commit(changes, epoch=epoch, run=run)
        self.passage("commit>")


class Ground:
    """What several schedules share: a store, and connections that are not a driver's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.user = Disk(home)
        self.reader = Disk(home)
        """Never writes, so that what it has was read from the disk."""
        self.drivers = deque((Watched(home), Watched(home)))
        """Of this driver, and of the one before it, which may still want to write."""
        self.disk = sqlite3.connect(self.user.path, isolation_level=None)
        self.runs = len(self.user.runs())

    def new_run(self) -> str:
        """The id of another run."""
        self.runs += 1
        return _run_id(self.runs)

    def eye(self, run: str) -> RunRecord:
        """The record of any run."""
        record = self.user.record(run)
        assert record is not None
        return record

    def close(self) -> None:
        """Close the connections."""
        for store in (self.user, self.reader, *self.drivers):
            store.close()
        self.disk.close()


@dataclass(frozen=True)
class Side:
    """One run of a schedule, with the disks that it sees."""

    run: str
    plan: Plan
    rules: Rules
    boxes: dict[str, Box]
    here: dict[int, str]


class Schedule:
    """Runs one plan to its end. Raises Broken where an invariant does not hold."""

    def __init__(self, plan: Plan, ground: Ground) -> None:
        self.plan, self.ground, self.home = plan, ground, ground.home
        self.t = 0.0
        self.passages = 0
        self.away = 0.0
        self.claimed = 0.0
        """Seconds without a driver."""
        self.told: list[tuple[float, object]] = []
        """(time, what happened), for the history of a failure."""
        self._places: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self._crashes = {(f.what, f.nth): f for f in plan.faults if f.kind == "crash"}
        self._actions = sorted((f for f in plan.faults if f.kind == "user"), key=lambda fault: fault.at)
        self.eye = ground.user
        self.run = ground.new_run()
        self.second: str | None = None
        """The run that claims the node that the first one keeps."""
        self.runs = [self.run]
        self.claimable = 0
        self.boxes: dict[str, Box] = {}
        self.here: dict[int, str] = {}
        self.cloud = Cloud(
            plan,
            self.run,
            time=self.elapse,
            date=self.date,
            passage=self.passage,
            checked=self.checked,
            fault=self.fault,
        )
        self.rules = Rules(self)
        for store in (ground.user, *ground.drivers):
            store.shown = self.rules.everything_shown
        self.epoch = 0

    # ------------------------------------------------------------ the world's clock and its dice

    def elapse(self, seconds: float) -> float:
        """Time passes; seconds of the schedule."""
        self.t += seconds
        return self.t

    def date(self, ahead: float) -> datetime:
        """The wall clock, `ahead` seconds from now."""
        return START + timedelta(seconds=self.t + ahead)

    def now(self) -> datetime:
        """Clock."""
        return self.date(0.0)

    def monotonic(self) -> float:
        """Clock."""
        return self.t

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Clock; a step never waits."""
        raise AssertionError("nothing waits inside a step")

    def note(self, what: object) -> None:
        """Remember for the history of a failure."""
        self.told.append((self.t, what))

    @property
    def history(self) -> list[str]:
        """What happened, a line each."""
        return [f"{t:9.2f}  {what}" for t, what in self.told]

    def passage(self, place: str) -> None:
        """A place where a driver may die."""
        nth = self._places.get(place, 0)
        self._places[place] = nth + 1
        self.passages += 1
        if (place, nth) in self._crashes or self.passages - 1 == self.plan.crash_at:
            fault = self._crashes.get((place, nth), Fault("crash", place, seconds=20.0))
            self.note(f"CRASH at {place} #{nth}, {fault.seconds} s away")
            raise Crash(fault.seconds)
        if self.passages - 1 == self.plan.stop_at:
            self._act(Fault("user", "stop"))
        self._maybe_claim()

    def fault(self, method: str) -> str | None:
        """The fault of this call of `method`, if it has one."""
        nth = self._calls.get(method, 0)
        self._calls[method] = nth + 1
        for item in self.plan.faults:
            if item.kind == "call" and item.nth == nth and item.what.startswith(f"{method}:"):
                self.note(f"fault {item.what}")
                return item.what.partition(":")[2]
        return None

    def checked(self, method: str, key: str) -> None:
        """Before a call that costs."""
        self.note(f"{method} is called for {key}")
        self.rules.before_call(method, key)

    # ------------------------------------------------------------ drivers

    def create(self, on: str | None = None) -> None:
        """The user's `launch`, or `launch --on`."""
        plan = self.plan
        spec = {
            "name": "sim",
            "hardware": {"provider": "sim", "nodes": plan.nodes},
            "checkpoint": {"fetch": plan.fetch},
            "node": {"on_finish": plan.on_finish, "boot_timeout": "3m", "replace": True, "max_restarts": plan.max_restarts},
            "train": {"processes_per_node": None, "device": "cpu", "global_batch_size": 8},
        }  # fmt: skip
        created = e.RunCreated(at=self.now(), run=self.run, spec=spec, steps=plan.steps, max_micro_usd=plan.max_micro_usd,
                               max_seconds=plan.max_seconds, wait_seconds=plan.wait_seconds, on=on)  # fmt: skip
        self.eye.commit([(e.run_stream(self.run), created)])

    def take_over(self, previous: Driver | None) -> Driver:
        """A new driver process: nothing of the old one but the store."""
        self.passage("take-over<")
        self.ground.drivers.rotate()
        store = self.ground.drivers[0].restart(self.passage)
        record = store.record(self.run)
        assert record is not None
        self.epoch = record.epoch + 1
        started = e.DriverStarted(at=self.now(), epoch=self.epoch, pid=1, start_time=0.0, boot_id="b")
        store.commit([(e.run_stream(self.run), started)], epoch=self.epoch)
        if previous is not None:
            self.rules.refused(previous.hands.store, previous.hands.epoch)
        site = Nodes(
            self.plan, self.cloud, self.boxes, self.here,
            time=self.elapse, date=self.date, passage=self.passage, fault=self.fault,
        )  # fmt: skip
        return Driver(self.run, Hands(store, self.cloud, site, self, self.run, self.epoch, self.request))

    def request(self, marker: Marker, offer: Offer) -> LaunchRequest:
        """A launch request without keys."""
        return LaunchRequest(marker, offer, "owner", "", None, None)

    def record(self) -> RunRecord:
        """The record as another process reads it."""
        record = self.eye.record(self.run)
        assert record is not None
        return record

    def go(self) -> None:
        """From `launch` to the end of the last driver, late arrivals included."""
        self.create()
        self.drive()
        while self._actions:  # what the user does after the run has ended
            self.t = max(self.t, self._actions[0].at)
            self._act(self._actions.pop(0))
            self.drive()
        self.rules.at_end()
        if self.plan.claim_at is not None and self.second is None:
            with suppress(Crash):
                self._claim()
        sides = [Side(self.run, self.plan, self.rules, self.boxes, self.here)]
        if self.second is not None:
            plan = replace(self.plan, on_finish=self.plan.claim_finish, claim_at=None)
            sides.append(Side(self.second, plan, Rules(self), {}, {}))
            self._use(sides[1])
            # Its driver died as it had claimed the node, and nobody drove it since.
            self.away += self.t - self.claimed
            self.drive()
            self.rules.at_end()
        self.elapse(150.0 + self.plan.late_seconds)
        for side in sides:
            self._use(side)
            if self.plan.neighbour and any(node.answer == "abandoned" for node in self.record().nodes):
                Neighbour(self).watch()
            self._clean_up()
        self.rules.shared()

    def _use(self, side: Side) -> None:
        self.run, self.plan, self.rules = side.run, side.plan, side.rules
        self.boxes, self.here = side.boxes, side.here

    def _clean_up(self) -> None:
        """`reap`, and the end of what is kept."""
        self.drive(look=True)
        for node in self.record().owned:
            if node.kept:
                self.note(f"release of {node.key} is requested")
                self.eye.commit([(e.run_stream(self.run), e.ReleaseRequested(at=self.now(), key=node.key))])
                self.drive()
        self.rules.at_end(everything=True)

    # ------------------------------------------------------------ another run on the same node

    def _maybe_claim(self) -> None:
        """Another process may claim the node between any two steps of the first run's driver."""
        if self.plan.claim_at is None or self.second is not None or not self.boxes:
            return
        self.claimable += 1
        if self.claimable > self.plan.claim_at:
            self._claim()

    def _claim(self) -> None:
        """`launch --on`: the second run's driver takes the node, or is told why not; it dies right after."""
        node = next((node for node in self.record().nodes if node.answer == "known"), None)
        if node is None:
            return
        first, epoch, plan = self.run, self.epoch, self.plan
        self.run = self.second = self.ground.new_run()
        self.plan = replace(plan, on_finish=plan.claim_finish, claim_at=None, crash_at=None)
        self.claimed = self.t
        self.note(f"{self.second} wants {node.key}")
        try:
            self.create(node.key)
            self.runs.append(self.run)
            driver = self.take_over(None)
            self.note(f"it does {driver.step()}")
        finally:
            self.run, self.epoch, self.plan = first, epoch, plan

    def drive(self, *, look: bool = False) -> None:
        """Drivers, one after the other, until one says that it is done."""
        driver: Driver | None = None
        while True:
            try:
                driver = self.take_over(driver)
                while look and driver.hands.sight.inventory is None:
                    driver.hands.perform(w.Look("reap"), self.record())
                    self.elapse(20.0)
                self._steps(driver)
            except Crash as crash:
                seconds = float(crash.args[0])
                self._users_until(self.t + seconds)
                self.away += seconds
            else:
                return

    def _steps(self, driver: Driver) -> None:
        effects = 0
        for _ in range(MOST_STEPS):
            before = self.t
            self._users_until(self.t)
            answer = driver.step()
            record = driver.hands.store.record(self.run)
            assert record is not None
            self.cloud.known.update(node.id for node in record.nodes if node.id)
            if not isinstance(answer, w.Wait):
                self.note(type(answer).__name__ if isinstance(answer, w.BeginAttempt | w.Launch) else answer)
            self.rules.after_step(answer, record)
            if isinstance(answer, w.Done):
                return
            if isinstance(answer, w.Wait):
                effects = 0
                self._sleep(driver, record, answer)
            else:
                effects += 1
            if effects > MOST_EFFECTS:
                raise Broken(f"{effects} effects without a wait; the last: {answer}")
            if self.t > MOST_SECONDS:
                raise Broken(f"the run has no end; it does {answer}")
            if self.t == before:
                self.elapse(0.01)
        raise Broken(f"the run has no end after {MOST_STEPS} steps")

    def _sleep(self, driver: Driver, record: RunRecord, answer: w.Wait) -> None:
        """Until the wait is over, something is heard from a node, or the user does something."""
        if answer.seconds <= 0:
            raise Broken(f"a wait of {answer.seconds} s: {answer.why}")
        site = driver.hands.site
        assert isinstance(site, Nodes)
        until = min(self.t + answer.seconds, site.next_time(record, self.t) + 0.01)
        if self._actions:
            until = min(until, max(self.t, self._actions[0].at))
        self.t = max(until, self.t + 0.01)

    # ------------------------------------------------------------ the user

    def _users_until(self, t: float) -> None:
        while self._actions and self._actions[0].at <= t:
            self.t = max(self.t, self._actions[0].at)
            self._act(self._actions.pop(0))
        self.t = max(self.t, t)

    def _act(self, action: Fault) -> None:
        record, now, stream = self.record(), self.now(), e.run_stream(self.run)
        self.note(f"user: {action.what}")
        if action.what == "resume":
            if record.outcome in {"failed", "stopped", "lost"}:
                more = (record.max_micro_usd or 0) + 2_000_000 if record.max_micro_usd else None
                self.eye.commit([(stream, e.ResumeRequested(at=now, max_micro_usd=more))])
        elif action.what == "extend":
            self.rules.extended = True
            longer = record.max_seconds + 1800 if record.max_seconds else None
            more = record.max_micro_usd + 1_000_000 if record.max_micro_usd else None
            self.eye.commit([(stream, e.LimitsRaised(at=now, max_micro_usd=more, max_seconds=longer))])
        elif record.live:
            events: dict[str, Iterable[Any]] = {
                "stop": [e.StopRequested(at=now, reason="user")],
                "stop-now": [e.StopRequested(at=now, reason="user", checkpoint=False)],
                "cancel": [e.WaitCancelled(at=now)],
            }
            self.eye.commit([(stream, event) for event in events[action.what]])


def _run_id(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    word = ""
    for _ in range(4):
        number, digit = divmod(number, 36)
        word = digits[digit] + word
    return f"sim-{word}"
