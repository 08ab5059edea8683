"""What a run tells the outside: `metrics.jsonl`, `status.json`, and a line in the log now and then.

metrics.jsonl only grows. status.json is replaced whole, at least once a second while the process lives, whatever the
training does; `last_step_time` in it moves with steps only. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import clock

HEARTBEAT_SECONDS = 0.5
FAILURE = "failure.json"
STOP = "stop"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    temporary.replace(path)


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no name for it."""
    return value if math.isfinite(value) else None


class Metrics:
    """The metrics file, open for appending. Lines are written whole; threads may share it."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:  # a kill cut the last line off: end it, so that the next one stands alone
            self._file.write("\n")

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append records in one write."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with self._lock:
            self._file.write(text)
            self._file.flush()

    def sync(self) -> None:
        """Return once what was written is on the disk."""
        with self._lock:
            os.fsync(self._file.fileno())


class Status:
    """status.json, kept fresh by a thread that also looks for the file `stop` and for failures of other ranks."""

    def __init__(self, out: Path, **fields: Any) -> None:
        self._out, self._lock = out, threading.Lock()
        self._fields: dict[str, Any] = {
            "state": "starting", "step": 0, "steps": 0, "last_step_time": None, "step_seconds": None,
            "reason": None, "message": None, "checkpoint_step": None, "pid": os.getpid(), **fields,
        }  # fmt: skip
        self.stop = threading.Event()
        self._ended = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def update(self, **fields: Any) -> None:
        """Change fields; the state at once, the rest with the next beat."""
        with self._lock:
            urgent = fields.get("state", self._fields["state"]) != self._fields["state"]
            self._fields.update(fields)
        if urgent:
            self._write()

    def end(self, state: str, *, reason: str | None = None, message: str | None = None) -> None:
        """The last word."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self._fields.update(state=state, reason=reason, message=message)
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            if (self._out / STOP).exists():
                self.stop.set()
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                failure = json.loads((self._out / FAILURE).read_text(encoding="utf-8"))
                with self._lock:
                    self._fields.update(state="failed", reason=failure["reason"], message=failure["message"])
            with contextlib.suppress(OSError):  # a full disk must not end the training
                self._write()

    def _write(self) -> None:
        with self._lock:
            write_json(self._out / "status.json", {**self._fields, "time": clock.now()})


class Voice:
    """What one process of a run says, and whether it was told to stop. Rank 0 alone owns the two files."""

    stop: threading.Event
    status: Status | None
    metrics: Metrics | None

    @property
    def stopping(self) -> bool:
        """Whether this rank knows of a request to stop."""
        return self.stop.is_set() or (self.status is not None and self.status.stop.is_set())

    def tell(self, **fields: Any) -> None:
        """Update status.json, on the rank that owns it."""
        if self.status is not None:
            self.status.update(**fields)

    def record(self, *records: dict[str, Any]) -> None:
        """Append to metrics.jsonl, on the rank that owns it."""
        if self.metrics is not None:
            self.metrics.write(*records)


def report_failure(out: Path, reason: str, message: str) -> None:
    """Leave word of a failure on a rank that does not own status.json."""
    with contextlib.suppress(OSError):
        write_json(out / FAILURE, {"reason": reason, "message": message})


def log(text: str) -> None:
    """One line of the log. A log that nobody takes any more does not end the training."""
    with contextlib.suppress(OSError):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def step_line(record: Mapping[str, Any], steps: int) -> str:
    """The log's line about a step."""
    loss = "not finite, skipped" if record.get("skipped") else f"{record['loss']:.4f}"
    norm = "-" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
    mfu = "" if record["mfu"] is None else f" | MFU {record['mfu']:.1%}"
    return (
        f"step {record['step']}/{steps} | loss {loss} | lr {record['learning_rate']:.2e} | grad norm {norm}"
        f" | {record['tokens_per_second']:,.0f} tok/s{mfu}"
    )
