"""Dollars, computed from events and tariffs. Pure; integer micro-dollars.

A node bills from the moment it was first seen active (counted from the last moment at which it was known not to be, so that
a driver that was away errs on the side of the bill) to the moment at which its termination was accepted, once the provider
confirms that it is gone; where it was shown running after that, to the first at which it was not. Until then the figure is an
upper bound and says so. So is that of a node which ended by itself while nobody looked (it was kept, or no driver lived): it
bills until it was found gone, and only a provider's log could tell better.

A node that several runs had one after the other has one bill, split at the moments of the claims: each run pays from its claim
to the next, the time for which it kept the node included. What the provider's rounding and minimum add falls to the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate

from runs.events import PHASES, Phase
from runs.facts import BillingEvidence, Tariff
from runs.record import AttemptRecord, NodeRecord, RunRecord

DOUBT = timedelta(minutes=1)
"""How long a node may have been active between two looks that did not see it so, before that is billed."""


UNSEEN = timedelta(minutes=5)
"""How long before it was found gone a node that ended by itself may have been seen last, for its bill to be the whole truth: what
a driver needs to notice and to believe it."""


@dataclass(frozen=True)
class Bill:
    """What one node costs: [start, end) in billed time, rounded as its tariff rounds."""

    start: datetime
    end: datetime
    """When the meter stopped, or `now`."""
    seconds: float
    """Billed seconds, rounding and minimum included."""
    micro_usd: int
    final: bool
    """False: the node still bills, its end is not confirmed, or nobody saw when it began or ended; the figure is an upper bound."""


@dataclass(frozen=True)
class Charge:
    """A priced interval of a node's life."""

    node: str
    phase: Phase
    start: datetime
    end: datetime
    micro_usd: int

    @property
    def seconds(self) -> float:
        """Wall seconds of the interval."""
        return (self.end - self.start).total_seconds()


def billed(seconds: float, tariff: Tariff) -> float:
    """`seconds` of life as billed: up to the minimum, then up to a whole multiple of the granularity."""
    seconds = max(seconds, tariff.minimum_seconds)
    whole = tariff.granularity_seconds
    return float(math.ceil(round(seconds, 6) / whole) * whole) if whole > 1 else seconds


def price(seconds: float, micro_usd_per_hour: int) -> int:
    """Micro-dollars of billed seconds, rounded to the nearest."""
    return round(seconds * micro_usd_per_hour / 3600)


def node_bill(node: NodeRecord, now: datetime) -> Bill | None:
    """The bill of one node at `now`; None where none has begun (refused, abandoned, still booting)."""
    end, final = _end(node, now)
    start = node.active_not_before or node.active_at
    if node.active_at is None:
        # Never seen active: it billed at most from when it was last known not to be. Under a minute of doubt is none.
        if node.answer != "known" or not (node.gone_at or node.terminate_intended_at):
            return None
        start = start or (node.observed_at if node.status == "booting" else None) or node.intended_at
        if end - start < DOUBT:
            return None
        final = final and node.billing_ended_at is not None
    assert start is not None
    end = max(end, start)
    tariff = node.offer.tariff
    seconds = billed((end - start).total_seconds(), tariff)
    rate = node.micro_usd_per_hour or tariff.micro_usd_per_hour
    return Bill(start=start, end=end, seconds=seconds, micro_usd=price(seconds, rate), final=final)


def node_share(node: NodeRecord, run: str, now: datetime) -> Bill | None:
    """What `run` pays of the node's bill; None where it is none of its business, or nothing has begun."""
    bill = node_bill(node, now)
    if bill is None or not node.claims or run not in node.tenants:
        return bill if run in node.tenants else None
    rate = node.micro_usd_per_hour or node.offer.tariff.micro_usd_per_hour
    claims = [max(bill.start, min(claim.at, bill.end)) for claim in node.claims]
    moments = [bill.start, *accumulate(claims, max), bill.end]
    seconds = [(at - bill.start).total_seconds() for at in moments[:-1]] + [bill.seconds]
    # Counted from the first moment, so that the shares sum to the bill to the micro-dollar.
    spent = [min(price(until, rate), bill.micro_usd) for until in seconds[:-1]] + [bill.micro_usd]
    turn = node.tenants.index(run)
    return Bill(
        start=moments[turn],
        end=moments[turn + 1],
        seconds=seconds[turn + 1] - seconds[turn],
        micro_usd=spent[turn + 1] - spent[turn],
        final=bill.final or (turn < len(node.claims) and _seen_until(node, node.claims[turn].at)),
    )


