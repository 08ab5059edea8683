"""Between attempts: the verdict on a run, or the next offer. Pure; a part of `life.decide`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

from orchestrator.life import terms
from orchestrator.life import world as w
from runs.facts import Offer
from runs.record import AttemptRecord, RunRecord

MAX_NODES_A_LAUNCH = 3
"""Nodes that may fail their preflight, or never open, before the launch is given up."""
MAX_ABANDONED = 3
"""Lost launches in one wait before it is given up."""
OFFERS_PATIENCE = timedelta(minutes=5)
"""How long a provider may fail to say what it has before a launch that does not wait is given up."""

BESIDE = frozenset({"push", "wandb"})
"""Jobs that go on beside the training: whatever becomes of them, the run goes on."""

_NOT_AS_RENTED = frozenset({"preflight", "boot-timeout", "prepare-failed"})
_TRY_ANOTHER = frozenset({"no-capacity", "launch-lost"}) | _NOT_AS_RENTED
_REPLACE = frozenset({"node-lost", "trainer-interrupted", "trainer-lost"})


def between(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """No attempt is open: the verdict, or the next offer."""
    if any(not node.settled and not run.keeps(node) for node in run.owned):
        return None  # its own rule is at work on it, and nothing new is rented meanwhile
    verdict = _verdict(run, now)
    if verdict is not None:
        return verdict
    if run.on is not None and not run.attempts:
        return _kept_node(run, world) or _next_offer(run, world, now)
    return _next_offer(run, world, now)


def _verdict(run: RunRecord, now: datetime) -> w.EndRun | None:
    """The end of the run, where the last attempt or the user has decided it."""
    since = run.recent_attempts
    last = since[-1].end_reason if since else None
    if last == "succeeded":
        return w.EndRun("succeeded", "finished")
    left = terms.seconds_left(run, now, reserve=True)
    spent = left[1] if left is not None and left[0] <= 0 else None
    if run.stop is not None or last == "out-of-time":
        return w.EndRun("stopped", run.stop.reason if run.stop else spent or "budget")
    if run.cancelled:
        return w.EndRun("stopped", "cancelled")
    if since and (since[-1].fatal is not None or last in {"failed", "trainer-failed", "refused", "host-key"}):
        return w.EndRun("failed", _failure(run, since[-1]))
    if last in {"trainer-stopped", "trainer-deadline"}:
        return w.EndRun(
            "stopped", _limit(run, since[-1]) if last == "trainer-deadline" else "stopped on the node"
        )
    if _spoiled(since):
        return w.EndRun("failed", _failure(run, since[-1]))
    if last in _REPLACE:
        node = run.spec["node"]
        if not node["replace"] or run.replacements > node["max_restarts"]:
            return w.EndRun("failed" if run.resume_step else "lost", "node-lost")
    elif last is not None and last not in _TRY_ANOTHER:
        return w.EndRun("failed", last)
    return w.EndRun("stopped", spent) if spent is not None else None


def _limit(run: RunRecord, attempt: AttemptRecord) -> str:
    """Which limit the node's own deadline stood for."""
    end, armed = terms.deadline(run), attempt.trainer_deadline
    money = armed is not None and (end is None or armed < end - timedelta(minutes=1))
    return "budget" if money else "deadline"


def _spoiled(since: Sequence[AttemptRecord]) -> bool:
    """Too many nodes that were not what was rented, or too many lost launches."""
    bad = sum(item.end_reason in _NOT_AS_RENTED for item in since)
    return (
        bad >= MAX_NODES_A_LAUNCH or sum(item.end_reason == "launch-lost" for item in since) >= MAX_ABANDONED
    )


def _failure(run: RunRecord, attempt: AttemptRecord) -> str:
    """The words behind an attempt's failure, the most telling first."""
    if attempt.end_reason == "trainer-failed":
        return attempt.trainer_end_detail or "the trainer failed"
    if attempt.fatal is not None:
        return attempt.fatal
    nodes = [node for node in run.nodes if node.key in attempt.keys]
    told = [node.refusal or node.preflight_failed for node in nodes]
    jobs = [reason for name, (_, reason) in attempt.failures.items() if name not in BESIDE]
    detail = next((text for text in (*told, *jobs) if text), "")
    return f"{attempt.end_reason}: {detail}" if detail else str(attempt.end_reason)


def _kept_node(run: RunRecord, world: w.World) -> w.Claim | w.EndRun | None:
    """Take over the kept node that the run was created for; None where another may be rented in its place."""
    node = run.on_node
    if world.claim_refused is None and node is not None and node.kept and node.alive:
        offer, key = node.offer, node.key
        return w.Claim(key, 1, offer, run.resume_step, terms.world_size(run, offer.gpus))
    if run.on_or_rent:
        return None
    return w.EndRun("failed", f"no-node: {world.claim_refused or f'{run.on} is not kept any more'}")


def _next_offer(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait:
    """Choose the first offer that is free, wait for one, or give up."""
    if world.offers_error is not None:
        return w.EndRun("failed", world.offers_error)
    poll = world.traits.capacity_poll_seconds
    waited = (now - run.wait_from).total_seconds()
    if world.offers_at is None or (now - world.offers_at).total_seconds() >= poll:
        return w.AskOffers()
    refused = {(item.instance_type, item.region): item.at for item in run.refusals}
    free = []
    for offer in world.offers or ():
        at = refused.get((offer.instance_type, offer.region))
        if offer.available and (at is None or (now - at).total_seconds() >= poll):
            free.append(offer)
    if free:
        return _begin(run, _least_disappointing(run, free))
    silent = world.offers is None
    patience = max(run.wait_seconds, OFFERS_PATIENCE.total_seconds() if silent else 0.0)
    if waited >= patience:
        return w.EndRun("failed", "the provider does not say what it has" if silent else "no-capacity")
    age = (now - world.offers_at).total_seconds()
    return w.Wait(max(1.0, min(poll - age, patience - waited)), "waiting for capacity")


def _least_disappointing(run: RunRecord, free: Sequence[Offer]) -> Offer:
    """The first offer, but where a node of the same was not what was rented, or was taken away, the next one's turn has come."""
    bad = Counter(
        (item.offer.instance_type, item.offer.region)
        for item in run.recent_attempts
        if item.end_reason in _NOT_AS_RENTED | {"trainer-interrupted"}
    )
    return min(free, key=lambda offer: bad[offer.instance_type, offer.region])


def _begin(run: RunRecord, offer: Offer) -> w.BeginAttempt:
    number = max((item.number for item in run.attempts), default=0) + 1
    count = run.spec["hardware"].get("nodes") or 1
    keys = tuple(f"llmctl-{run.run}-a{number}-n{index}" for index in range(count))
    return w.BeginAttempt(number, offer, keys, run.resume_step, terms.world_size(run, offer.gpus) * count)
