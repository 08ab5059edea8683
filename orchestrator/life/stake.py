"""What is at stake while a node holds what cannot be brought home now, and what waiting for it costs. Pure; words for people."""

from __future__ import annotations

from datetime import datetime

from orchestrator.figures import dollars, duration
from orchestrator.life import terms
from orchestrator.life import world as w
from runs import charges
from runs.record import RunRecord
from runs.rows import usd


def at_stake(run: RunRecord, world: w.World, now: datetime) -> str | None:
    """What would be lost if the node went now, why it is not here, the price of a minute, and what ends the wait; None while
    nothing holds the collection up."""
    attempt, job = run.attempt, world.jobs.get("collect")
    if attempt is None or attempt.trainer_end is None:
        return None
    silent = next((item.error for item in world.contacts.values() if not item.reachable), None)
    if silent is None and (job is None or not job.failures):
        return None
    steps = [step for step in terms.wanted(run, attempt) if not run.checkpoints[step].fetched]
    what = f"the checkpoint of step {', '.join(map(str, steps))}" if steps else "the rest of log and metrics"
    reason = silent or (job.reason if job is not None else "") or "the node does not answer"
    price = dollars(usd(charges.rate(run)) / 60)
    left = terms.seconds_left(run, now, reserve=False)
    end = (
        f"the {left[1]} ends the wait in {duration(max(0.0, left[0]))}" if left else "no budget ends the wait"
    )
    return f"{what} would be lost with the node, and cannot be had now ({reason}); each minute of waiting costs {price}, {end}"
