"""The fold of a node: its record is what its events make of it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runs import events as e
from runs.facts import ENDED, RUNNING
from runs.record import ClaimRecord, NodeRecord


class FoldError(ValueError):
    """An event that cannot follow what was there: a broken store, or a bug."""


def _with(node: NodeRecord, **changes: Any) -> NodeRecord:
    return node.model_copy(update=changes)


def fold_node(node: NodeRecord | None, event: e.NodeEvent) -> NodeRecord:
    """The node after `event`. Raises FoldError where a stream does not begin with its intent."""
    if isinstance(event, e.LaunchIntended):
        if node is not None:
            raise FoldError(f"{event.key} is intended twice")
        return NodeRecord(
            key=event.key,
            run=event.run,
            provider=event.provider,
            marker=event.marker,
            offer=event.offer,
            unguarded=event.unguarded,
            intended_at=event.at,
        )
    if node is None:
        raise FoldError(f"{event.kind} before any LaunchIntended")
    return _NODE[type(event)](node, event)


def _answered(node: NodeRecord, event: e.LaunchAnswered | e.LaunchFound) -> NodeRecord:
    # A node that was believed gone or abandoned and is there after all bills again until it is really gone. When its
    # termination was accepted stays: where the list was only late, that is still when billing ended.
    again = ("gone_at", "gone_evidence", "seen_at", "billing_ended_at", "audited") if node.gone_at else ()
    back: dict[str, Any] = dict.fromkeys(again)
    return _with(node, answer="known", id=event.id, **back)


def _refused(node: NodeRecord, event: e.LaunchRefused) -> NodeRecord:
    return _with(
        node, answer="refused", refusal=f"{event.code}: {event.message}", capacity_refused=event.capacity
    )


def _observed(node: NodeRecord, event: e.NodeObserved) -> NodeRecord:
    changes: dict[str, Any] = {"status": event.status, "port": event.port, "user": event.user}
    changes["ip"] = event.ip or node.ip
    changes["private_ip"] = event.private_ip or node.private_ip
    changes["micro_usd_per_hour"] = event.micro_usd_per_hour or node.micro_usd_per_hour
    changes["observed_at"] = event.at
    if node.terminate_accepted_at is not None and event.status in RUNNING:
        changes |= {"running_at": event.at, "running_until": None}
    elif node.running_at is not None:
        changes["running_until"] = node.running_until or event.at
    if event.status not in {"booting", "unknown"} and node.active_at is None:
        last = node.observed_at if node.status in {"booting", None} else None
        changes["active_not_before"] = node.active_not_before or event.not_before or last or node.intended_at
        changes["active_at"] = event.at if event.status in {"active", "unhealthy"} else None
    return _with(node, **changes)


def _ready(node: NodeRecord, event: e.NodeReady) -> NodeRecord:
    return _with(
        node,
        ready_at=node.ready_at or event.at,
        host_key=event.host_key or node.host_key,
        boot_id=event.boot_id,
        clock_offset_seconds=event.clock_offset_seconds,
        facts={**node.facts, **event.facts},
    )


def _claimed(node: NodeRecord, event: e.NodeClaimed) -> NodeRecord:
    if not (node.kept and node.alive) or event.former != node.run:
        raise FoldError(f"{node.key} is claimed by {event.run}, and {event.former} does not keep it")
    claim = ClaimRecord(run=event.run, attempt=event.attempt, at=event.at)
    return _with(node, run=event.run, claims=(*node.claims, claim), kept=False, kept_until=None)


def _terminate_intended(node: NodeRecord, event: e.TerminateIntended) -> NodeRecord:
    # Asked again, and never seen to end: the earlier acceptance may have been worth nothing, and it may have billed on.
    believed = node.terminate_accepted_at if node.status == "terminating" else None
    return _with(
        node,
        terminate_accepted_at=believed,
        terminate_intended_at=node.terminate_intended_at or event.at,
        terminate_reason=node.terminate_reason or event.reason,
        terminate_tried_at=event.at,
        terminate_tries=node.terminate_tries + 1,
        kept=False,
    )


def _terminate_answered(node: NodeRecord, event: e.TerminateAnswered) -> NodeRecord:
    if not event.accepted:
        return node
    return _with(node, terminate_accepted_at=node.terminate_accepted_at or event.at)


def _gone(node: NodeRecord, event: e.NodeGone) -> NodeRecord:
    if node.gone_at is not None:
        return node
    answer = "known" if node.answer in {"none", "ambiguous"} else node.answer
    there = node.observed_at if node.status not in ENDED else None
    return _with(
        node,
        gone_at=event.at,
        gone_evidence=event.evidence,
        seen_at=max(
            at for at in (event.seen_at, there, node.ready_at, node.active_at, node.intended_at) if at
        ),
        answer=answer,
        kept=False,
    )


def _reconciled(node: NodeRecord, event: e.BillingReconciled) -> NodeRecord:
    if event.contradiction is not None:
        return _with(node, audited=f"{event.source} is not believed: {event.contradiction}")
    start = node.active_not_before
    if start is not None and event.launched is not None:
        start = min(max(start, event.launched), node.active_at or start)
    said = f"ended at {event.ended:%Y-%m-%d %H:%M:%S} UTC by {event.source}" if event.ended else None
    return _with(
        node, active_not_before=start, billing_ended_at=event.ended or node.billing_ended_at, audited=said
    )


_NODE: dict[type, Callable[[NodeRecord, Any], NodeRecord]] = {
    e.LaunchAnswered: _answered,
    e.LaunchFound: _answered,
    e.LaunchRefused: _refused,
    e.LaunchAmbiguous: lambda node, _: _with(node, answer="ambiguous"),
    e.LaunchAbandoned: lambda node, event: _with(node, answer="abandoned", observed_at=event.at),
    e.NodeObserved: _observed,
    e.NodeReady: _ready,
    e.PreflightFailed: lambda node, event: _with(node, preflight_failed=event.reason),
    e.LeaseExtended: lambda node, event: _with(node, marker=event.marker),
    e.NodeKept: lambda node, event: _with(node, kept=True, kept_until=event.until),
    e.NodeClaimed: _claimed,
    e.TerminateIntended: _terminate_intended,
    e.TerminateAnswered: _terminate_answered,
    e.NodeGone: _gone,
    e.BillingReconciled: _reconciled,
}
