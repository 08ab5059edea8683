"""The life of a run: one pure, total function that chooses what happens next, and nothing else does.

`decide(record, world, now)` is called by the driver, by `launch --dry-run` and by the simulation. Its order: unsettled
intents, nodes that must go, then stop/budget/deadline, then dead nodes, then the next stage of the attempt, then the next
attempt or the end. Each rule returns an Effect, a Wait, or None where it has nothing to say.

Every rule reads only committed facts and what was just seen, so that a driver that dies anywhere is continued by the next
one asking the same question.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from orchestrator import terms
from orchestrator import world as w
from runs import charges
from runs.facts import ENDED, NodeFacts, Offer
from runs.record import AttemptRecord, NodeRecord, RunRecord
from trainer.config import parse_duration

MAX_NODES_A_LAUNCH = 3
"""Nodes that may fail their preflight, or never open, before the launch is given up."""
MAX_ABANDONED = 3
"""Lost launches in one wait before it is given up."""
MAX_JOB_FAILURES = 4
"""Tries of a lane before its node is given up."""
MAX_STARTS = 8
"""Starts of the supervisor on one attempt (it died, the node rebooted) before its node is given up."""
UNREACHABLE = timedelta(minutes=20)
"""A node that its provider calls active and that does not answer for this long is dead."""


def decide(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | w.Done:
    """The next thing to do for `run`. Pure and total."""
    waits: list[w.Wait] = []
    for answer in _answers(run, world, now):
        if isinstance(answer, w.Wait):
            waits.append(answer)
        elif answer is not None:
            return answer
    return min(waits, key=lambda wait: wait.seconds) if waits else w.Done()


def _answers(run: RunRecord, world: w.World, now: datetime) -> Iterator[w.Effect | w.Wait | None]:
    yield _intents(run, world, now)
    yield _strays(run, world)
    yield _terminations(run, world, now)
    yield _unwanted(run, now)
    if run.live and run.attempt is not None:
        yield _limits(run, now)
        yield _dead(run, world, now)
        yield _stage(run, run.attempt, world, now)
    elif run.live:
        yield _between(run, world, now)


# ---------------------------------------------------------------- nodes, whatever the run is doing


def _intents(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """An intent without an outcome: the truth is in the inventory, and nothing is sent again before it was read."""
    for node in run.nodes:
        if not node.unsettled_intent:
            continue
        found = world.shown(node.key, node.intended_at)
        if found is not None and found.status not in ENDED:
            return w.Adopt(node.key, found.id)
        if world.absent_enough(node.key, node.intended_at):
            return w.Abandon(node.key)
        return world.look(
            now, world.traits.look_seconds / max(1, world.traits.looks - 1), f"looking for {node.key}"
        )
    return None


def _strays(run: RunRecord, world: w.World) -> w.Effect | None:
    """A node that was given up, or believed gone, and is there after all."""
    for node in run.nodes:
        since = node.gone_at or (node.intended_at if node.answer in {"abandoned", "refused"} else None)
        if since is None:
            continue
        found = world.shown(node.key, since)
        if found is not None and found.status not in ENDED | {"terminating"}:
            return w.Adopt(node.key, found.id)
    return None


def _terminations(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """A termination is believed when the provider shows it, and sent again until then."""
    soonest: w.Wait | None = None
    for node in run.nodes:
        if node.terminate_intended_at is None or node.settled or node.id is None:
            continue
        tried = node.terminate_tried_at or node.terminate_intended_at
        found = world.shown(node.key, tried)
        if found is not None and found.status in ENDED:
            return w.DeclareGone(node.key, f"listed as {found.status}")
        again = tried + _backoff(node.terminate_tries, accepted=node.terminate_accepted_at is not None)
        if now >= again:
            return w.Terminate(node.key, node.terminate_reason or "release")
        asked = world.confirmed_at.get(node.key)
        poll = timedelta(seconds=world.traits.terminate_poll_seconds)
        if node.terminate_accepted_at is not None and (asked is None or asked < tried or now - asked >= poll):
            return w.Confirm(node.key)
        until = min(again, (asked or now) + poll) if node.terminate_accepted_at is not None else again
        soonest = _sooner(
            soonest, w.Wait(max(0.1, (until - now).total_seconds()), f"{node.key} is terminating")
        )
    return soonest


def _unwanted(run: RunRecord, now: datetime) -> w.Effect | w.Wait | None:
    """A living node that no open attempt has, and that nobody keeps."""
    wanted = run.attempt.keys if run.attempt is not None and run.live else ()
    soonest: w.Wait | None = None
    for node in run.nodes:
        if not node.alive or node.key in wanted or (node.run != run.run and not node.kept):
            continue
        if not node.kept:
            return w.Terminate(node.key, "unwanted")
        if node.key in run.release_requested or (node.kept_until is not None and now >= node.kept_until):
            return w.Terminate(node.key, "no longer kept")
        if node.kept_until is not None:
            left = (node.kept_until - now).total_seconds()
            soonest = _sooner(soonest, w.Wait(min(60.0, left), f"{node.key} is kept"))
    return soonest


# ---------------------------------------------------------------- stop, budget, deadline


def _limits(run: RunRecord, now: datetime) -> w.Effect | None:
    ending = run.stop is not None or (run.attempt is not None and run.attempt.trainer_end is not None)
    if ending or not any(node.answer == "known" for node in run.attempt_nodes()):
        return None
    if run.max_micro_usd is not None:
        reserve = round(charges.rate(run) * terms.COLLECT_RESERVE_SECONDS / 3600)
        if charges.total(run, now) + min(reserve, run.max_micro_usd // 10) >= run.max_micro_usd:
            return w.RequestStop("budget")
    end = terms.deadline(run)
    if end is not None and now >= end - timedelta(seconds=terms.reserve_seconds(run)):
        return w.RequestStop("deadline")
    return None


# ---------------------------------------------------------------- dead nodes


def _dead(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """A node of the open attempt that is gone, ill, not what was rented, or does not answer."""
    for node in run.attempt_nodes():
        if not node.alive:
            continue
        since = node.ready_at or node.active_at or node.intended_at
        found = world.shown(node.key, node.intended_at)
        if found is not None and found.status in ENDED:
            return w.DeclareGone(node.key, f"listed as {found.status}")
        if found is None and world.absent_enough(node.key, since):
            asked = world.confirmed_at.get(node.key)
            if asked is None or (now - asked).total_seconds() >= max(5.0, world.traits.look_seconds):
                return w.Confirm(node.key)
        reason = _illness(run, node, found, world, now)
        if reason is not None:
            return w.Terminate(node.key, reason)
    return None


def _illness(
    run: RunRecord, node: NodeRecord, found: NodeFacts | None, world: w.World, now: datetime
) -> str | None:
    """Why a living node must be given up, or None."""
    contact = world.contacts.get(node.key)
    if contact is not None and contact.host_key_mismatch:
        return "host-key"
    if node.preflight_failed is not None:
        return "preflight"
    if found is not None and found.status == "unhealthy":
        return "unhealthy"
    if node.ready_at is None:
        boot = timedelta(seconds=parse_duration(run.spec["node"]["boot_timeout"]))
        return "boot-timeout" if now - node.intended_at > boot else None
    shown_active = found is not None and found.status == "active"
    if contact is not None and not contact.reachable and shown_active and now - contact.since > UNREACHABLE:
        return "unreachable"
    return None


# ---------------------------------------------------------------- the open attempt


def _stage(run: RunRecord, attempt: AttemptRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """The next stage of the open attempt: rent, boot, prepare, train, collect, release."""
    nodes = list(run.attempt_nodes())
    broken = _broken(attempt, nodes)
    if broken is not None:
        return _close(run, nodes, broken, now)
    if attempt.trainer_end is not None:
        return _collect(run, attempt, nodes, world, now)
    if attempt.token is None and (run.stop is not None or run.cancelled):
        return _close(run, nodes, "stopped", now)
    if any(node.unsettled_intent for node in nodes):
        return None
    if len(nodes) < len(attempt.keys):
        return w.Launch(attempt.number, len(nodes), attempt.offer, terms.lease_end(run, now))
    if terms.no_time_left(run, now):
        return _close(run, nodes, "out-of-time", now)
    return _serve(run, attempt, nodes, world, now)


def _serve(
    run: RunRecord, attempt: AttemptRecord, nodes: list[NodeRecord], world: w.World, now: datetime
) -> w.Effect | w.Wait | None:
    """All nodes exist: boot, prepare, train."""
    if not all(node.ready_at for node in nodes):
        return world.look(now, world.traits.boot_poll_seconds, "booting")
    for node in nodes:
        waiting = _prepare(attempt, node, world, now)
        if waiting is not None:
            return waiting
    return _train(run, attempt, world, now)


def _broken(attempt: AttemptRecord, nodes: list[NodeRecord]) -> str | None:
    """Why the attempt cannot go on, or None. Once trainer_end is known, losing a node only ends the collection."""
    for node in nodes:
        if node.answer == "refused":
            return "no-capacity" if node.capacity_refused else "refused"
        if node.answer == "abandoned":
            return "launch-lost"
        if node.terminate_reason is not None and attempt.trainer_end is None:
            return {"unhealthy": "node-lost", "unreachable": "node-lost"}.get(
                node.terminate_reason, node.terminate_reason
            )
        if node.gone_at is not None and attempt.trainer_end is None:
            return "node-lost"
    if attempt.fatal is not None:
        return "failed"
    worn = [
        name
        for name, (count, _) in attempt.failures.items()
        if count >= MAX_JOB_FAILURES and "prepare" in name
    ]
    return "prepare-failed" if worn else None


def _prepare(
    attempt: AttemptRecord, node: NodeRecord, world: w.World, now: datetime
) -> w.Effect | w.Wait | None:
    """The lanes of one node, until the trainer can start on it."""
    if f"{node.key}/ready" in attempt.lanes:
        return None
    job = world.jobs.get(f"{node.key}/prepare")
    if job is None or job.state == "done":
        return w.Prepare(node.key)
    if job.state == "failed":
        left = _backoff(job.failures).total_seconds() - (now - job.at).total_seconds()
        return w.Prepare(node.key) if left <= 0 else w.Wait(left, "preparing again soon")
    return w.Wait(5.0, "preparing")


def _train(run: RunRecord, attempt: AttemptRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """Start the trainer, keep it started, and stop it when the run is to end."""
    token = attempt.token or f"{run.run}-a{attempt.number}"
    trainer = world.trainer
    if attempt.token is None:
        return w.StartTrainer(token, terms.deadline(run))
    if trainer is None or trainer.token != token:
        absent = trainer is not None and trainer.state == "absent"
        return w.StartTrainer(token, terms.deadline(run)) if absent else w.Wait(5.0, "asking the node")
    if trainer.state in {"absent", "dead"}:
        return w.StartTrainer(token, terms.deadline(run))
    if run.stop is not None and trainer.state != "ended":
        asked = trainer.state == "stopping" and (run.stop.checkpoint or not trainer.graceful)
        return world.look(now, 60.0, "stopping") if asked else w.StopTrainer(run.stop.checkpoint)
    return world.look(now, 60.0, "training")


def _collect(
    run: RunRecord, attempt: AttemptRecord, nodes: list[NodeRecord], world: w.World, now: datetime
) -> w.Effect | w.Wait | None:
    """Bring everything home, then release; time and money decide when that does not work."""
    finished = attempt.trainer_end == "finished"
    reason = "succeeded" if finished else f"trainer-{attempt.trainer_end}"
    steps = terms.wanted(run, attempt)
    here = all(item.path if finished else item.fetched for item in map(run.checkpoints.__getitem__, steps))
    job = world.jobs.get("collect")
    if here and job is not None and job.state == "done":
        return _close(run, nodes, reason, now)
    if not nodes[0].alive:
        return _close(run, nodes, reason if here else "node-lost", now)
    if terms.no_time_left(run, now) or (run.stop is not None and run.stop.reason == "abandon"):
        return _close(run, nodes, reason if here else "out-of-time", now)
    if job is None or job.state == "done":
        return w.Collect(steps, finished and terms.large(run, steps))
    if job.state == "failed":
        left = _backoff(job.failures).total_seconds() - (now - job.at).total_seconds()
        if left <= 0:
            return w.Collect(steps, finished and terms.large(run, steps))
        return w.Wait(left, f"collecting again soon: {job.reason}")
    return world.look(now, 60.0, "collecting")


def _close(run: RunRecord, nodes: list[NodeRecord], reason: str, now: datetime) -> w.Effect | None:
    """Release each node of the attempt (or keep it), then end the attempt."""
    policy = run.spec["node"]["on_finish"]
    for node in nodes:
        if node.settled or node.kept or not node.alive:
            continue
        if reason == "succeeded" and policy != "terminate":
            until = None if policy == "keep" else now + timedelta(seconds=parse_duration(policy))
            return w.Keep(node.key, until)
        return w.Terminate(node.key, reason)
    if all(node.settled or node.kept for node in nodes):
        return w.EndAttempt(reason)
    return None


# ---------------------------------------------------------------- between attempts

_TRY_ANOTHER = frozenset({"no-capacity", "launch-lost", "preflight", "boot-timeout", "prepare-failed"})
_REPLACE = frozenset({"node-lost", "trainer-interrupted", "trainer-lost"})


def _between(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """No attempt is open: the verdict, or the next offer."""
    if any(not node.settled and not node.kept for node in run.nodes):
        return None  # its own rule is at work on it, and nothing new is rented meanwhile
    verdict = _verdict(run, now)
    if verdict is not None:
        return verdict
    if run.on_node is not None and not any(item.keys for item in run.attempts):
        return _take_over(run)
    return _next_offer(run, world, now)


def _verdict(run: RunRecord, now: datetime) -> w.EndRun | None:
    """The end of the run, where the last attempt or the user has decided it."""
    since = [item for item in run.attempts if item.started_at >= run.wait_from]
    last = since[-1].end_reason if since else None
    if last == "succeeded":
        return w.EndRun("succeeded", "finished")
    if run.stop is not None or last == "out-of-time":
        return w.EndRun("stopped", run.stop.reason if run.stop else "budget")
    if run.cancelled:
        return w.EndRun("stopped", "cancelled")
    if last in {"trainer-stopped", "trainer-deadline"}:
        return w.EndRun("stopped", "deadline" if last == "trainer-deadline" else "stopped on the node")
    if last in {"failed", "trainer-failed", "refused", "host-key"}:
        return w.EndRun("failed", _failure(run, since[-1]))
    tries = sum(item.end_reason in {"preflight", "boot-timeout", "prepare-failed"} for item in since)
    if (
        tries >= MAX_NODES_A_LAUNCH
        or sum(item.end_reason == "launch-lost" for item in since) >= MAX_ABANDONED
    ):
        return w.EndRun("failed", _failure(run, since[-1]))
    if last in _REPLACE:
        node = run.spec["node"]
        if not node["replace"] or run.replacements > node["max_restarts"]:
            return w.EndRun("failed" if run.resume_step else "lost", "node-lost")
    elif last is not None and last not in _TRY_ANOTHER:
        return w.EndRun("failed", last)
    end = terms.deadline(run)
    if end is not None and now >= end - timedelta(seconds=terms.reserve_seconds(run)):
        return w.EndRun("stopped", "deadline")
    if run.max_micro_usd is not None and charges.total(run, now) >= run.max_micro_usd > 0:
        return w.EndRun("stopped", "budget")
    return None


def _failure(run: RunRecord, attempt: AttemptRecord) -> str:
    """The words behind an attempt's failure, the most telling first."""
    if attempt.end_reason == "trainer-failed":
        return attempt.trainer_end_detail or "the trainer failed"
    if attempt.fatal is not None:
        return attempt.fatal
    nodes = [node for node in run.nodes if node.key in attempt.keys]
    told = [node.refusal or node.preflight_failed for node in nodes]
    jobs = [reason for _, reason in attempt.failures.values()]
    detail = next((text for text in (*told, *jobs) if text), "")
    return f"{attempt.end_reason}: {detail}" if detail else str(attempt.end_reason)


