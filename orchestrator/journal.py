"""The mirrored metrics, read onwards: what they say of progress, checkpoints and the time that each phase took.

`metrics.raw.jsonl` is the node's file byte for byte, of all attempts; `metrics.jsonl` is its fold: each step once, the
later writing wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from runs import events as e
from runs import metrics
from runs.record import RunRecord


class Journal:
    """One run's metrics, folded as they arrive."""

    def __init__(self, raw: Path, folded: Path) -> None:
        self.raw, self._folded = raw, folded
        self._offset = 0
        self._state = metrics.State()
        self._checkpoints: dict[int, dict[str, Any]] = {}
        self._mirror = metrics.Mirror(folded)

    def read(self, clock_offset_seconds: float) -> None:
        """Take in the whole lines that the raw file has gained."""
        if not self.raw.exists():
            return
        with self.raw.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        if not data:
            return
        self._offset += len(data)
        lines = data.splitlines()
        self._state = metrics.fold_lines(self._state, lines, offset_seconds=clock_offset_seconds)
        self._mirror.write(lines)

    def checkpoints(self, run: RunRecord) -> Iterator[dict[str, Any]]:
        """Announcements that the record does not have."""
        for step, line in self._state.checkpoints.items():
            known = run.checkpoints.get(step)
            if known is None or known.announced != line["sha256"]:
                yield line

    def progress(self, run: RunRecord, now: datetime) -> e.ProgressSeen | None:
        """What the record does not say yet, as an event; None where it says it all."""
        if not self._offset:
            return None
        end = run.intervals[-1][2] if run.intervals else 0.0
        new = [
            (item.phase, max(item.start, end), item.end)
            for item in self._state.intervals
            if item.end > end + 1e-6
        ]
        summary = self._state.summary()
        changed = {key: value for key, value in summary.items() if run.summary.get(key) != value}
        if not new and not changed:
            return None
        return e.ProgressSeen(at=now, summary=changed, intervals=tuple(new))