def _end(node: NodeRecord, now: datetime) -> tuple[datetime, bool]:
    if node.billing_ended_at is not None:
        return node.billing_ended_at, True
    if node.gone_at is not None:
        accepted = node.terminate_accepted_at
        if accepted is not None and node.running_at is not None and node.running_at > accepted:
            accepted = node.running_until  # that acceptance was none
        end = accepted or node.gone_at
        return end, _seen_until(node, end)
    return now, False


def _seen_until(node: NodeRecord, moment: datetime) -> bool:
    """Whether a node that is gone was seen to be there until about `moment`: a termination is accepted of one that ended long
    before, too."""
    return node.seen_at is None or moment - node.seen_at <= UNSEEN


def contradiction(node: NodeRecord, said: BillingEvidence) -> str | None:
    """Why a log cannot be right about a node, beside what was seen here; None where it can. Up to a minute is doubt of clocks."""
    if said.launched is not None and said.launched < node.intended_at - DOUBT:
        return "it has a launch before the one that was intended"
    if said.ended is None:
        return None
    seen = max(at for at in (node.intended_at, node.active_at, node.ready_at) if at is not None)
    if said.ended < seen - DOUBT:
        return "the node was seen alive after that end"
    if node.gone_at is not None and said.ended > node.gone_at + DOUBT:
        return "the node was seen gone before that end"
    return None


def total(run: RunRecord, now: datetime) -> int:
    """Micro-dollars of all nodes of the run so far."""
    return sum(bill.micro_usd for _, bill in bills(run, now))


def accrued(run: RunRecord, now: datetime) -> int:
    """As `total`, without the rounding of meters that still run: it grows evenly, so that what is left divides into time."""
    spent = 0
    for node, bill in bills(run, now):
        speed = node.micro_usd_per_hour or node.offer.tariff.micro_usd_per_hour
        spent += bill.micro_usd if bill.final else price((bill.end - bill.start).total_seconds(), speed)
    return spent


def rate(run: RunRecord) -> int:
    """Micro-dollars per hour of the nodes that may bill now."""
    return sum(
        node.micro_usd_per_hour or node.offer.tariff.micro_usd_per_hour
        for node in run.owned
        if node.may_bill and node.answer == "known"
    )


def bills(run: RunRecord, now: datetime) -> list[tuple[NodeRecord, Bill]]:
    """The nodes of a run that have a bill, with the run's share of it."""
    return [(node, bill) for node in run.nodes if (bill := node_share(node, run.run, now))]


def charges(run: RunRecord, now: datetime) -> list[Charge]:
    """The bill of a run, by node and phase: intervals that do not overlap and whose dollars sum to the bill."""
    return [charge for node, bill in bills(run, now) for charge in _node_charges(run, node, bill)]


def _node_charges(run: RunRecord, node: NodeRecord, bill: Bill) -> list[Charge]:
    pieces = partition(bill.start, bill.end, _claims(run, node, bill))
    rate = node.micro_usd_per_hour or node.offer.tariff.micro_usd_per_hour
    result, spent = [], 0
    for index, (phase, start, end) in enumerate(pieces):
        # Cumulative, so that rounding never adds up; the provider's own rounding falls to the last phase.
        until = price((end - bill.start).total_seconds(), rate)
        until = bill.micro_usd if index == len(pieces) - 1 else min(until, bill.micro_usd)
        result.append(Charge(node=node.key, phase=phase, start=start, end=end, micro_usd=until - spent))
        spent = until
    return result


