"""Commands and small files on a node. The errors are those of `connection`.

Paths on a node are absolute or relative to the home directory; `~/` in front is understood.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from orchestrator.remote.connection import (
    Address,
    CommandFailed,
    CommandTimeout,
    ConnectionLost,
    HostKeyMismatch,
    Link,
    LoginRefused,
    NodeUnreachable,
    NoSuchFile,
    RemoteError,
    Result,
    lost,
)
from orchestrator.remote.session import BLOCK, Session, kill_command

__all__ = [
    "Address",
    "CommandFailed",
    "CommandTimeout",
    "ConnectionLost",
    "HostKeyMismatch",
    "LoginRefused",
    "NoSuchFile",
    "NodeUnreachable",
    "Remote",
    "RemoteError",
    "Result",
    "node_path",
]

LIMIT = 8 << 20
"""Bytes of output that `run` keeps."""
_SESSIONS = 7
"""At once, of the 10 that sshd allows by default: the ControlMaster of `transfer` has a connection of its own."""
_MISSING = 44
_READ = '[ -f "$1" ] || { echo "no such file" >&2; exit 44; }; tail -c "+$2" -- "$1" | head -c "$3"'
_WRITE = """
umask 077
mkdir -p -- "$(dirname -- "$1")" || exit
t="$1.$$.tmp"
trap 'rm -f -- "$t"' EXIT
cat >"$t" && [ "$(wc -c <"$t")" -eq "$2" ] && chmod "$3" "$t" && { sync "$t" 2>/dev/null || :; } && mv -f -- "$t" "$1"
"""
_DETACH = """
cd -- "$1" || exit
log=$2
shift 2
command -v -- "$1" >/dev/null || { echo "$1: not found" >&2; exit 127; }
: >>"$log" || exit
if setsid -f true 2>/dev/null; then exec setsid -f "$@" >>"$log" 2>&1 </dev/null; fi
exec python3 -c 'import os, sys
if os.fork() == 0:
    os.setsid()
    os.execvp(sys.argv[1], sys.argv[1:])' "$@" >>"$log" 2>&1 </dev/null
