"""The life of a run: one pure, total function that chooses what happens next, and nothing else does.

`decide(record, world, now)` is called by the driver, by `launch --dry-run` and by the simulation. Its order: unsettled
intents, nodes that must go, then stop/budget/deadline, then dead nodes, then the next stage of the attempt, then the next
attempt or the end. Each rule returns an Effect, a Wait, or None where it has nothing to say.

Every rule reads only committed facts and what was just seen, so that a driver that dies anywhere is continued by the next
one asking the same question. A Wait is honest: unless something is heard, the answer before its end would be the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime, timedelta

from orchestrator.life import terms, verdict, vigil
from orchestrator.life import world as w
from orchestrator.life.pace import backoff, left_until, nearer, sooner
from runs.facts import ENDED, NodeFacts
from runs.record import AttemptRecord, NodeRecord, RunRecord
from trainer.config import parse_duration

MAX_JOB_FAILURES = 4
"""Tries of a lane before its node is given up."""
MAX_STARTS = 8
"""Starts of the supervisor on one attempt (it died, the node rebooted) before its node is given up."""
FRESH = timedelta(minutes=2)
"""A list that is older says nothing about a node that does not answer."""
SAME_END = timedelta(minutes=1)
"""Deadlines that are no further apart are one."""
BOOT_STRIDE = timedelta(minutes=5)
"""By so much the lease of a booting node may be shorter than its money lasts."""
LEASE_RETRY = timedelta(minutes=1)
"""Between tries to tell a provider of a later lease."""


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
    yield vigil.late(world)
    yield _terminations(run, world, now)
    yield _unwanted(run, world, now)
    if run.live and run.attempt is not None:
        yield _limits(run, world, now)
        yield _dead(run, world, now)
        yield _watch(run, world, now)
        yield _stage(run, run.attempt, world, now)
    if run.live and run.attempt is None:
        yield verdict.between(run, world, now)
    yield vigil.reconcile(run, world, now)
    yield vigil.watch(run, world, now)


# ---------------------------------------------------------------- nodes, whatever the run is doing


def _intents(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """An intent without an outcome: the truth is in the inventory, and nothing is sent again before it was read."""
    for node in run.owned:
        if not node.unsettled_intent:
            continue
        found = world.shown(node, node.intended_at)
        if found is not None:
            return w.Adopt(node.key, found.id)  # one that has ended already too: it may have billed
        if world.absent_enough(node.key, node.intended_at):
            return w.Abandon(node.key)
        return world.look(
            now, world.traits.look_seconds / max(1, world.traits.looks - 1), f"looking for {node.key}"
        )
    return None


def _strays(run: RunRecord, world: w.World) -> w.Effect | None:
    """A node that was given up, or believed gone, and is there after all."""
    for node in run.owned:
        since = node.gone_at or (node.intended_at if node.answer in {"abandoned", "refused"} else None)
        if since is None:
            continue
        found = world.shown(node, since)
        if found is not None and found.status not in ENDED | {"terminating"}:
            return w.Adopt(node.key, found.id)
    return None


def _terminations(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """A termination is believed when the provider shows it, and sent again until then."""
    soonest: w.Wait | None = None
    for node in (*run.owned, *world.given_up):
        if node.terminate_intended_at is None or node.settled or node.id is None:
            continue
        tried = node.terminate_tried_at or node.terminate_intended_at
        found = world.shown(node, tried)
        if found is not None and found.status in ENDED:
            return w.DeclareGone(node.key, f"listed as {found.status}")
        again = tried + backoff(world, node.terminate_tries, accepted=node.terminate_accepted_at is not None)
        if now >= again:
            return w.Terminate(node.key, node.terminate_reason or "release")
        asked = world.confirmed_at.get(node.key)
        poll = timedelta(seconds=world.traits.terminate_poll_seconds)
        if asked is None or asked < tried or now - asked >= poll:
            return w.Confirm(node.key)
        until = min(again, asked + poll)
        soonest = sooner(
            soonest, w.Wait(max(0.1, (until - now).total_seconds()), f"{node.key} is terminating")
        )
    return soonest


def _unwanted(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """A living node that no open attempt has, and that nobody keeps."""
    wanted = run.attempt.keys if run.attempt is not None and run.live else ()
    for node in run.owned:
        if not node.alive or node.key in wanted:
            continue
        if not node.kept:
            return w.Terminate(node.key, "unwanted")
        if not run.keeps(node) or (node.kept_until is not None and now >= node.kept_until):
            look = world.look(now, FRESH.total_seconds(), f"whether {node.key} is still there")
            return look if isinstance(look, w.Look) else w.Terminate(node.key, "no longer kept")
        if node.kept_until is not None:
            left = (node.kept_until - now).total_seconds()
            return _lost(node, world, now) or nearer(world.look(now, 60.0, f"{node.key} is kept"), left)
    return None


# ---------------------------------------------------------------- stop, budget, deadline


def _limits(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """Budget and deadline, as they are now: what `extend` raised is carried to the node's lease too."""
    if not any(node.answer == "known" for node in run.attempt_nodes()):
        return None
    ending = run.stop is not None or (run.attempt is not None and run.attempt.trainer_end is not None)
    left = terms.seconds_left(run, now, reserve=not ending)
    if left is not None and left[0] <= 0 and not ending:
        return w.RequestStop(left[1])
    end = terms.ends(run, now)
    for node in run.attempt_nodes():
        tried = world.lease_tried_at.get(node.key)
        again = tried is None or now - tried >= LEASE_RETRY
        if end is None or not node.alive or not again:
            continue
        # A boot that is not paid moves the end of the money on and on: followed in strides.
        slack = min(BOOT_STRIDE, (end - now) / 2) if node.active_at is None else timedelta()
        if end > node.marker.lease_end + slack:
            return w.ExtendLease(node.key, end)
    if left is None or left[0] <= 0 or left[0] == math.inf:
        return None
    return w.Wait(max(1.0, left[0]), f"{left[1]} not reached yet")


