"""The wandb run that a node writes (`wandb.from: node`): its start beside the trainer, its key, and its files home.

The process is trainer/report.py. Whatever becomes of it, the run goes on: here a failure is words for the record. It may be started
any number of times, so each driver starts it, and once more at the end where it has not said that it is done.
"""

from __future__ import annotations

import netrc
import os
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock
from orchestrator.remote import transfer
from orchestrator.remote.connection import (
    CommandFailed,
    CommandTimeout,
    NodeUnreachable,
    RemoteError,
)
from orchestrator.remote.node import Remote
from orchestrator.site import beside
from orchestrator.site.start import directory
from orchestrator.site.watch import Watch
from runs.record import RunRecord

SETTLE_SECONDS = 45.0
"""How long the bill runs on for the last lines to reach wandb, which are in files that come home as well."""
RETRY_SECONDS = 15.0
"""Between two tries to start it over a link that fails."""


def wanted(run: RunRecord) -> bool:
    """Whether a node writes the run's wandb run."""
    section = run.spec["wandb"]
    return bool(section["mode"] != "disabled" and section["from"] == "node")


def config(run: RunRecord) -> dict[str, Any]:
    """What wandb is told of a run: its spec, without the address in `notify`, which may hold a token; and its hardware."""
    attempt = run.attempts[-1]
    hardware = {"world_size": attempt.world_size, **attempt.offer.model_dump(mode="json")}
    spec = {key: value for key, value in run.spec.items() if key != "notify"}
    return {**spec, "hardware_used": hardware}


def credentials() -> dict[str, str]:
    """wandb's settings of the caller's environment; the key from ~/.netrc where it is not there."""
    names = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY")
    found = {name: value for name in names if (value := os.environ.get(name))}
    if "WANDB_API_KEY" not in found:
        host = urllib.parse.urlsplit(found.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        try:
            known = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            known = None
        if known is not None and known[2]:
            found["WANDB_API_KEY"] = known[2]
    return found


def start(remote: Remote, run: RunRecord, *, over: bool = False) -> None:
    """Start the reporter of the attempt; harmless where it runs. `over`: it need not wait for a supervisor's end. The key is in
    that process's environment alone, and only where it is needed. Raises RemoteError."""
    attempt, section = run.attempt, run.spec["wandb"]
    assert attempt is not None
    environment = attempt.lanes[f"{attempt.keys[0]}/environment"].detail
    plan = {
        "token": attempt.token,
        "over": over,
        "mode": section["mode"],
        "project": section["project"],
        "run": run.run,
        "config": config(run),
    }
    secrets = credentials() if section["mode"] == "online" else {}
    env = {**environment.get("env", {}), **secrets}
    beside.start(remote, run, "report", plan, python=environment["python"], env=env)


def _ended(status: dict[str, Any]) -> bool:
    return status.get("state") in {"done", "failed"}


def _status(remote: Remote, run: RunRecord) -> dict[str, Any]:
    """What the reporter of this attempt said last; {} before that. Raises RemoteError."""
    assert run.attempt is not None
    status = beside.said(remote, run, "report")
    return status if status.get("token") == run.attempt.token else {}


class Reporting:
    """Sees to the reporter of one run: its start in the background, once a driver and once more with each start of the trainer; and
    its end. `tell` is told what is wrong with it."""

    def __init__(self, clock: Clock, tell: Callable[[str], None]) -> None:
        self._clock, self._tell = clock, tell
        self._started: tuple[str, int] | None = None
        """The start of the trainer (its token, its number) that has a reporter, or cannot have one."""
        self._again_at = 0.0
        self._thread: threading.Thread | None = None

    def look(self, run: RunRecord, watch: Watch | None) -> None:
        """Begin to start it where it is due; returns at once."""
        attempt, now = run.attempt, self._clock.monotonic()
        if watch is None or attempt is None or attempt.token is None or attempt.trainer_end is not None:
            return
        due, remote = (attempt.token, attempt.starts), watch.remote
        if not wanted(run) or self._started == due or now < self._again_at:
            return
        if self._thread is not None and self._thread.is_alive():
            return

        def work() -> None:
            try:
                start(remote, run)
            except NodeUnreachable:  # others tell of that
                self._again_at = self._clock.monotonic() + RETRY_SECONDS
                return
            except (RemoteError, OSError) as error:
                self._tell(f"nothing logs to wandb on the node: {error}")
            self._started = due

        self._thread = threading.Thread(target=work, name="wandb on the node", daemon=True)
        self._thread.start()

    def bring(self, remote: Remote, run: RunRecord, to: Path) -> None:
        """See that the reporter comes to its end after the trainer's, and bring what it wrote to the folder `to`. Raises RemoteError
        where the link is at fault."""
        if not wanted(run):
            return
        status: dict[str, Any] = {}
        try:
            status = self._settled(remote, run)
            transfer.pull_tree(remote, f"{directory(run.run)}/report/wandb", to)
        except (CommandFailed, CommandTimeout, transfer.TransferError, OSError) as error:
            why = status.get("detail") or error
            self._tell(f"the node's wandb files could not be fetched: {why}")
            return
        if status.get("state") != "done":
            why = status.get("detail") or "the node did not send everything in time"
            self._tell(f"{why}; what it logged is here: wandb sync {to}/*run-*")

    def _settled(self, remote: Remote, run: RunRecord) -> dict[str, Any]:
        """The reporter's last word, waited for. It is started where it has not spoken that yet: it may never have lived, or be gone.
        Raises RemoteError."""
        status = _status(remote, run)
        if _ended(status):
            return status
        start(remote, run, over=True)
        began, never = self._clock.monotonic(), threading.Event()
        while not _ended(status) and self._clock.monotonic() - began < SETTLE_SECONDS:
            self._clock.wait(never, 0.5)
            status = _status(remote, run)
        return status
