"""A provider that lags, lies and loses answers, and what is really there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from provisioning.base import (
    Ambiguous,
    Check,
    CredentialsError,
    LaunchRequest,
    NoCapacity,
    Refused,
    Traits,
    Unavailable,
)
from runs.facts import BillingEvidence, Inventory, Marker, NodeFacts, NodeStatus, Offer, Tariff

from .plan import Plan

FOREVER = math.inf


@dataclass
class Machine:
    """One instance as it really is. Times are seconds of the schedule."""

    id: str
    marker: Marker
    launched: float
    active: float
    """From here on it bills."""
    faults: dict[str, tuple[float, float]] = field(default_factory=dict)
    """fault → (at, seconds), times of the schedule."""
    late: bool = False
    """Nobody was told of it, and it appeared when its intent was given up."""
    accepted: float = FOREVER
    """A termination was accepted and meant."""
    ended: float = FOREVER

    @property
    def key(self) -> str:
        return self.marker.key

    @property
    def death(self) -> tuple[float, NodeStatus | None]:
        """When it ends, and what it is afterwards (None: nobody knows it any more)."""
        if not self.faults:
            return self.ended, "terminated"
        ends: list[tuple[float, NodeStatus | None]] = [(self.ended, "terminated")]
        for fault, status in (("terminated", "terminated"), ("preempted", "preempted"), ("vanished", None)):
            if fault in self.faults:
                ends.append((self.faults[fault][0], status))  # type: ignore[arg-type]
        return min(ends, key=lambda end: end[0])

    @property
    def billed_until(self) -> float:
        """When its meter stops."""
        return min(self.accepted, self.death[0])

    def alive(self, t: float) -> bool:
        """It exists and would bill on."""
        return self.launched <= t < self.billed_until

    def status(self, t: float, vanish: float) -> NodeStatus | None:
        """As an honest provider would say; None where it says that there is no such node."""
        end, last = self.death
        if t >= end:
            return last if t < end + vanish else None
        if t >= self.accepted:
            return "terminating"
        if "unhealthy" in self.faults and t >= max(self.active, self.faults["unhealthy"][0]):
            return "unhealthy"
        return "active" if t >= self.active else "booting"


class Cloud:
    """The fake provider. `checked` is called before each call that costs, with the method's name and its subject."""

    def __init__(
        self,
        plan: Plan,
        name: str,
        *,
        time: Callable[[float], float],
        date: Callable[[float], datetime],
        passage: Callable[[str], None],
        checked: Callable[[str, str], None],
        fault: Callable[[str], str | None],
    ) -> None:
        self.plan, self._time, self._date, self._passage = plan, time, date, passage
        self.name = name
        """One of its own in a store that schedules share."""
        self.traits = Traits(boot_poll_seconds=15, terminate_poll_seconds=10, audited=plan.audit != "none")
        self._checked, self._fault = checked, fault
        self.machines: dict[str, Machine] = {}
        self.launches: dict[str, int] = {}
        self.known: set[str] = set()
        """Ids that the store has."""
        tariff = Tariff(
            micro_usd_per_hour=plan.micro_usd_per_hour,
            granularity_seconds=plan.granularity_seconds,
            minimum_seconds=plan.minimum_seconds,
        )
        self._offers = [
            Offer(
                provider=name, instance_type=f"type-{index}", region="here", gpu=None, gpus=0, tariff=tariff
            )
            for index in range(plan.offers)
        ]

    def sold_out(self) -> None:
        """Nothing is on offer any more."""
        self._offers = []

    def _dark(self, t: float) -> bool:
        return any(f.kind == "blackout" and f.at <= t < f.at + f.seconds for f in self.plan.faults)

    def _read(self, method: str) -> float:
        """The time of an answer; Unavailable where none comes."""
        t = self._time(0.3)
        if self._fault(method) or self._dark(t):
            self._time(15.0)
            raise Unavailable(f"{method} failed")
        return t

    def offers(self, hardware: dict[str, object]) -> list[Offer]:
        self._passage("offers<")
        self._read("offers")
        self._passage("offers>")
        return self._offers

    def launch(self, request: LaunchRequest) -> str:
        self._passage("launch<")
        self._checked("launch", request.marker.key)
        self.launches[request.marker.key] = self.launches.get(request.marker.key, 0) + 1
        t = self._time(1.5)
        fault = self._fault("launch") or ("ambiguous" if self._dark(t) else None)
        if fault == "capacity":
            raise NoCapacity("sold out", code="insufficient-capacity")
        if fault == "refused":
            raise Refused("quota", code="quota-exceeded")
        if fault == "ambiguous":
            self._time(30.0)
            raise Ambiguous("timed out")
        machine = self._start(request.marker, t + (self.plan.late_seconds if fault == "late" else 0.0))
        machine.late = fault == "late"
        self._passage("launch>")
        if fault in {"lost", "late"}:
            self._time(30.0)
            raise Ambiguous("timed out")
        return machine.id

    def _start(self, marker: Marker, t: float) -> Machine:
        number = len(self.machines)
        faults = {
            item.what: (t + item.at, item.seconds)
            for item in self.plan.faults
            if item.kind == "node" and item.nth == number
        }
        active = FOREVER if "never-boots" in faults else t + self.plan.boot_seconds
        machine = Machine(f"i-{number}", marker, t, active, faults)
        self.machines[machine.id] = machine
        return machine

    def redacted(self, request: LaunchRequest) -> dict[str, object]:
        return {}

    def _facts(self, machine: Machine, t: float) -> NodeFacts | None:
        """One node as of `t`, which may be long ago."""
        if t < machine.launched:
            return None
        status = machine.status(t, self.plan.vanish_seconds)
        if status is None:
            return None
        # A node whose id nobody learnt and whose name is never shown is lost by its provider: docs/assumptions.md.
        named = not ("no-echo" in machine.faults and machine.id in self.known) and (
            "late-echo" not in machine.faults or t > machine.launched + 25.0
        )
        return NodeFacts(
            id=machine.id,
            name=machine.marker.name if named else "",
            key=machine.key if named else None,
            status=status,
            provider=self.name,
            ip="10.0.0.1" if status in {"active", "unhealthy"} else None,
        )

    def inventory(self) -> Inventory:
        self._passage("inventory<")
        asked = self._date(0.0)
        t = self._read("inventory") - self.plan.lag_seconds
        nodes = [facts for machine in self.machines.values() if (facts := self._facts(machine, t))]
        self._passage("inventory>")
        return Inventory(at=asked, nodes=nodes)

    def find(self, node_id: str) -> NodeFacts | None:
        self._passage("find<")
        t = self._read("find") - self.plan.lag_seconds
        machine = self.machines.get(node_id)
        self._passage("find>")
        return self._facts(machine, t) if machine else None

    def terminate(self, node_id: str) -> None:
        self._passage("terminate<")
        machine = self.machines[node_id]
        self._checked("terminate", machine.key)
        t = self._time(0.7)
        fault = self._fault("terminate") or ("ambiguous" if self._dark(t) else None)
        if fault == "refused":
            raise Refused("try later", code="conflict")
        if fault == "ambiguous":
            self._time(30.0)
            raise Ambiguous("timed out")
        known = t >= machine.launched + self.plan.lag_seconds  # a node too new to be known "is gone already"
        if fault != "lie" and known and machine.accepted == FOREVER and machine.death[0] > t:
            machine.accepted = t
            machine.ended = t + self.plan.terminate_seconds
        self._passage("terminate>")
        if fault == "lost":
            self._time(30.0)
            raise Ambiguous("reset by peer")

    def extend(self, node_id: str, marker: Marker) -> None:
        self._passage("extend<")
        self._time(0.5)
        if self._fault("extend"):
            raise Ambiguous("timed out")
        self.machines[node_id].marker = marker
        self._passage("extend>")

    def billing_evidence(self, node_id: str, since: datetime) -> BillingEvidence:
        self._passage("billing_evidence<")
        t = self._read("billing_evidence")
        if self.plan.audit == "forbidden":
            raise CredentialsError("the log may not be read")
        machine, skew = self.machines[node_id], 4000.0 if self.plan.audit == "skewed" else 0.0
        ended = machine.billed_until if t >= machine.billed_until + self.plan.audit_lag_seconds else None
        self._passage("billing_evidence>")
        return BillingEvidence(
            source="the log",
            launched=self._date(machine.launched - self._time(0.0) - skew),
            ended=self._date(ended - self._time(0.0) - skew) if ended is not None else None,
        )

    def check(self) -> Sequence[Check]:
        return ()

    def leftovers(self) -> Sequence[str]:
        return ()
