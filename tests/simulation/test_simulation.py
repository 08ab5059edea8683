"""The life of a run under faults: 10,000 schedules, and a crash at every place of a few."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest

from .campaign import campaign, every_place, ground, shrink, try_plan
from .engine import Schedule
from .plan import Fault, Plan, make

SCHEDULES = int(os.environ.get("LLMCTL_SCHEDULES", "10000"))
"""Fewer for the tests of the tests."""
PARTS = 20
"""Tests that share them, so that several processes of pytest can."""

WORLDS = {
    "lost answer": Plan(2, (Fault("call", "launch:lost"),), steps=10, every=5),
    "lying end": Plan(3, (Fault("call", "terminate:lie"),), steps=10, on_finish="3m", vanish_seconds=0.0),
    "late, for others": Plan(6, (Fault("call", "launch:late"), Fault("user", "stop", at=70.0)), steps=10, neighbour=True, audit="honest"),
    "a node dies": Plan(4, (Fault("node", "preempted", 0, at=110.0),), boot_seconds=20.0),
    "stopped while booting": Plan(5, (Fault("user", "stop", at=30.0), Fault("user", "resume", at=200.0)), steps=10),
    "handed over": Plan(6, steps=10, on_finish="3m", claim_at=10**6, claim_finish="3m", vanish_seconds=0.0),
}  # fmt: skip


@pytest.mark.parametrize("part", range(PARTS))
def test_schedules(part: int) -> None:
    """Every invariant holds in each of many schedules; a failure prints its history, shrunk."""
    begin, end = SCHEDULES * part // PARTS, SCHEDULES * (part + 1) // PARTS
    done, failure = campaign(end - begin, 1, skip=begin, processes=1)
    assert failure is None, str(failure)
    assert done == end - begin


@pytest.mark.parametrize("name", WORLDS)
def test_crash_at_every_place(name: str) -> None:
    """A driver that dies before or after any commit or call is continued by the next one."""
    places, failure = every_place(WORLDS[name])
    assert failure is None, str(failure)
    assert places > 60


def test_a_stop_at_every_place() -> None:
    """The user may ask for the end between any two steps of a driver that is to keep its node: asked in time, it keeps none."""
    plan = Plan(7, steps=10, every=5, boot_seconds=0.0, on_finish="keep")
    succeeded = 0
    with ground() as shared:
        for place in itertools.count():
            schedule = Schedule(replace(plan, stop_at=place), shared)
            schedule.go()
            run = schedule.record()
            succeeded += run.outcome == "succeeded" and run.stop is not None
            if place >= schedule.passages:
                break
    assert place >= 60
    assert succeeded > 10, "the trainer had finished as the user asked"


def test_a_claim_at_every_place() -> None:
    """Another run may want the node between any two steps of the driver that keeps it: one of them has it, and one pays."""
    plan = Plan(7, steps=10, every=5, boot_seconds=0.0, on_finish="3m")
    owners = set()
    with ground() as shared:
        for place in range(400):
            schedule = Schedule(replace(plan, claim_at=place), shared)
            schedule.go()
            assert schedule.second is not None
            owners.add(shared.eye(schedule.second).outcome)
            if place > schedule.claimable:
                break
        else:
            raise AssertionError("the first run passes more places than were tried")
    assert owners == {"succeeded", "failed"}


def test_a_schedule_is_a_function_of_its_seed() -> None:
    """The same seed gives the same plan and the same passages."""
    passed = []
    for _ in range(2):
        with ground() as shared:
            passed.append(try_plan(make(77), shared))
    assert passed[0] == passed[1]
    assert make(77) == make(77) != make(78)


def test_a_failure_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not matter is left out, and what is left still fails."""
    from .rules import Broken, Rules

    def grumble(self: Rules, *, everything: bool = False) -> None:
        if any("lie" in line for line in self.s.history):
            raise Broken("a lie was told")

    monkeypatch.setattr(Rules, "at_end", grumble)
    noise = (Fault("crash", "commit<", 5, seconds=20.0), Fault("user", "extend", at=30.0))
    with ground() as shared:
        failure, _ = try_plan(Plan(9, (*noise, Fault("call", "terminate:lie"))), shared)
    assert failure is not None
    small = shrink(failure)
    assert [fault.what for fault in small.plan.faults] == ["terminate:lie"]
    assert "a lie was told" in str(small)
    assert "terminate is called" in str(small)