def _take_over(run: RunRecord) -> w.Effect | None:
    """`launch --on NODE`: the kept node is the attempt."""
    node = run.node(run.on_node) if run.on_node else None
    if node is None or not node.alive:
        return w.EndRun("failed", f"{run.on_node} is gone")
    return w.BeginAttempt(1, node.offer, (node.key,), 0, terms.world_size(run, node.offer.gpus), reused=True)


def _next_offer(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait:
    """Choose the first offer that is free, wait for one, or give up."""
    if world.offers_error is not None:
        return w.EndRun("failed", world.offers_error)
    poll = world.traits.capacity_poll_seconds
    waited = (now - run.wait_from).total_seconds()
    if world.offers_at is None or (now - world.offers_at).total_seconds() >= poll:
        return w.AskOffers()
    refused = {(item.instance_type, item.region): item.at for item in run.refusals}
    for offer in world.offers or ():
        at = refused.get((offer.instance_type, offer.region))
        if offer.available and (at is None or (now - at).total_seconds() >= poll):
            return _begin(run, offer)
    if waited >= run.wait_seconds:
        return w.EndRun("failed", "no-capacity")
    age = (now - world.offers_at).total_seconds()
    return w.Wait(max(1.0, min(poll - age, run.wait_seconds - waited)), "waiting for capacity")


def _begin(run: RunRecord, offer: Offer) -> w.BeginAttempt:
    number = max((item.number for item in run.attempts), default=0) + 1
    count = run.spec["hardware"].get("nodes") or 1
    keys = tuple(f"llmctl-{run.run}-a{number}-n{index}" for index in range(count))
    return w.BeginAttempt(number, offer, keys, run.resume_step, terms.world_size(run, offer.gpus) * count)


def _backoff(tries: int, *, accepted: bool = False) -> timedelta:
    """5, 10, 20, 40 and then 60 s between tries; a minute where the request was accepted and only the end is awaited."""
    return timedelta(seconds=60 if accepted else min(60, 5 * 2 ** max(0, tries - 1)))


def _sooner(one: w.Wait | None, other: w.Wait) -> w.Wait:
    return other if one is None or other.seconds < one.seconds else one
