"""The mirrored metrics, read onwards: what they say of progress, checkpoints and the time that each phase took.

`metrics.raw.jsonl` is the node's file byte for byte, of all attempts; `metrics.jsonl` is its fold: each step once, the
later writing wins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.remote.mirror import bases
from runs import events as e
from runs import metrics
from runs.record import RunRecord
from trainer.utilisation import NAMES


class Journal:
    """One run's metrics, folded as they arrive."""

    def __init__(self, raw: Path, folded: Path) -> None:
        self.raw, self._folded = raw, folded
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self._state = metrics.State()
        self._attempts: dict[int, int] = {}
        """step → the attempt that announced its checkpoint last."""
        self._mirror = metrics.Mirror(self._folded)

    def read(self, run: RunRecord) -> None:
        """Take in the whole lines that the raw file has gained, each attempt's by the clock of its own node. Raises
        OSError where `metrics.jsonl` cannot be written."""
        if not self.raw.exists():
            return
        with self.raw.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        end = self._offset + len(data)
        starts = sorted((base, attempt) for attempt, base in bases(self.raw).items())
        for (base, attempt), (until, _) in itertools.pairwise([*starts, (end, 0)]):
            first, last = max(base, self._offset), min(until, end)
            if first < last:
                piece = data[first - self._offset : last - self._offset].splitlines()
                self._take(piece, attempt, _clock_offset(run, attempt))
        self._offset = end

    def _take(self, lines: list[bytes], attempt: int, offset_seconds: float) -> None:
        before = dict(self._state.checkpoints)
        self._state = metrics.fold_lines(self._state, lines, offset_seconds=offset_seconds)
        for step, line in self._state.checkpoints.items():
            if before.get(step) is not line:
                self._attempts[step] = attempt
        try:
            self._mirror.write(lines)
        except OSError:
            self._begin()  # how much of it was written is not known: the next reading starts from the first line
            raise

    def checkpoints(self, run: RunRecord) -> Iterator[dict[str, Any]]:
        """Announcements that the record does not have. The same bytes, made again by a later attempt, are news: they can be
        had from its node."""
        number = run.attempt.number if run.attempt is not None else None
        for step, line in self._state.checkpoints.items():
            known = run.checkpoints.get(step)
            again = known is not None and known.attempt != number == self._attempts[step]
            if known is None or known.announced != line["sha256"] or (again and not known.fetched):
                yield line

    def progress(
        self, run: RunRecord, now: datetime, gpu: Mapping[str, float] | None = None
    ) -> e.ProgressSeen | None:
        """What the record does not say yet, as an event; None where it says it all.

        `gpu`: what the first node's supervisor tells of its GPUs (`trainer.utilisation.NAMES`).
        """
        if not self._offset:
            return None
        end = run.intervals[-1][2] if run.intervals else 0.0
        new = [
            (item.phase, max(item.start, end), item.end)
            for item in self._state.intervals
            if item.end > end + 1e-6
        ]
        summary = self._state.summary()
        if (
            gpu is not None and summary.get("gpus") != 0
        ):  # beside a trainer on the CPU, the GPUs' work is another's
            summary |= {f"gpu_{name}": gpu.get(name) for name in NAMES}  # None: nvidia-smi tells it no more
        changed = {key: value for key, value in summary.items() if run.summary.get(key) != value}
        if not new and not changed:
            return None
        return e.ProgressSeen(at=now, summary=changed, intervals=tuple(new))


def _clock_offset(run: RunRecord, attempt: int) -> float:
    """This machine's clock minus that of the attempt's first node."""
    keys = next((item.keys for item in run.attempts if item.number == attempt), ())
    node = run.node(keys[0]) if keys else None
    return node.clock_offset_seconds if node is not None else 0.0
