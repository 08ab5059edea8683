"""A sweep: which run is next, on which node, with how much money. The sweep only chooses; each run has a driver of its own,
and nodes are rented, handed over and ended by those alone.

It may be killed between any two instructions: what was made is in the store, and the same command carries on from there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import exits
from orchestrator.actions import plan as planning
from orchestrator.actions import requests
from orchestrator.actions.follow import UNCONFIRMED_SECONDS, Starts
from orchestrator.actions.limits import Limits
from orchestrator.clock import Clock
from orchestrator.errors import Invalid, OverBudget, Usage
from orchestrator.figures import dollars
from orchestrator.following import begin
from runs import charges
from runs import sweep as sweeps
from runs.lock import Lock
from runs.rows import MICRO, label, seed_of, usd
from runs.store import Store

if TYPE_CHECKING:
    from runs.record import NodeRecord, RunRecord
    from runs.sections import RunSpec

POLL_SECONDS = 0.5
MARGIN_SECONDS = 90.0
"""What a run may be billed for beyond its budget: its end takes so long."""
SPARE = timedelta(seconds=30)
"""A node that is kept for less than this is let go."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was planned: its runs, cheapest first."""

    spec: sweeps.SweepSpec
    points: tuple[sweeps.Point, ...]
    predicted: dict[str, int | None]
    """Micro-dollars by fingerprint."""
    margin: int
    """Micro-dollars."""
    plan: planning.Plan
    """Of the first run."""
    wait_seconds: float = 0.0

    @property
    def limit_text(self) -> str:
        """The budget in words."""
        return dollars(self.spec.budget.max_usd)

    @property
    def max_micro_usd(self) -> int:
        """The budget."""
        return round(self.spec.budget.max_usd * MICRO)


@dataclass
class Member:
    """A run of the sweep, as it is now."""

    record: RunRecord
    fingerprint: str

    @property
    def over(self) -> bool:
        """It costs nothing any more."""
        return not self.record.live and all(node.settled for node in self.record.owned)


@dataclass
class Look:
    """All runs of a sweep; those that are over are read once."""

    store: Store
    sweep: Sweep
    _over: dict[str, Member] = field(default_factory=dict)
    _prints: dict[str, str] = field(default_factory=dict)

    def members(self) -> list[Member]:
        """Oldest first."""
        found = []
        for row in reversed(self.store.summaries()):
            if row.get("sweep") != self.sweep.spec.name:
                continue
            run = row["run"]
            if run not in self._over:
                record = self.store.record(run)
                if record is None:
                    continue
                if run not in self._prints:
                    self._prints[run] = sweeps.fingerprint(record.spec)
                member = Member(record, self._prints[run])
                if not member.over:
                    found.append(member)
                    continue
                self._over[run] = member
            found.append(self._over[run])
        return found


# ---------------------------------------------------------------- planning


def plan(store: Store | None, file: Path, wait: str | None) -> Sweep:
    """Read the file, expand it, and predict each run. Raises SpecError, ProviderError, DataError, Invalid."""
    from runs import predict

    spec = sweeps.load(file)
    points = [_ready(spec, point, store) for point in sweeps.expand(spec, file.absolute().parent)]
    first = points[0].spec
    if first.hardware.nodes > spec.nodes:
        raise Invalid(
            f"a run takes {first.hardware.nodes} nodes, and the sweep may have {spec.nodes}", "raise nodes"
        )
    made = planning.make(store, first, Limits.read(wait, spec.budget.max_usd))
    predicted: dict[str, int | None] = {}
    margin = 0
    if made.chosen is not None:
        offer = made.chosen.offer
        evidence = planning.history(store, first.hardware.provider)
        for point in points:
            told = predict.predict(point.spec, offer, evidence, made.transfer or predict.Transfer())
            predicted[point.fingerprint] = round(told.cost_usd * MICRO) if told.cost_usd is not None else None
        seconds = MARGIN_SECONDS + offer.tariff.granularity_seconds
        margin = first.hardware.nodes * charges.price(seconds, offer.tariff.micro_usd_per_hour)
    points.sort(key=lambda point: predicted.get(point.fingerprint) or 0)  # stable: as in the file where alike
    return Sweep(spec, tuple(points), predicted, margin, made, Limits.read(wait, None).wait_seconds)


def _ready(sweep: sweeps.SweepSpec, point: sweeps.Point, store: Store | None) -> sweeps.Point:
    """The run under the sweep's name; one of tuning with what follows from its base, by which it is known again."""
    ready = planning.completed(store, point.spec)
    spec = ready.model_copy(update={"name": sweep.name})
    return replace(point, spec=spec, fingerprint=sweeps.fingerprint(spec.to_dict()))


