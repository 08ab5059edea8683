"""What a driver watches beside its own nodes: launches that were given up and arrive late after all, and what a provider's own
log says about a bill. Pure; a part of `life.decide`.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from orchestrator.life import world as w
from orchestrator.life.pace import backoff, sooner
from runs.facts import ENDED
from runs.record import RunRecord

ABANDONED_WATCH = timedelta(days=1)
"""How long after its intent a launch that was given up is still looked for."""
MAX_AUDITS = 4
"""Questions to a provider's log about one node: it may lag, and the ledger stands without it."""


def late(world: w.World) -> w.Effect | None:
    """A launch that another run of this home gave up, and that is there after all: whoever sees it first ends it."""
    for node in world.given_up:
        if node.answer != "abandoned":
            continue  # it was seen, and its end is under way
        found = world.shown(node, node.intended_at)
        if found is not None and found.status not in ENDED | {"terminating"}:
            return w.EndLate(node.key, found.id)
    return None


def watch(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """While something may still arrive late, a live run looks as often as at a node that does its work."""
    mine = (node for node in run.nodes if node.answer == "abandoned")
    if not run.live or not (
        world.given_up or any(now - node.intended_at <= ABANDONED_WATCH for node in mine)
    ):
        return None
    return world.look(now, world.traits.watch_seconds, "watching for late arrivals")


def reconcile(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """The provider's log is asked when a node ended; a few times, for it may lag."""
    if not world.traits.audited:
        return None
    soonest: w.Wait | None = None
    for node in run.owned:
        if node.gone_at is None or node.id is None or node.audited is not None:
            continue
        asked, times = world.audits.get(node.key, (None, 0))
        if times >= MAX_AUDITS:
            continue
        left = 0.0 if asked is None else (asked + backoff(world, times) - now).total_seconds()
        if left <= 0:
            return w.Reconcile(node.key)
        soonest = sooner(soonest, w.Wait(left, f"asking again when {node.key} ended"))
    return soonest