"""


def node_path(path: str) -> str:
    """`path` as a command on the node takes it. Raises ValueError for an empty one or one with a NUL."""
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is no path")
    if path in {"~", "~/"}:
        return "."
    path = path.removeprefix("~/")
    return f"./{path}" if path.startswith("-") else path


class Remote:
    """One node over one SSH connection, opened at the first use and again after it was lost.

    Safe for several threads: each call has a channel of its own, `_SESSIONS` at once. No call that may have reached the node
    is repeated by itself: after ConnectionLost only the caller knows what may be done twice.
    """

    def __init__(self, address: Address, *, connect_timeout: float = 15) -> None:
        self.address = address
        self.connections = 0
        """How many connections were opened so far."""
        self.memory: dict[str, object] = {}
        """What callers remember about this node as long as this object lives."""
        self._connect_timeout = connect_timeout
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(_SESSIONS)
        self._link: Link | None = None

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self,
        command: Sequence[str] | str,
        *,
        stdin: bytes = b"",
        timeout: float = 30,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        limit: int = LIMIT,
    ) -> Result:
        """Run a command (a sequence: exactly these arguments; a string: a script for sh) and return what it left.

        `env` reaches the command without being seen in any process list. After `timeout` seconds its process group is
        ended. Raises CommandFailed unless `check` is off, CommandTimeout, ConnectionLost, NodeUnreachable, SessionRefused.
        """
        deadline = time.monotonic() + timeout
        out, err = bytearray(), bytearray()
        dropped = 0
        with self.session(command, env=env) as session:
            pending = memoryview(stdin)
            feeding = True
            while True:
                if feeding:
                    pending, feeding = _feed(session, pending)
                piece = session.receive(0.002 if feeding else min(1.0, max(0.0, deadline - time.monotonic())))
                if piece is not None:
                    dropped += _keep(out, piece[0], limit) + _keep(err, piece[1], limit)
                    # A background job may hold the pipes open: what has ended and says nothing for a second is done.
                    piece = None if not any(piece) and not feeding and session.exited else piece
                status = session.exit_code(max(0.0, deadline - time.monotonic())) if piece is None else None
                if status is not None:
                    break
                if time.monotonic() >= deadline:
                    self._kill(session)
                    raise CommandTimeout(
                        _shown(command), timeout, Result(bytes(out), bytes(err), -1, dropped > 0)
                    )
        result = Result(bytes(out), bytes(err), status, dropped > 0)
        if check and status != 0:
            raise CommandFailed(_shown(command), result)
        return result

    def detach(
        self, argv: Sequence[str], *, cwd: str, log: str, env: Mapping[str, str] | None = None
    ) -> None:
        """Start a job that outlives every connection, in a session of its own, its output appended to `log` (relative to
        `cwd`). Raises CommandFailed if the folder, the log or the program is not there."""
        result = self.run(
            ["sh", "-c", _DETACH, "sh", node_path(cwd), node_path(log), *argv], env=env, check=False
        )
        if result.exit_code != 0:
            raise CommandFailed(_shown(argv), result)

    def read(self, path: str, offset: int = 0, limit: int = LIMIT) -> bytes:
        """At most `limit` bytes of a file from `offset` on; b"" at its end. Raises NoSuchFile."""
        argv = ["sh", "-c", _READ, "sh", node_path(path), str(offset + 1), str(limit)]
        result = self.run(argv, check=False, limit=limit, timeout=max(30, limit / 1e5))
        if result.exit_code != 0:
            raise (NoSuchFile if result.exit_code == _MISSING else CommandFailed)(f"read {path}", result)
        return result.stdout

    def write(self, path: str, data: bytes, mode: int = 0o600) -> None:
        """Put a file there whole or not at all, with its folders; what stood there is replaced."""
        argv = ["sh", "-c", _WRITE, "sh", node_path(path), str(len(data)), f"{mode:o}"]
        result = self.run(argv, stdin=data, check=False, timeout=max(30, len(data) / 1e5))
        if result.exit_code != 0:
            raise CommandFailed(f"write {path}", result)

    @contextmanager
    def session(
        self, command: Sequence[str] | str, *, env: Mapping[str, str] | None = None, window: int | None = None
    ) -> Iterator[Session]:
        """A running command for streaming; leaving lets go of it. `window`: bytes that may be under way to us, 2 MiB
        unless given; a wide one is what makes a long line fast."""
        with self._free, self._begin(command, env, window) as session:
            yield session

    def round_trip(self) -> float:
        """Seconds for one exchange on the warm connection. Raises ConnectionLost, NodeUnreachable."""
        return self._connected().round_trip()

    def close(self) -> None:
        """Close the connection; the next call would open one again."""
        with self._lock:
            if self._link is not None:
                self._link.close()
            self._link = None

    def _begin(
        self, command: Sequence[str] | str, env: Mapping[str, str] | None, window: int | None
    ) -> Session:
        """A session. A link that turns out to be dead before the command was sent is opened again, once: so ends the
        sleep of this machine, or a cut that nothing was under way to notice."""
        before = self.connections
        try:
            return Session(self._connected(), command, env=env, window=window)
        except ConnectionLost as error:
            if error.sent or self.connections != before:
                raise
            return Session(self._connected(), command, env=env, window=window)

    def _connected(self) -> Link:
        with self._lock:
            if self._link is not None and not self._link.alive:
                self._link.close()
                self._link = None
            if self._link is None:
                self._link = Link(self.address, self._connect_timeout)
                self.connections += 1
            return self._link

    def _kill(self, session: Session) -> None:
        """End the command of a session and all of its process group. Raises ConnectionLost if the node does not answer."""
        session.close()
        if not session.pid:
            return
        killer = Session(session.link, kill_command(session.pid), timeout=10)
        with killer:
            killer.send(b"")
            deadline = time.monotonic() + 10
            while killer.receive(1.0) is not None:
                if time.monotonic() > deadline:
                    session.link.close()
                    raise lost(self.address, "it does not answer")


def _feed(session: Session, pending: memoryview) -> tuple[memoryview, bool]:
    """Send what the node takes; (the rest, whether there is more to send)."""
    try:
        pending = pending[session.send(pending[:BLOCK]) :]
    except BrokenPipeError:
        return pending[:0], False
    if pending or session.unsent:
        return pending, True
    session.finish_input()
    return pending, False


def _keep(kept: bytearray, data: bytes, limit: int) -> int:
    """Append what there is room for; returns how many bytes were dropped."""
    room = max(0, limit - len(kept))
    kept += data[:room]
    return max(0, len(data) - room)


def _shown(command: Sequence[str] | str) -> str:
    """A command for a message: its first line."""
    text = command if isinstance(command, str) else " ".join(command)
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first if len(first) <= 100 else f"{first[:97]}…"