def refuse(sweep: Sweep, members: Sequence[Member]) -> None:
    """Raise where the runs that are left will not fit into what is left of the budget."""
    if sweep.plan.chosen is None:
        planning.refuse(sweep.plan)
    left = pending(sweep, members)
    needed = sum((sweep.predicted.get(point.fingerprint) or 0) for point in left)
    free = sweep.max_micro_usd - committed(sweep, members)
    if left and needed + sweep.margin * min(len(left), sweep.spec.nodes) > free:
        raise OverBudget(
            f"the {len(left)} runs that are left will cost about {dollars(needed / MICRO)}, and {dollars(max(0, free) / MICRO)}"
            f" of {dollars(sweep.spec.budget.max_usd)} are left",
            "raise budget.max_usd, or make fewer or shorter runs",
        )


def pending(sweep: Sweep, members: Sequence[Member]) -> list[sweeps.Point]:
    """The runs that were not made yet, the next one first."""
    made = {member.fingerprint for member in members}
    return [point for point in sweep.points if point.fingerprint not in made]


def committed(sweep: Sweep, members: Sequence[Member]) -> int:
    """Micro-dollars that are spent, or promised to runs that may still spend them."""
    total, now = 0, _now()
    for member in members:
        cost = charges.total(member.record, now)
        promised = 0 if member.over else (member.record.max_micro_usd or 0) + sweep.margin
        total += max(cost, promised)
    return total


def _now() -> Any:
    from runs.store import utcnow

    return utcnow()


# ---------------------------------------------------------------- driving


class Driving:
    """One process that makes the runs of a sweep, until all are made or the money does not reach."""

    def __init__(self, store: Store, sweep: Sweep, clock: Clock) -> None:
        self.store, self.sweep, self._clock = store, sweep, clock
        self._look = Look(store, sweep)
        self._starts: dict[str, Starts] = {}
        self._told: dict[str, str] = {}

    def go(self) -> list[Member]:
        """Make every run that was not made; the runs as they ended. Raises Usage where another process is at it."""
        lock = Lock(self.store.home / "sweeps" / f"{self.sweep.spec.name}.lock")
        if not lock.acquire(patience=1.0):
            raise Usage(
                f"another process makes the runs of {self.sweep.spec.name}",
                f"`llmctl compare --sweep {self.sweep.spec.name}` shows how far it is",
            )
        try:
            return self._go(threading.Event())
        finally:
            lock.release()

    def _go(self, never: threading.Event) -> list[Member]:
        waiting_since: float | None = None
        while True:
            members = self._look.members()
            for member in members:
                self._tell(member)
                self._attend(member)
            if self._start_next(members):
                continue
            if all(member.over for member in members):
                return members
            live = any(member.record.live for member in members)
            waiting_since = None if live else (waiting_since or self._clock.monotonic())
            if waiting_since is not None:
                if self._clock.monotonic() - waiting_since > UNCONFIRMED_SECONDS:
                    return members  # a termination that nobody confirms: the drivers go on trying
                self._release(members)
            self._clock.wait(never, POLL_SECONDS)

    def _attend(self, member: Member) -> None:
        """A run that has something left to do and no driver gets one, within bounds."""
        record = member.record
        kept_on = all(
            node.settled or (record.keeps(node) and node.kept_until is None) for node in record.owned
        )
        if record.live or not kept_on:
            self._starts.setdefault(record.run, Starts(self.store.home, record.run, self._clock)).ensure()

    def _tell(self, member: Member) -> None:
        """A line on stderr whenever the state of a run changed."""
        record = member.record
        if self._told.get(record.run) != record.state:
            self._told[record.run] = record.state
            what = label(record.overrides) or "as the spec says"
            chosen = seed_of(record.overrides)
            seed = f" seed={chosen}" if chosen is not None else ""
            why = f" ({record.reason})" if record.reason and record.reason != "finished" else ""
            sys.stderr.write(f"{record.run}  {record.state}{why}  {what}{seed}\n")
            sys.stderr.flush()

    # ------------------------------------------------------------ the next run

    def _start_next(self, members: Sequence[Member]) -> bool:
        """Begin the next run where there is a node, or room for one, and money; whether that was done."""
        left = pending(self.sweep, members)
        live = [member.record for member in members if member.record.live]
        need = left[0].spec.hardware.nodes if left else 0
        if not left or (len(live) + 1) * need > self.sweep.spec.nodes:
            return False
        node = next(self._free(members), None) if need == 1 else None
        if node is None and occupied(members) + need > self.sweep.spec.nodes:
            return False
        limit = self._limit(left, members)
        if limit is None:
            return False
        last = len(left) == 1 or need > 1
        values = left[0].spec.to_dict()
        values["node"]["on_finish"] = "terminate" if last else self.sweep.spec.keep
        origin = requests.Origin(
            self.sweep.spec.name, left[0].overrides, node.key if node is not None else None, on_or_rent=True
        )
        chosen = replace(self.sweep.plan, spec=_spec(values))
        begin.begin(self.store, chosen, Limits(self.sweep.wait_seconds, limit / MICRO), origin)
        return True

    def _free(self, members: Sequence[Member]) -> Iterator[NodeRecord]:
        """The nodes that runs of the sweep keep, and that no other run of it was sent to."""
        wanted = {member.record.on for member in members if member.record.live and not member.record.attempts}
        for member in members:
            if member.record.live:
                continue
            for node in member.record.owned:
                soon = node.kept_until is not None and node.kept_until - self._clock.now() < SPARE
                if member.record.keeps(node) and not soon and node.key not in wanted:
                    yield node

    def _limit(self, left: Sequence[sweeps.Point], members: Sequence[Member]) -> int | None:
        free = self.sweep.max_micro_usd - committed(self.sweep, members)
        cap = left[0].spec.budget.max_usd
        return sweeps.allowance(
            free,
            self.sweep.margin,
            [self.sweep.predicted.get(point.fingerprint) for point in left],
            round(cap * MICRO) if cap is not None else None,
        )

    def _release(self, members: Sequence[Member]) -> None:
        """Nothing is left to be made: whoever keeps a node is asked to let it go."""
        for member in members:
            if any(map(member.record.keeps, member.record.owned)):
                requests.stop(self.store, member.record, self._clock, now=False)


