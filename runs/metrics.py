"""What metrics.jsonl says: a streaming fold of its lines, and their mirror on this side.

The node's file only grows; after a restart, steps that were made before appear again. The fold counts each step once, the
later writing winning, and tells where the time went: one interval a phase, neighbours merged, for the bill.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

WINDOW = 1000
"""Steps whose speed the medians look at."""
TRAIN_LOSS_STEPS = 100
"""Steps that `train_loss` is the mean of."""
SETTLED_STEPS = 4
"""Steps after a start, the first one aside, whose median tells what the first one took too long."""
_HEAD = re.compile(rb'"kind":\s*"(\w+)".*?"step":\s*(\d+)', re.DOTALL)


class Interval(NamedTuple):
    """Time of a node's life that one phase took, POSIX seconds of this machine's clock."""

    phase: str
    start: float
    end: float


@dataclass
class State:
    """The fold of all lines so far."""

    step: int = 0
    tokens: int = 0
    time: float | None = None
    """When the last line was written, this machine's clock."""
    highest_step: int = 0
    checkpoints: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The announcement of each saved checkpoint, by step."""
    validations: dict[int, float | None] = field(default_factory=dict)
    intervals: list[Interval] = field(default_factory=list)
    """In order, without overlap; the last one may still grow."""
    system: dict[str, Any] = field(default_factory=dict)
    """The facts of the last start: gpu, torch, world_size, microbatch_size, parameters, …"""
    memory_gib: float | None = None
    """Peak, over all processes' lifetimes."""
    restarts: int = 0
    skipped_steps: int = 0
    bad_lines: int = 0
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """The last steps' own lines."""
    first_steps: set[int] = field(default_factory=set)
    """The first step after each start, whose speed is not that of the run."""
    starting: bool = True
    """The next step is the first one after a start."""
    started: float | None = None
    """When the trainer that has not made a step yet said what it is."""
    held: list[tuple[str, float, float, bool]] = field(default_factory=list)
    """(phase, start, end, first) since a start, until a median can split the first step."""

    def summary(self) -> dict[str, Any]:
        """What the record keeps, as plain JSON values; None where nothing is known."""
        losses = self.values("loss")
        best = self.best()
        per_epoch = self.system.get("tokens_per_epoch")
        return {
            "step": self.step,
            "tokens": self.tokens,
            "highest_step": self.highest_step,
            "epochs": self.tokens / per_epoch if per_epoch else None,
            "loss": number(self.recent[-1].get("loss")) if self.recent else None,
            "train_loss": statistics.fmean(losses[-TRAIN_LOSS_STEPS:]) if losses else None,
            "validation_loss": best[1] if best else None,
            "best_step": best[0] if best else None,
            "tokens_per_second": self.median("tokens_per_second"),
            "step_seconds": self.median("step_seconds"),
            "mfu": self.median("mfu"),
            "memory_gib": self.memory_gib,
            "restarts": self.restarts,
            "skipped_steps": self.skipped_steps,
            **{key: self.system.get(key) for key in _FACTS},
            "versions": {key: self.system[key] for key in ("torch", "python") if key in self.system},
        }

    def best(self) -> tuple[int, float] | None:
        """The saved checkpoint with the lowest validation loss."""
        known = [
            (item["validation_loss"], step)
            for step, item in self.checkpoints.items()
            if item.get("validation_loss") is not None
        ]
        return min(known)[::-1] if known else None

    def values(self, key: str, *, steady: bool = False) -> list[float]:
        """The recent steps' numbers, oldest first; with `steady` without the first step after a start."""
        return [
            value
            for item in self.recent
            if (value := number(item.get(key))) is not None
            and not (steady and item["step"] in self.first_steps)
        ]

    def median(self, key: str) -> float | None:
        """Over the steady steps; where there are none, over all."""
        values = self.values(key, steady=True) or self.values(key)
        return statistics.median(values) if values else None


_FACTS = ("gpu", "gpus", "device", "world_size", "microbatch_size", "parameters", "flops_per_token", "peak_flops", "compile")  # fmt: skip


def fold_lines(state: State, lines: Iterable[bytes | str], offset_seconds: float = 0.0) -> State:
    """Take in more lines, oldest first, and return `state`, changed in place.

    `offset_seconds` is this machine's clock minus the node's. A torn or foreign line is counted and passed over.
    """
    for line in lines:
        record = read_line(line)
        if record is None:
            state.bad_lines += bool(line.strip())
            continue
        at = record["time"] + offset_seconds
        _KINDS[record["kind"]](state, record, record["step"], at)
        if state.time is None or at > state.time:
            state.time = at
    return state


def read_line(line: bytes | str) -> dict[str, Any] | None:
    """A record with a known kind, a step and a time; None where the line is none."""
    try:
        record = from_json(_mended(line.encode() if isinstance(line, str) else line))
    except ValueError:
        return None
    whole = (
        isinstance(record, dict)
        and record.get("kind") in _KINDS
        and type(record.get("step")) is int
        and number(record.get("time")) is not None
    )
    return record if whole else None


def _mended(line: bytes) -> bytes:
    """The last whole record of a line that begins with a torn one."""
    begin = line.rfind(b'{"kind"')
    return line[begin:] if begin > 0 else line


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    return float(value) if type(value) is int else None


