"""The fold of a run: records are what events make of them, and nothing else writes a record (a node's: `runs.nodefold`). Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from runs import events as e
from runs.nodefold import FoldError
from runs.record import (
    AttemptRecord,
    CheckpointRecord,
    LaneRecord,
    RefusalRecord,
    RunRecord,
    RunState,
    StopRecord,
)

T = TypeVar("T", RunRecord, AttemptRecord)


def _with(record: T, **changes: Any) -> T:
    return record.model_copy(update=changes)


def fold_run(run: RunRecord | None, event: e.RunEvent) -> RunRecord:
    """The run after `event`. Raises FoldError where a stream does not begin with its creation."""
    if isinstance(event, e.RunCreated):
        if run is not None:
            raise FoldError(f"{event.run} is created twice")
        return RunRecord(
            run=event.run,
            name=event.spec["name"],
            provider=event.spec["hardware"]["provider"],
            spec=event.spec,
            steps=event.steps,
            created_at=event.at,
            sweep=event.sweep,
            overrides=event.overrides,
            on=event.on,
            on_or_rent=event.on_or_rent,
            max_micro_usd=event.max_micro_usd,
            max_seconds=event.max_seconds,
            wait_seconds=event.wait_seconds,
            wait_from=event.at,
        )
    if run is None:
        raise FoldError(f"{event.kind} before any RunCreated")
    return _RUN[type(event)](run, event)


def _stop(run: RunRecord, event: e.StopRequested) -> RunRecord:
    if run.outcome is not None:
        return run
    checkpoint = event.checkpoint and (run.stop is None or run.stop.checkpoint)
    reason = run.stop.reason if run.stop else event.reason
    return _with(run, stop=StopRecord(reason=reason, checkpoint=checkpoint, at=event.at))


def _resume(run: RunRecord, event: e.ResumeRequested) -> RunRecord:
    if run.outcome in {None, "succeeded"}:  # two resumes at once: the second finds the run alive
        return _with(run, max_micro_usd=event.max_micro_usd or run.max_micro_usd)
    return _with(
        run,
        outcome=None,
        reason=None,
        ended_at=None,
        stop=None,
        cancelled=False,
        wait_from=event.at,
        wait_seconds=event.wait_seconds,
        max_micro_usd=event.max_micro_usd or run.max_micro_usd,
        refusals=(),
        preflight_failures=0,
        replacements=0,
        resumes=run.resumes + 1,
        attempts_before=len(run.attempts),
        state="waiting",
    )


def _limits(run: RunRecord, event: e.LimitsRaised) -> RunRecord:
    return _with(
        run,
        max_micro_usd=event.max_micro_usd or run.max_micro_usd,
        max_seconds=event.max_seconds or run.max_seconds,
    )


def _driver(run: RunRecord, event: e.DriverStarted) -> RunRecord:
    state: RunState = "waiting" if run.state == "planned" else run.state
    return _with(
        run,
        epoch=event.epoch,
        driver_pid=event.pid,
        driver_start_time=event.start_time,
        driver_boot_id=event.boot_id,
        state=state,
    )


def _attempt_started(run: RunRecord, event: e.AttemptStarted) -> RunRecord:
    offer = run.attempts[-1].offer
    attempt = AttemptRecord(
        number=event.attempt,
        offer=offer,
        keys=event.keys,
        from_step=event.from_step,
        world_size=event.world_size,
        microbatch_size=event.microbatch_size,
        started_at=event.at,
    )
    return _with(run, attempts=(*run.attempts[:-1], attempt), state="booting")


def _offer_chosen(run: RunRecord, event: e.OfferChosen) -> RunRecord:
    attempt = AttemptRecord(
        number=event.attempt, offer=event.offer, keys=(), from_step=0, world_size=0, started_at=event.at
    )
    return _with(run, attempts=(*run.attempts, attempt), state="waiting")


def _change_attempt(run: RunRecord, number: int | None = None, **changes: Any) -> RunRecord:
    if not run.attempts:
        raise FoldError(f"{run.run} has no attempt")
    number = run.attempts[-1].number if number is None else number
    attempts = tuple(_with(item, **changes) if item.number == number else item for item in run.attempts)
    return _with(run, attempts=attempts)


def _lane(run: RunRecord, event: e.LaneDone) -> RunRecord:
    lane = LaneRecord(
        hash=event.hash,
        seconds=event.seconds,
        sent_bytes=event.sent_bytes,
        ended_at=event.at,
        detail=event.detail,
    )
    lanes = {**run.attempts[-1].lanes, f"{event.key}/{event.lane}": lane}
    return _with(
        _change_attempt(run, lanes=lanes), state="preparing" if run.state == "booting" else run.state
    )


def _trainer_started(run: RunRecord, event: e.TrainerStarted) -> RunRecord:
    attempt = run.attempts[-1]
    rearmed = attempt.token is not None and event.deadline != attempt.trainer_deadline
    changed = _change_attempt(
        run,
        event.attempt,
        token=event.token,
        trainer_started_at=attempt.trainer_started_at or event.at,
        last_start_at=event.at,
        starts=attempt.starts + (not rearmed),
        trainer_deadline=event.deadline,
    )
    return _with(changed, state="training" if run.state == "training" else "preparing")


def _trainer_ended(run: RunRecord, event: e.TrainerEnded) -> RunRecord:
    changed = _change_attempt(
        run,
        event.attempt,
        trainer_end=event.reason,
        trainer_end_detail=event.detail,
        trainer_ended_at=event.at,
    )
    return _with(changed, state="collecting")


def _seen(run: RunRecord, event: e.CheckpointSeen) -> RunRecord:
    old = run.checkpoints.get(event.step)
    same = old is not None and old.sha256 == event.sha256
    if old is not None and old.fetched and not same:
        # Made again, with other bytes: the whole one that is here is as good, and is not let go.
        again = old.model_copy(update={"announced": event.sha256})
        return _with(run, checkpoints={**run.checkpoints, event.step: again})
    item = CheckpointRecord(
        step=event.step,
        sha256=event.sha256,
        bytes=event.bytes,
        announced=event.sha256,
        validation_loss=event.validation_loss,
        seen_at=event.at,
        attempt=run.attempts[-1].number if run.attempts else 0,
        path=old.path if old and same else None,
        weights_only=old.weights_only if old and same else False,
    )
    return _with(run, checkpoints={**run.checkpoints, event.step: item})


def _verified(run: RunRecord, event: e.CheckpointVerified) -> RunRecord:
    old = run.checkpoints.get(event.step)
    if old is not None and old.fetched and (event.weights_only or old.sha256 == event.sha256):
        return run
    item = CheckpointRecord(
        step=event.step,
        sha256=event.sha256,
        bytes=event.bytes,
        announced=old.announced if old else event.sha256,
        validation_loss=old.validation_loss if old else None,
        seen_at=old.seen_at if old else event.at,
        attempt=old.attempt if old else 0,
        path=event.path,
        weights_only=event.weights_only,
        gone=old.gone if old and old.sha256 == event.sha256 else False,
    )
    return _with(run, checkpoints={**run.checkpoints, event.step: item})


def _dropped(run: RunRecord, event: e.CheckpointDropped) -> RunRecord:
    old = run.checkpoints.get(event.step)
    if old is None:
        return run
    gone = old.model_copy(update={"dropped": True, "path": None, "weights_only": False})
    return _with(run, checkpoints={**run.checkpoints, event.step: gone})


def _let_go(run: RunRecord, event: e.CheckpointGone) -> RunRecord:
    old = run.checkpoints.get(event.step)
    if old is None or old.sha256 != event.sha256:
        return run
    return _with(run, checkpoints={**run.checkpoints, event.step: old.model_copy(update={"gone": True})})


def _progress(run: RunRecord, event: e.ProgressSeen) -> RunRecord:
    training = run.state in {"booting", "preparing"} and any(
        phase == "training" for phase, _, _ in event.intervals
    )
    return _with(
        run,
        summary={**run.summary, **event.summary},
        intervals=join_intervals(run.intervals, event.intervals),
        state="training" if training else run.state,
    )


def join_intervals(
    old: tuple[tuple[str, float, float], ...], new: Iterable[tuple[str, float, float]]
) -> tuple[tuple[str, float, float], ...]:
    """Append intervals, merging one that continues the last of the same phase (a gap under 10 ms is none)."""
    joined = list(old)
    for phase, start, end in new:
        if joined and joined[-1][0] == phase and 0 <= start - joined[-1][2] < 0.01:
            joined[-1] = (phase, joined[-1][1], end)
        else:
            joined.append((phase, start, end))
    return tuple(joined)


def _evaluated(run: RunRecord, event: e.EvaluationRecorded) -> RunRecord:
    result = {"name": event.name, "step": event.step, **event.result}
    others = tuple(
        item for item in run.evaluations if (item["name"], item["step"]) != (event.name, event.step)
    )
    return _with(run, evaluations=(*others, result))


def _job_failed(run: RunRecord, event: e.JobFailed) -> RunRecord:
    if not run.attempts:
        return run
    attempt = run.attempts[-1]
    name = f"{event.key}/{event.job}" if event.key else event.job
    count = attempt.failures.get(name, (0, ""))[0] + 1
    fatal = attempt.fatal or (event.reason if event.fatal else None)
    return _change_attempt(run, failures={**attempt.failures, name: (count, event.reason)}, fatal=fatal)


def _attempt_ended(run: RunRecord, event: e.AttemptEnded) -> RunRecord:
    changed = _change_attempt(run, event.attempt, ended_at=event.at, end_reason=event.reason)
    changes: dict[str, Any] = {"state": "waiting"}
    attempt = changed.attempts[-1]
    if event.reason == "no-capacity":
        refusal = RefusalRecord(
            instance_type=attempt.offer.instance_type,
            region=attempt.offer.region,
            code=event.reason,
            at=event.at,
        )
        changes["refusals"] = (*run.refusals, refusal)
    elif event.reason == "preflight":
        changes["preflight_failures"] = run.preflight_failures + 1
    elif event.reason in {"node-lost", "trainer-lost", "trainer-interrupted"}:
        newest = run.resume_step
        changes["replacements"] = 1 if newest > run.replaced_at_step else run.replacements + 1
        changes["replaced_at_step"] = newest
    return _with(changed, **changes)


def _ended(run: RunRecord, event: e.RunEnded) -> RunRecord:
    return _with(run, outcome=event.outcome, reason=event.reason, ended_at=event.at, state=event.outcome)


_RUN: dict[type, Callable[[RunRecord, Any], RunRecord]] = {
    e.StopRequested: _stop,
    e.ResumeRequested: _resume,
    e.LimitsRaised: _limits,
    e.WaitCancelled: lambda run, _: _with(run, cancelled=True),
    e.ReleaseRequested: lambda run, event: _with(run, release_requested=run.release_requested | {event.key}),
    e.DriverStarted: _driver,
    e.OfferChosen: _offer_chosen,
    e.AttemptStarted: _attempt_started,
    e.LaneDone: _lane,
    e.TrainerStarted: _trainer_started,
    e.TrainerRestarted: lambda run, event: _change_attempt(run, restarts=event.restarts),
    e.TrainerEnded: _trainer_ended,
    e.CheckpointSeen: _seen,
    e.CheckpointVerified: _verified,
    e.CheckpointDropped: _dropped,
    e.CheckpointGone: _let_go,
    e.ProgressSeen: _progress,
    e.EvaluationRecorded: _evaluated,
    e.JobFailed: _job_failed,
    e.AttemptEnded: _attempt_ended,
    e.RunEnded: _ended,
}


def fold_all(stream: Iterable[e.RunEvent]) -> RunRecord | None:
    """The record of a whole stream."""
    record: RunRecord | None = None
    for event in stream:
        record = fold_run(record, event)
    return record