def _spec(values: dict[str, Any]) -> RunSpec:
    from runs import spec as specs

    return specs.from_dict(values)


def occupied(members: Sequence[Member]) -> int:
    """Nodes that bill, and those that living runs are about to rent."""
    count = 0
    for member in members:
        record = member.record
        nodes = sum(not node.settled for node in record.owned)
        claims = record.live and not record.attempts and record.on_node is not None and record.on_node.kept
        coming = record.spec["hardware"].get("nodes") or 1 if record.live and not claims else 0
        count += max(nodes, coming)
    return count


# ---------------------------------------------------------------- what came of it


def document(sweep: Sweep, members: Sequence[Member]) -> dict[str, Any]:
    """`sweep --json`: the budget, every run that was made or will be, and the means by variant."""
    now = _now()
    rows = [
        {
            "run": member.record.run, "state": member.record.state, "reason": member.record.reason,
            "overrides": dict(member.record.overrides),
            "max_usd": usd(member.record.max_micro_usd) if member.record.max_micro_usd is not None else None,
            "cost_usd": usd(charges.total(member.record, now)), "nodes": [node.key for node in member.record.nodes],
            "train_loss": member.record.summary.get("train_loss"),
            "validation_loss": member.record.summary.get("validation_loss"),
        }
        for member in members
    ]  # fmt: skip
    left = pending(sweep, members)
    return {
        "sweep": sweep.spec.name,
        "max_usd": sweep.spec.budget.max_usd,
        "cost_usd": usd(sum(charges.total(member.record, now) for member in members)),
        "runs": rows,
        "left": [
            {
                "overrides": point.overrides,
                "predicted_usd": None
                if (cost := sweep.predicted.get(point.fingerprint)) is None
                else usd(cost),
            }
            for point in left
        ],
    }


def exit_code(sweep: Sweep, members: Sequence[Member]) -> int:
    """8 where anything may still bill, 100 where a run failed, 103 where one was stopped or the money did not reach."""
    codes = [exits.exit_code_of(member.record) for member in members]
    if exits.MAY_BILL in codes:
        return exits.MAY_BILL
    if any(member.record.outcome in {"failed", "lost"} for member in members):
        return exits.RUN_FAILED
    if any(member.record.outcome == "stopped" for member in members) or pending(sweep, members):
        return exits.STOPPED
    return next((code for code in codes if code != exits.OK), exits.OK)


def interrupted(members: Sequence[Member]) -> int:
    """Ctrl-C: what was begun goes on. The exit code."""
    if not any(requests.rented(member.record) for member in members):
        for member in members:
            sys.stderr.write(f"{member.record.run} goes on: `llmctl stop {member.record.run}` ends it\n")
        return exits.UNFINISHED if members else exits.INTERRUPTED
    rate = sum(charges.rate(member.record) for member in members) / MICRO
    sys.stderr.write(
        f"\nthe runs that were begun go on without you: {dollars(rate)}/h; the same command carries the sweep on\n"
    )
    return exits.UNFINISHED
