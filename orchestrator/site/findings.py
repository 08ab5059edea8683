"""What a run's trainer found out about its configuration (compiled code, a microbatch size that fits) goes along to the next fresh node.

On a node it lies in ~/llmctl/found/KEY, where the trainer looks; here in LLMCTL_HOME/cache/found/KEY. The trainer's own names of the
files in it tell GPU, torch and triton, so that nothing is used where it does not hold. Losing it costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

from orchestrator.clock import Clock
from orchestrator.remote import transfer
from orchestrator.remote.connection import CommandFailed, RemoteError
from orchestrator.remote.node import Remote
from runs.lock import Lock
from runs.record import RunRecord
from trainer.config import HARMLESS

AGAIN_SECONDS = 30.0


def key(run: RunRecord) -> str:
    """Of model, training settings and machine."""
    assert run.attempt is not None
    train = {name: value for name, value in run.spec["train"].items() if name not in HARMLESS}
    offer = run.attempt.offer
    facts = [run.spec["model"], train, offer.provider, offer.instance_type, run.attempt.world_size]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def place(run: RunRecord) -> str:
    """The folder on a node."""
    return f"~/llmctl/found/{key(run)}"


def folder(home: Path, run: RunRecord) -> Path:
    """The folder here."""
    return home / "cache" / "found" / key(run)


class Keeper:
    """Fetches once, in the background, what the trainer of a run has found out."""

    def __init__(self, home: Path, clock: Clock) -> None:
        self._home, self._clock = home, clock
        self._tried: float | None = None
        self._thread: threading.Thread | None = None
        self._done = False

    def background(self, remote: Remote, run: RunRecord) -> None:
        """Begin to fetch, where steps were made and it is not here yet."""
        now = self._clock.monotonic()
        waiting = self._tried is not None and now - self._tried < AGAIN_SECONDS
        running = self._thread is not None and self._thread.is_alive()
        assert run.attempt is not None
        if self._done or waiting or running or run.summary.get("step", 0) <= run.attempt.from_step:
            return
        self._tried = now

        def work() -> None:
            to = folder(self._home, run)
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                with Lock(to.with_suffix(".lock")).hold():  # another run may fetch the same from its node
                    transfer.pull_tree(remote, place(run), to)
            except CommandFailed:
                pass  # there is nothing: a trainer of the user's own
            except (RemoteError, transfer.TransferError, OSError):
                return
            self._done = True

        self._thread = threading.Thread(target=work, name="findings", daemon=True)
        self._thread.start()
