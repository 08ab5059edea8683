"""Another run of the same home: it waits for capacity that never comes, and ends on sight what others gave up."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from datetime import datetime
from typing import TYPE_CHECKING

from orchestrator.driver.loop import Driver
from orchestrator.life import world as w
from orchestrator.life.effects import Hands
from orchestrator.life.sight import SiteView
from runs import events as e
from runs.record import RunRecord

if TYPE_CHECKING:
    from .engine import Schedule

WATCHED_SECONDS = 1500.0


class Neighbour:
    """One such run. Its drivers may die like any other."""

    def __init__(self, schedule: Schedule) -> None:
        self.s, self.run = schedule, schedule.ground.new_run()
        self.provider = copy(schedule.cloud)
        self.provider.sold_out()
        created = e.RunCreated(at=schedule.now(), run=self.run, spec={**schedule.record().spec, "name": "next"}, steps=1, wait_seconds=1e9)  # fmt: skip
        schedule.eye.commit([(e.run_stream(self.run), created)])

    def watch(self) -> None:
        """Drive it for a while. What was given up and came late is gone then, and so is what it began to end."""
        from .engine import Crash
        from .rules import Broken, kept

        given_up = [node.key for node in self.s.record().nodes if node.answer == "abandoned"]
        until = self.s.t + WATCHED_SECONDS
        while self.s.t < until:
            try:
                self._drive(until)
            except Crash as crash:
                self.s.elapse(float(crash.args[0]))
                self.s.away += float(crash.args[0])
                until += float(crash.args[0])  # it watches that long itself, however long it was dead
        for machine in self.s.cloud.machines.values():
            late = machine.key in given_up and machine.alive(self.s.t)
            if late:
                raise Broken(f"{machine.key} came late, and the neighbour let it live")
        run = self.s.record()
        for node in run.owned:
            if not node.settled and not kept(run, node):
                raise Broken(f"{node.key} came late, and nobody confirmed its end")

    def _drive(self, until: float) -> None:
        from .engine import Watched

        store = Watched(self.s.home).restart(self.s.passage)
        record = store.record(self.run)
        assert record is not None
        epoch = record.epoch + 1
        started = e.DriverStarted(at=self.s.now(), epoch=epoch, pid=2, start_time=0.0, boot_id="b")
        store.commit([(e.run_stream(self.run), started)], epoch=epoch)
        driver = Driver(
            self.run, Hands(store, self.provider, Bare(), self.s, self.run, epoch, self.s.request)
        )
        while self.s.t < until:
            answer = driver.step()
            if isinstance(answer, w.EndLate):
                self.s.note(f"the neighbour: {answer}")
            self.s.elapse(min(answer.seconds, 60.0) if isinstance(answer, w.Wait) else 0.01)
        store.close()


class Bare:
    """A Site without nodes."""

    def observe(self, run: RunRecord) -> SiteView:
        return SiteView()

    def prepare(self, run: RunRecord, key: str) -> None:
        raise AssertionError("it has no node")

    def start(self, run: RunRecord, token: str, deadline: datetime | None) -> None:
        raise AssertionError("it has no node")

    def stop(self, run: RunRecord, *, checkpoint: bool) -> None:
        raise AssertionError("it has no node")

    def collect(self, run: RunRecord, steps: Sequence[int], *, weights_only: bool) -> None:
        raise AssertionError("it has no node")
