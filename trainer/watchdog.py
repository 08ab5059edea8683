"""What the supervisor judges by: the job, the clock, the deadline, progress, and what an exit means. Standard library only.

*Clocks.* Every interval is measured on the boot clock, which runs on while a machine sleeps and never jumps. A deadline
is a time of day, so it is turned into an interval when it is armed: at the start, when the file `deadline`
changes, and after a reboot. From then on neither a jump forward can fire it early nor a jump back delay it. How far
the wall clock has moved against the boot clock since is reported (`clock_jump_seconds`); a driver that sees one
rewrites the deadline, which arms it anew. Progress is a change of the trainer's status, never an age computed from its times of day.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from trainer import clock

SCRATCH = "scratch"
"""The folder in the run's directory for what torchrun and torch.compile would leave in the temporary one."""
REFUSALS = {3: "config, data or disk refused", 4: "non_finite", 5: "out_of_memory"}
"""Exit codes of the trainer after which another start would end the same way."""
_REASONS = {"config": 3, "data": 3, "disk_full": 3, "non_finite": 4, "out_of_memory": 5}
"""What status.json calls them."""
_EXITS = re.compile(rb"exitcode\s*:\s*(-?\d+)")
_LOG_TAIL = 256 * 1024


class JobError(ValueError):
    """job.json cannot be used; the message says why."""


@dataclass(frozen=True)
class Job:
    """`job.json`, as the driver writes it. Times are in seconds."""

    token: str
    """Names this start: the same token never starts a second trainer."""
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    """Plain values for the trainer's environment."""
    secrets_file: str | None = None
    """KEY=VALUE lines for the trainer's environment. The supervisor takes the file: it is read into memory and removed."""
    max_restarts: int = 3
    deadline: float | None = None
    """POSIX seconds at which nothing of the run may be left."""
    grace_seconds: float = 60
    """How long before the deadline the trainer is asked to checkpoint and stop."""
    stop_grace_seconds: float = 300
    """How long a requested stop may take before the trainer is ended."""
    stall_factor: float = 20
    """Median steps without a step that count as a stall …"""
    stall_floor_seconds: float = 300
    """… and the least time that does."""
    first_step_seconds: float = 1800
    """The same before the first step, and where neither steps nor batches of an evaluation are counted."""
    restart_pause_seconds: float = 2
    """Pause before the first restart; it grows by as much with each one, up to ten times."""
    nodes: int = 1
    """How many nodes train together."""
    gather_seconds: float = 300
    """How long the nodes of a run may take to find each other again before this one gives the others up."""
    watch_interruption: bool = False
    """Ask the instance's metadata service for a spot interruption."""

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read job.json. Raises JobError."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise JobError(f"{path}: {error}") from error
        if not isinstance(raw, dict):
            raise JobError(f"{path}: must be a mapping")
        known = {item.name: raw[item.name] for item in fields(cls) if item.name in raw}
        checks = {
            "token": isinstance(raw.get("token"), str) and raw["token"] != "",
            "argv": _strings(raw.get("argv")) and bool(raw["argv"]),
            "env": isinstance(raw.get("env", {}), dict) and _strings(list(raw.get("env", {}).values())),
            "secrets_file": isinstance(raw.get("secrets_file"), (str, type(None))),
            "max_restarts": isinstance(raw.get("max_restarts", 0), int) and raw.get("max_restarts", 0) >= 0,
            "nodes": isinstance(raw.get("nodes", 1), int) and raw.get("nodes", 1) >= 1,
            "deadline": raw.get("deadline") is None or _finite(raw["deadline"]),
        }
        checks.update({key: _finite(value) and value >= 0 for key, value in known.items()
                       if key.endswith("_seconds") or key == "stall_factor"})  # fmt: skip
        if wrong := [key for key, fine in checks.items() if not fine]:
            raise JobError(f"{path}: unusable {', '.join(wrong)}")
        return cls(**known)

    def take_secrets(self, run: Path) -> dict[str, str] | None:
        """Read the secrets and remove their file, so that none stays on a node that nobody cleans up; None: there is no file.

        A second start of the same token writes it again while the first one's supervisor lives: that one takes it too.
        """
        if self.secrets_file is None:
            return None
        path = run / self.secrets_file
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            path.unlink()
        except OSError:
            return None
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def environment(self, run: Path, mark: str, secrets: Mapping[str, str] | None) -> dict[str, str]:
        """The trainer's whole environment. Raises JobError where it needs secrets and there are none."""
        if self.secrets_file is not None and secrets is None:
            raise JobError(f"{self.secrets_file}: there is no such file")
        secrets = secrets or {}
        own = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": str(run / SCRATCH / "inductor")}
        return {**os.environ, **own, **self.env, **secrets, mark: str(run)}


