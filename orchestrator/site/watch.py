"""One node, watched: a thread that keeps the connection, polls the supervisor, and mirrors log and metrics.

It only looks. What it saw is read from its attributes by `site`, which turns it into events.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from orchestrator.clock import Clock
from orchestrator.life.world import Contact, TrainerView
from orchestrator.remote.connection import (
    CommandFailed,
    HostKeyMismatch,
    NodeUnreachable,
    NoSuchFile,
    RemoteError,
)
from orchestrator.remote.mirror import Mirror
from orchestrator.remote.node import Remote
from orchestrator.remote.stream import follow

POLL_SECONDS = 1.0
SILENT_SECONDS = 15.0
"""A supervisor that wrote nothing for this long is asked for: its heartbeat is every second."""
PROBE = """
import json, os, platform, shutil, subprocess, sys, time
boot = "/proc/sys/kernel/random/boot_id"
query = "--query-gpu=name,memory.total,memory.used,temperature.gpu,driver_version"
gpus = []
try:
    out = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20)
    for line in out.stdout.splitlines():
        name, total, used, celsius, driver = [word.strip() for word in line.split(",")]
        gpus.append({"name": name, "memory_mib": int(total), "used_mib": int(used), "celsius": int(celsius), "driver": driver})
except (OSError, ValueError, subprocess.TimeoutExpired):
    pass
print(json.dumps({
    "boot_id": open(boot).read().strip() if os.path.exists(boot) else "", "time": time.time(),
    "python": sys.version.split()[0], "machine": platform.machine(), "system": platform.system(),
    "cpus": os.cpu_count(), "disk_free_bytes": shutil.disk_usage(".").free, "gpus": gpus,
}))
"""
"""What a verified login learns about its node; the standard library of any Python 3."""


@dataclass
class Seen:
    """What the watch knows now. Replaced piece by piece, read by others; each field is one reference."""

    contact: Contact | None = None
    ready: dict[str, Any] | None = None
    """Facts of the first login: boot_id, clock_offset_seconds, …"""
    supervisor: dict[str, Any] = field(default_factory=dict)
    trainer: TrainerView | None = None


class Watch:
    """The thread of one node. `mirrors`: node file → its local mirror; None where another node's are mirrored."""

    def __init__(
        self,
        remote: Remote,
        run: str,
        clock: Clock,
        wake: Callable[[], None],
        mirrors: dict[str, Mirror] | None,
    ) -> None:
        self.remote, self.seen = remote, Seen()
        self.directory = f"~/llmctl/runs/{run}"
        self._clock, self._wake, self._mirrors = clock, wake, mirrors or {}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._fresh_at = clock.monotonic()
        self._threads: list[threading.Thread] = []
        self._spawn(self._work, f"watch {remote.address.key}")

    def _spawn(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Stop watching; does not wait for a stuck connection."""
        self._stop.set()
        self.remote.close()

    def asked(self) -> None:
        """The supervisor was just told something: what was seen before says nothing any more."""
        with self._lock:
            self.seen.trainer = None
            self._fresh_at = self._clock.monotonic()

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        pause = POLL_SECONDS
        while not self._stop.is_set():
            try:
                if self.seen.ready is None:
                    self.seen.ready = self._login()
                    for name, mirror in self._mirrors.items():
                        self._spawn(partial(self._mirror, name, mirror), f"mirror {name}")
                self._poll()
                self._contact(reachable=True)
                pause = POLL_SECONDS
            except HostKeyMismatch as error:
                self._contact(reachable=False, mismatch=True, error=str(error))
                pause = 5.0
            except NodeUnreachable as error:
                self._contact(reachable=False, error=str(error))
                pause = min(10.0, pause * 1.5)
            except RemoteError as error:
                self._contact(reachable=True, error=str(error))
                pause = min(10.0, pause * 1.5)
            self._clock.wait(self._stop, pause)

    def _contact(self, *, reachable: bool, mismatch: bool = False, error: str = "") -> None:
        old = self.seen.contact
        same = old is not None and old.reachable == reachable and old.host_key_mismatch == mismatch
        since = old.since if same and old is not None else self._clock.now()
        self.seen.contact = Contact(reachable=reachable, since=since, host_key_mismatch=mismatch, error=error)
        if not same:
            self._wake()

    def _login(self) -> dict[str, Any]:
        """The first verified command on the node."""
        before = self._clock.now().timestamp()
        answer = self.remote.run(["python3", "-c", PROBE], timeout=30).text
        try:
            facts: dict[str, Any] = json.loads(answer)
        except ValueError as error:
            raise RemoteError(f"the node says nothing sensible of itself: {answer[:100]!r}") from error
        after = self._clock.now().timestamp()
        facts["clock_offset_seconds"] = round((before + after) / 2 - facts.pop("time"), 3)
        self._wake()
        return facts

    def _poll(self) -> None:
        """Read what the supervisor wrote; ask for it by name when it has gone silent."""
        started = self._clock.monotonic()
        try:
            state = json.loads(self.remote.read(f"{self.directory}/supervisor.json"))
        except NoSuchFile:
            self._see(TrainerView("absent", None, self._clock.now()), started)
            return
        except ValueError:
            return
        if state.get("heartbeat") != self.seen.supervisor.get("heartbeat") or state.get("state") == "ended":
            self._fresh_at = max(self._fresh_at, started)
        self.seen.supervisor = state
        word = state.get("state", "starting")
        if word != "ended" and started - self._fresh_at > SILENT_SECONDS and not self._lives():
            word = "dead"
        graceful = word != "stopping" or state.get("checkpoint") is not False
        until = state.get("deadline")
        deadline = datetime.fromtimestamp(until, UTC) if until else None
        self._see(TrainerView(word, state.get("token"), self._clock.now(), graceful, deadline), started)

    def _lives(self) -> bool:
        """Whether the silent supervisor's process exists."""
        command = f"cd {self.directory.replace('~', '$HOME', 1)} && exec python3 -m trainer supervise status"
        try:
            alive = bool(json.loads(self.remote.run(command, timeout=30).text)["alive"])
        except (CommandFailed, ValueError, KeyError):
            return False
        if alive:
            self._fresh_at = self._clock.monotonic()
        return alive

    def _see(self, view: TrainerView, started: float) -> None:
        """Publish a view, unless the supervisor was told something after it was asked for."""
        with self._lock:
            if started < self._fresh_at and view.state in {"absent", "dead"}:
                return
            old, self.seen.trainer = self.seen.trainer, view
        if old is None or (old.state, old.token) != (view.state, view.token):
            self._wake()

    # ------------------------------------------------------------ mirrors

    def _mirror(self, name: str, mirror: Mirror) -> None:
        """Follow one file for ever, from where its mirror ends."""
        path = f"{self.directory}/{name}"
        while not self._stop.is_set():
            try:
                for data in follow(self.remote, path, mirror.offset, stop=self._stop):
                    while data and not mirror.append(data) and not self._stop.is_set():
                        self._clock.wait(self._stop, 5.0)
            except (RemoteError, OSError):  # OSError: this disk is full
                self._clock.wait(self._stop, 2.0)
