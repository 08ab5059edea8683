"""How long between two tries, and which of several waits. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from orchestrator.life import world as w


def backoff(world: w.World, tries: int, *, accepted: bool = False) -> timedelta:
    """`retry_seconds` and twice as long after each try, up to twelve times that; the longest where the request was accepted
    and only the end is awaited."""
    first = world.traits.retry_seconds
    return timedelta(seconds=first * 12 if accepted else min(first * 12, first * 2 ** max(0, tries - 1)))


def left_until(world: w.World, since: datetime | None, tries: int, now: datetime) -> float:
    """Seconds until the next try; not positive: now."""
    return (since + backoff(world, tries) - now).total_seconds() if since is not None else 0.0


def nearer(answer: w.Effect | w.Wait, seconds: float) -> w.Effect | w.Wait:
    """A wait of at most `seconds`."""
    return w.Wait(min(answer.seconds, seconds), answer.why) if isinstance(answer, w.Wait) else answer


def sooner(one: w.Wait | None, other: w.Wait) -> w.Wait:
    return other if one is None or other.seconds < one.seconds else one