def _claims(run: RunRecord, node: NodeRecord, bill: Bill) -> list[tuple[Phase, datetime, datetime]]:
    """What each phase asks of the node's time; overlaps are settled by `partition`."""
    claims: list[tuple[Phase, datetime, datetime]] = []
    for attempt in run.attempts:
        if node.key in attempt.keys:  # what the run did on other nodes is nothing that this one was paid for
            claims += _service(run, attempt, bill)
    trained = sorted(start for _, start, _ in claims)
    if node.ready_at is None:
        claims.append(("booting", bill.start, node.terminate_intended_at or bill.end))
    else:
        claims.append(("booting", bill.start, node.ready_at))
    for attempt in run.attempts:
        if node.key not in attempt.keys:
            continue
        begin = max(attempt.started_at, node.ready_at or bill.end)
        finish = attempt.trainer_ended_at or attempt.ended_at or node.terminate_intended_at or bill.end
        first = next((start for start in trained if begin <= start < finish), finish)
        claims.append(("preparing", begin, first))
        if attempt.trainer_ended_at is not None:
            ends = (node.terminate_intended_at, attempt.ended_at)  # the earlier: a kept node ends long after
            until = min((at for at in ends if at is not None), default=bill.end)
            claims.append(("collecting", attempt.trainer_ended_at, until))
    if node.terminate_intended_at is not None:
        claims.append(("releasing", node.terminate_intended_at, bill.end))
    return claims


def _service(
    run: RunRecord, attempt: AttemptRecord, bill: Bill
) -> Iterable[tuple[Phase, datetime, datetime]]:
    """The measured intervals of an attempt."""
    begin, finish = attempt.started_at, attempt.ended_at or bill.end
    for phase, start, end in run.intervals:
        a, b = max(datetime.fromtimestamp(start, UTC), begin), min(datetime.fromtimestamp(end, UTC), finish)
        if a < b:
            yield phase, a, b  # type: ignore[misc]


def partition(
    start: datetime, end: datetime, claims: Iterable[tuple[Phase, datetime, datetime]]
) -> list[tuple[Phase, datetime, datetime]]:
    """Split [start, end) so that each moment belongs to the first claiming phase in the order of PHASES, else to idle."""
    clipped = [(phase, max(a, start), min(b, end)) for phase, a, b in claims if max(a, start) < min(b, end)]
    if start == end:
        return [("idle", start, end)]
    changes = [(a, rank, 1) for phase, a, _ in clipped for rank in (_RANK[phase],)]
    changes += [(b, rank, -1) for phase, _, b in clipped for rank in (_RANK[phase],)]
    changes.sort()
    active, since = [0] * len(PHASES), start
    pieces: list[tuple[Phase, datetime, datetime]] = []
    for at, rank, change in [*changes, (end, 0, 0)]:
        if at > since:
            phase: Phase = next((PHASES[index] for index, count in enumerate(active) if count), "idle")
            if pieces and pieces[-1][0] == phase:
                pieces[-1] = (phase, pieces[-1][1], at)
            else:
                pieces.append((phase, since, at))
            since = at
        active[rank] += change
    return pieces


_RANK = {phase: index for index, phase in enumerate(PHASES)}


@dataclass(frozen=True)
class Totals:
    """A run's bill in one place."""

    micro_usd: int
    billed_seconds: float
    training_seconds: float
    by_phase: dict[str, int]
    """Micro-dollars by phase."""
    seconds_by_phase: dict[str, float]
    final: bool

    @property
    def overhead_fraction(self) -> float | None:
        """1 − training / billed node-seconds; None where nothing was billed."""
        return 1 - self.training_seconds / self.billed_seconds if self.billed_seconds > 0 else None

    @property
    def training_micro_usd(self) -> int:
        """Micro-dollars of kept training steps."""
        return self.by_phase.get("training", 0)


def totals(run: RunRecord, now: datetime) -> Totals:
    """Sums over all nodes of a run."""
    by_phase: dict[str, int] = {}
    seconds: dict[str, float] = {}
    found = bills(run, now)
    for node, bill in found:
        for item in _node_charges(run, node, bill):
            by_phase[item.phase] = by_phase.get(item.phase, 0) + item.micro_usd
            seconds[item.phase] = seconds.get(item.phase, 0.0) + item.seconds
    return Totals(
        micro_usd=sum(bill.micro_usd for _, bill in found),
        billed_seconds=sum(bill.seconds for _, bill in found),
        training_seconds=seconds.get("training", 0.0),
        by_phase=by_phase,
        seconds_by_phase=seconds,
        final=all(node.settled for node in run.owned) and all(bill.final for _, bill in found),
    )