# ---------------------------------------------------------------- dead nodes


def _dead(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """A node of the open attempt that is gone, ill, not what was rented, or does not answer."""
    for node in run.attempt_nodes():
        if not node.alive:
            continue
        lost = _lost(node, world, now)
        if lost is not None:
            return lost
        reason = _illness(run, node, world.shown(node, node.intended_at), world, now)
        if reason is not None:
            return w.Terminate(node.key, reason)
    return None


def _lost(node: NodeRecord, world: w.World, now: datetime) -> w.Effect | None:
    """A node that ended by itself. One that is missing from several lists is asked for by its id before that is believed."""
    found = world.shown(node, node.intended_at)
    if found is not None and found.status in ENDED:
        return w.DeclareGone(node.key, f"listed as {found.status}")
    if found is None and world.absent_enough(node.key, node.ready_at or node.active_at or node.intended_at):
        asked = world.confirmed_at.get(node.key)
        if asked is None or (now - asked).total_seconds() >= max(5.0, world.traits.look_seconds):
            return w.Confirm(node.key)
    return None


def _watch(run: RunRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """Whatever a node is doing, its provider is asked for it once a minute; sooner where it does not answer."""
    if not any(node.alive for node in run.attempt_nodes()):
        return None
    silent = any(not contact.reachable for contact in world.contacts.values())
    return world.look(now, world.traits.watch_seconds / (3 if silent else 1), run.state)


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
    at_once = run.stop is not None and not run.stop.checkpoint
    patience = world.traits.retry_seconds * 12 if at_once else world.traits.unreachable_seconds
    if contact is None or contact.reachable or (now - contact.since).total_seconds() <= patience:
        return None
    shown = world.shown(node, now - FRESH)
    return "unreachable" if shown is not None and shown.status == "active" else None


# ---------------------------------------------------------------- the open attempt


def _stage(run: RunRecord, attempt: AttemptRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """The next stage of the open attempt: rent, boot, prepare, train, collect, release."""
    nodes = list(run.attempt_nodes())
    broken = _broken(attempt, nodes)
    if broken is not None:
        return _close(run, nodes, broken, now)
    if attempt.trainer_end is not None:
        reason = "succeeded" if attempt.trainer_end == "finished" else f"trainer-{attempt.trainer_end}"
        return _collect(run, attempt, reason, world, now)
    if attempt.token is None and (run.stop is not None or run.cancelled):
        return _close(run, nodes, "stopped", now)
    if any(node.unsettled_intent for node in nodes):
        return None
    if len(nodes) < len(attempt.keys):
        return w.Launch(attempt.number, len(nodes), attempt.offer, terms.lease_end(run, now))
    if terms.no_time_left(run, now):
        return _close(run, nodes, "out-of-time", now)
    if not all(node.ready_at for node in nodes):
        return world.look(now, world.traits.boot_poll_seconds, "booting")
    busy = [answer for node in nodes if (answer := _prepare(attempt, node, world, now)) is not None]
    if busy:  # all nodes side by side: something to begin comes before something to wait for
        return next((answer for answer in busy if not isinstance(answer, w.Wait)), busy[0])
    return _train(run, attempt, world, now)


def _broken(attempt: AttemptRecord, nodes: list[NodeRecord]) -> str | None:
    """Why the attempt cannot go on, or None. Once trainer_end is known, losing a node only ends the collection; what fails
    beside a trainer that was started is `_failing`, for there may be something to bring home."""
    for node in nodes:
        if node.answer == "refused":
            return "no-capacity" if node.capacity_refused else "refused"
        if node.answer == "abandoned":
            return "launch-lost"
        if attempt.trainer_end is not None:
            continue
        if node.terminate_reason is not None:
            return _ILL.get(node.terminate_reason, node.terminate_reason)
        if node.gone_at is not None:
            return "node-lost"
    return _failing(attempt) if attempt.token is None else None


_ILL = {"unhealthy": "node-lost", "unreachable": "node-lost"}


def _failing(attempt: AttemptRecord) -> str | None:
    """Why nothing more is to be expected of the attempt's jobs, though its nodes live."""
    if attempt.fatal is not None:
        return "failed"
    if attempt.starts > MAX_STARTS:
        return "trainer-lost"
    worn = any(
        count >= MAX_JOB_FAILURES
        for name, (count, _) in attempt.failures.items()
        if name.rpartition("/")[2] not in {"collect", "stop", *verdict.BESIDE}
    )
    return "prepare-failed" if worn else None


def _prepare(
    attempt: AttemptRecord, node: NodeRecord, world: w.World, now: datetime
) -> w.Effect | w.Wait | None:
    """The lanes of one node: until the trainer can start on it, and beside it until all its data is there."""
    ready = f"{node.key}/ready" in attempt.lanes
    job = world.jobs.get(f"{node.key}/prepare")
    if ready and (f"{node.key}/data" in attempt.lanes or (job is not None and job.state == "running")):
        return None
    if job is None or job.state == "done":
        return w.Prepare(node.key)
    if job.state == "failed":
        left = left_until(world, job.at, job.failures, now)
        if left <= 0:
            return w.Prepare(node.key)
        return None if ready else w.Wait(left, f"preparing again soon: {job.reason}")
    return w.Wait(60.0, "preparing")


def _train(run: RunRecord, attempt: AttemptRecord, world: w.World, now: datetime) -> w.Effect | w.Wait | None:
    """Start the trainer, keep it started, and stop it when the run is to end."""
    token = attempt.token or f"{run.run}-a{attempt.number}"
    trainer, end, armed = world.trainer, terms.ends(run, now), attempt.trainer_deadline
    if end is not None and armed is not None and abs(end - armed) <= SAME_END:
        end = armed  # rounding moves the end of the money a little: that is no new deadline
    if attempt.token is None:
        return w.StartTrainer(token, end)
    if trainer is None or (trainer.token != token and trainer.state != "absent"):
        return w.Wait(20.0, "asking the node")
    failing = _failing(attempt)
    if trainer.state in {"absent", "dead"}:
        if run.stop is not None or failing is not None:
            return _collect(run, attempt, failing or "stopped", world, now)
        return _start_again(attempt, token, end, world, now)
    if trainer.state == "ended":
        return w.Wait(60.0, "the trainer has ended")
    if run.stop is not None or failing is not None:
        checkpoint = run.stop is None or run.stop.checkpoint
        asked = trainer.state == "stopping" and (checkpoint or not trainer.graceful)
        return w.Wait(60.0, "stopping") if asked else _ask_stop(world, checkpoint, now)
    if trainer.deadline is not None and end is not None and abs(trainer.deadline - end) > SAME_END:
        return _start_again(attempt, token, end, world, now)
    return w.Wait(60.0, "training")


def _start_again(
    attempt: AttemptRecord, token: str, end: datetime | None, world: w.World, now: datetime
) -> w.Effect | w.Wait:
    """Start what does not run, or arm a new deadline; not faster than a start can take effect."""
    job = world.jobs.get("start")
    if job is not None and job.state == "running":
        return w.Wait(5.0, "starting the trainer")
    left = left_until(world, attempt.last_start_at, attempt.starts, now)
    return w.StartTrainer(token, end) if left <= 0 else w.Wait(left, "starting the trainer again soon")


def _ask_stop(world: w.World, checkpoint: bool, now: datetime) -> w.Effect | w.Wait:
    job = world.jobs.get("stop")
    if job is not None and job.state == "running":
        return w.Wait(5.0, "asking the trainer to stop")
    if world.stop_asked is not None and world.stop_asked[1] == checkpoint:
        left = left_until(world, world.stop_asked[0], 1, now)
        if left > 0:
            return w.Wait(left, "asked the trainer to stop")
    return w.StopTrainer(checkpoint)


def _collect(
    run: RunRecord, attempt: AttemptRecord, reason: str, world: w.World, now: datetime
) -> w.Effect | w.Wait | None:
    """Bring everything home, then release; time and money decide when that does not work."""
    finished, nodes = reason == "succeeded", list(run.attempt_nodes())
    steps = terms.wanted(run, attempt)
    found = map(run.checkpoints.__getitem__, steps)
    here = all(item.path if finished or item.gone else item.fetched for item in found)
    job = world.jobs.get("collect")
    if (
        job is not None
        and job.state != "running"
        and job.at < (attempt.trainer_ended_at or attempt.started_at)
    ):
        job = None  # an earlier attempt's
    if here and job is not None and job.state == "done":
        return _close(run, nodes, reason, now)
    if not nodes[0].alive:
        return _close(run, nodes, reason if here else "node-lost", now)
    if terms.no_time_left(run, now):
        return _close(run, nodes, reason if here else "out-of-time", now)
    if job is not None and job.state == "running":
        return w.Wait(60.0, "collecting")
    left = left_until(world, job.at, job.failures, now) if job is not None else 0
    if left > 0:
        return w.Wait(left, f"collecting again soon: {job.reason if job else ''}")
    return w.Collect(steps, finished and terms.large(run, steps))


def _close(run: RunRecord, nodes: list[NodeRecord], reason: str, now: datetime) -> w.Effect | None:
    """Release each node of the attempt (or keep it, where nobody asked for the end), then end the attempt."""
    policy = run.spec["node"]["on_finish"]
    keep = reason == "succeeded" and run.stop is None
    for node in nodes:
        if node.settled or node.kept or not node.alive:
            continue
        until = (
            None if policy in {"keep", "terminate"} else terms.kept_until(run, now, parse_duration(policy))
        )
        if keep and (policy == "keep" or (until is not None and until > now)):
            return w.Keep(node.key, until)
        return w.Terminate(node.key, reason)
    if all(node.settled or node.kept for node in nodes):
        return w.EndAttempt(reason)
    return None
