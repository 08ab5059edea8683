"""A run's loss over steps, tokens, hours or dollars: for the terminal's chart and for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runs.series import series
from runs.store import Store, run_dir

if TYPE_CHECKING:
    from collections.abc import Sequence

AXES = ("steps", "tokens", "hours", "dollars")


def curve(
    store: Store, run: str, over: str, key: str = "loss", points: int = 300
) -> tuple[list[float], list[float]]:
    """(axis, values) of one run; hours and dollars count from its first billed moment. Empty where nothing was logged.

    Raises KeyError for an axis that there is not.
    """
    found = series(run_dir(store.home, run) / "metrics.jsonl", key, points)
    if over == "steps":
        return [float(step) for step in found.steps], found.values
    if over == "tokens":
        return [float(token) for token in found.tokens], found.values
    if over not in AXES:
        raise KeyError(f"there is no axis {over!r}; there are {', '.join(AXES)}")
    spent = meter(store, run)
    if over == "hours":
        start = spent[0][0] if spent else (found.times[0] if found.times else 0.0)
        return [(time - start) / 3600 for time in found.times], found.values
    return at(spent, found.times), found.values


def meter(store: Store, run: str) -> list[tuple[float, float]]:
    """(POSIX seconds, dollars until then) over a run's charges; the first entry has no dollars."""
    from runs import charges
    from runs.rows import usd
    from runs.store import utcnow

    record = store.record(run)
    if record is None:
        return []
    items = sorted(charges.charges(record, utcnow()), key=lambda item: item.start)
    marks: list[tuple[float, float]] = []
    total = 0
    for item in items:
        marks.append((item.start.timestamp(), usd(total)))
        total += item.micro_usd
        marks.append((item.end.timestamp(), usd(total)))
    return sorted(marks)


def at(marks: Sequence[tuple[float, float]], times: Sequence[float]) -> list[float]:
    """The meter's reading at each of `times` (ascending), between its marks on a straight line."""
    if not marks:
        return [0.0 for _ in times]
    result, index = [], 0
    for time in times:
        while index + 1 < len(marks) and marks[index + 1][0] <= time:
            index += 1
        (start, low), (end, high) = marks[index], marks[min(index + 1, len(marks) - 1)]
        share = (time - start) / (end - start) if end > start else 0.0
        result.append(low + (high - low) * min(1.0, max(0.0, share)))
    return result