class Clock:
    """The machine's clocks; tests pass their own."""

    def wall(self) -> float:
        """POSIX seconds: may jump."""
        return time.time()

    def boot(self) -> float:
        """Seconds since some moment of this boot, sleep included: never jumps."""
        return clock.boot()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class Deadline:
    """A time of day, armed as an interval of the boot clock."""

    def __init__(self, clock: Clock, at: float | None) -> None:
        self._clock = clock
        self.arm(at)

    def arm(self, at: float | None) -> None:
        """Set it anew; None: there is none."""
        self.at = at
        self._offset = self._clock.wall() - self._clock.boot()

    def remaining(self) -> float:
        """Seconds left; infinite without a deadline."""
        return math.inf if self.at is None else self.at - self._offset - self._clock.boot()

    def jump(self) -> float:
        """Seconds by which the wall clock has moved against the boot clock since the deadline was armed."""
        return self._clock.wall() - self._clock.boot() - self._offset


class Progress:
    """When one start of the trainer last moved, and how long it may take to move again."""

    def __init__(self, now: float, status: Mapping[str, Any]) -> None:
        self._key = _key(status)
        self._last_step = status.get("last_step_time")
        self._seconds: deque[float] = deque(maxlen=101)
        self._paced = False
        self.since = now
        self.stepped = False

    def observe(self, now: float, status: Mapping[str, Any]) -> None:
        """Take in `status.json` as it is now."""
        if (key := _key(status)) == self._key:
            return
        self._key, self.since = key, now
        self._paced = status.get("state") in ("running", "training") or status.get("progress") is not None
        last_step, seconds = status.get("last_step_time"), status.get("step_seconds")
        if last_step is not None and last_step != self._last_step:
            self._last_step, self.stepped = last_step, True
            if _finite(seconds):
                self._seconds.append(seconds)

    def limit(self, job: Job) -> float:
        """Seconds without progress that count as a stall."""
        if not self.stepped or not self._paced:
            return job.first_step_seconds
        median = statistics.median(self._seconds) if self._seconds else 0
        return max(job.stall_floor_seconds, job.stall_factor * median)


def exit_code(returned: int, log: Path, offset: int, status: Mapping[str, Any]) -> int:
    """The trainer's own exit code behind torchrun's, which is 1 whatever its workers ended with. torchrun lists each
    worker's exit in its report, so those in `log` from `offset` on are read: a refusal of any rank first, then the
    first that torchrun itself did not cause by ending the survivors (-15). The trainer's status serves where the log was lost (disk full)."""
    if returned in (0, *REFUSALS):
        return returned
    try:
        with log.open("rb") as file:
            file.seek(max(offset, log.stat().st_size - _LOG_TAIL))
            codes = [int(code) for code in _EXITS.findall(file.read())]
    except OSError:
        codes = []
    if status.get("state") == "failed" and status.get("reason") in _REASONS:
        codes.append(_REASONS[status["reason"]])
    refused = [code for code in codes if code in REFUSALS]
    others = [code for code in codes if code != -signal.SIGTERM]
    return (refused or others or [returned])[0]


def describe(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}" + (f" ({REFUSALS[code]})" if code in REFUSALS else "")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where the file is absent or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: object, *, sync: bool = False) -> None:
    """Replace a JSON file in one piece. Raises OSError; the old file is then untouched."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _key(status: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(status.get(name) for name in ("state", "step", "last_step_time", "progress"))


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