def _step(state: State, record: dict[str, Any], step: int, end: float) -> None:
    if step <= state.step:
        _forget(state, step - 1)
    if state.starting:
        state.first_steps.add(step)
    state.recent.append(record)
    state.step, state.tokens = step, int(number(record.get("tokens")) or 0)
    memory = number(record.get("memory_gib"))
    if memory is not None and (state.memory_gib is None or memory > state.memory_gib):
        state.memory_gib = memory
    if record.get("skipped"):
        state.skipped_steps += 1
    phase = "redone" if step <= state.highest_step else "training"
    state.highest_step = max(step, state.highest_step)
    _claim(state, phase, end - (number(record.get("step_seconds")) or 0.0), end, first=state.starting)
    state.starting = False


def _forget(state: State, step: int) -> None:
    """Steps after `step` will be made again."""
    while state.recent and state.recent[-1]["step"] > step:
        state.recent.pop()
    state.first_steps = {item for item in state.first_steps if item <= step}
    state.validations = {item: loss for item, loss in state.validations.items() if item <= step}
    state.checkpoints = {item: line for item, line in state.checkpoints.items() if item <= step}


def _validation(state: State, record: dict[str, Any], step: int, end: float) -> None:
    state.validations[step] = number(record.get("validation_loss"))
    _claim(state, "evaluating", end - (number(record.get("seconds")) or 0.0), end)


def _checkpoint(state: State, record: dict[str, Any], step: int, _end: float) -> None:
    state.checkpoints[step] = {**record, "validation_loss": number(record.get("validation_loss"))}
    _release(state)


def _resume(state: State, _record: dict[str, Any], step: int, _end: float) -> None:
    if step < state.step:
        _forget(state, step)
        state.tokens = state.tokens // state.step * step
        state.step = step
    state.restarts += 1


def _system(state: State, record: dict[str, Any], _step: int, written: float) -> None:
    if "world_size" in record:  # the trainer says what it is, and gets ready for its first step
        _release(state)
        state.system = {key: value for key, value in record.items() if key not in {"kind", "step", "time"}}
        state.starting, state.started = True, written
        return
    memory = number(record.get("peak_memory_gib"))
    if memory is not None:
        state.memory_gib = max(memory, state.memory_gib or 0.0)
        # The trainer's last line: what lies between its last step and here were the test sets and the samples.
        _claim(state, "evaluating", state.time or written, written)
    _release(state)


_KINDS = {
    "step": _step,
    "validation": _validation,
    "checkpoint": _checkpoint,
    "resume": _resume,
    "system": _system,
}


def _claim(state: State, phase: str, start: float, end: float, *, first: bool = False) -> None:
    """Note an interval; until a median is known it is held back, because the first step's excess is preparing."""
    if first and state.started is not None:
        start = min(start, state.started)
        state.started = None
    if not first and not state.held:
        _append(state.intervals, phase, start, end)
        return
    state.held.append((phase, start, end, first))
    if state.step - max(state.first_steps, default=state.step) >= SETTLED_STEPS:
        _release(state)


def _release(state: State) -> None:
    """Settle what was held back, with the median as it is known now."""
    held, state.held = state.held, []
    median = state.median("step_seconds") if held else None
    for phase, start, end, first in held:
        begin = max(start, end - median) if first and median is not None else start
        if begin - start > 0.01:
            _append(state.intervals, "preparing", start, begin)
            start = begin  # noqa: PLW2901 - the rest of it
        _append(state.intervals, phase, start, end)


def _append(intervals: list[Interval], phase: str, start: float, end: float) -> None:
    """Append, clipped to what is free; a short gap to a neighbour of the same phase is the loop's own and closed."""
    if not intervals:
        if end > start:
            intervals.append(Interval(phase, start, end))
        return
    last = intervals[-1]
    start = max(start, last.end)
    if end - start < 0.001:
        return
    gap = start - last.end
    if last.phase == phase and gap <= max(0.05, 0.2 * (end - start)):
        intervals[-1] = Interval(phase, last.start, end)
    else:
        intervals.append(Interval(phase, last.end if gap < 0.05 else start, end))


class Mirror:
    """`metrics.jsonl` on this side: each step once, in order, the later writing winning.

    It is given the node's lines from the very first one on; the first `write` replaces what is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False
        self._step = 0
        self._seen: set[tuple[bytes, int]] = set()

    def write(self, lines: Iterable[bytes]) -> None:
        """Take in more whole lines."""
        fresh: list[bytes] = []
        cut: int | None = None
        for torn in lines:
            line = _mended(torn)
            head = _HEAD.search(line)
            if head is None or not line.rstrip().endswith(b"}"):
                continue
            kind, step = head[1], int(head[2])
            back = step - (kind == b"step")  # how far the file stays true
            if kind in {b"step", b"resume"} and back < self._step:
                fresh = [item for item in fresh if _kept(item, back)]
                cut = back if cut is None else min(cut, back)
                self._seen = {item for item in self._seen if item[1] <= back}
                self._step = back
            if kind in {b"validation", b"checkpoint"}:
                if (kind, step) in self._seen:
                    continue
                self._seen.add((kind, step))
            elif kind == b"step":
                self._step = step
            fresh.append(line)
        self._store(fresh, cut)

    def _store(self, fresh: list[bytes], cut: int | None) -> None:
        if self._begun and cut is None:
            with self._path.open("ab") as file:
                file.writelines(line + b"\n" for line in fresh)
            return
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            if self._begun and cut is not None:
                with self._path.open("rb") as old:
                    file.writelines(line for line in old if _kept(line, cut))
            file.writelines(line + b"\n" for line in fresh)
        temporary.replace(self._path)
        self._begun = True


def _kept(line: bytes, step: int) -> bool:
    """Whether a line survives a return to `step`."""
    head = _HEAD.search(line)
    return head is not None and (head[1] in {b"system", b"resume"} or int(head[2]) <= step)
