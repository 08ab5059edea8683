"""One command that runs on a node: its streams, its end, and how to make it end.

Every command is started as `exec sh -c 'echo $$ >&2; …; exec "$@"' sh ARGUMENTS`, so that its first line on stderr is its
process id, which under sshd is its process group too. The environment arrives over stdin, one quoted line each, before
the input of the command: values never stand in an argument that the node's process list shows.
"""

from __future__ import annotations

import re
import select
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from orchestrator.remote.connection import ConnectionLost, Link, lost

if TYPE_CHECKING:
    import paramiko

BLOCK = 1 << 20
SIGNALLED = 128
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KILL = (
    'kill -s TERM -- "-$1" 2>/dev/null || kill -s TERM "$1" 2>/dev/null; i=0; '
    'while kill -s 0 -- "-$1" 2>/dev/null; do i=$((i+1)); [ $i -gt 20 ] && kill -s KILL -- "-$1" 2>/dev/null; '
    "[ $i -gt 40 ] && exit 1; sleep 0.1; done; exit 0"
)


def command_line(command: Sequence[str] | str, env: Mapping[str, str] | None = None) -> tuple[str, bytes]:
    """(the one string that SSH carries, the input that must come first). A string is a script for sh; a sequence is run
    as it is, with no shell's eyes on it. Raises ValueError for what no environment can hold."""
    argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
    lines = []
    for name, value in (env or {}).items():
        if not _NAME.fullmatch(name) or "\0" in value:
            raise ValueError(f"{name!r} cannot be an environment variable on a node")
        quoted = shlex.quote(value).replace("\n", "'\"$n\"'")
        lines.append(f"export {name}={quoted}\n")
    take = 'n="\n"; while IFS= read -r l && [ "$l" ]; do eval "$l"; done; ' if lines else ""
    start = shlex.quote(f'echo $$ >&2; {take}exec "$@"')
    return f"exec sh -c {start} sh {shlex.join(argv)}", "".join([*lines, "\n"] if lines else []).encode()


def kill_command(pid: int) -> list[str]:
    """Ends the process group `pid`: SIGTERM, after two seconds SIGKILL; fails if even then something is left."""
    return ["sh", "-c", _KILL, "sh", str(pid)]


class Session:
    """A running command. For one thread; use as a context manager, which lets go of it without ending it."""

    def __init__(
        self,
        link: Link,
        command: Sequence[str] | str,
        *,
        env: Mapping[str, str] | None = None,
        window: int | None = None,
        timeout: float = 20,
    ) -> None:
        import paramiko

        line, self._first = command_line(command, env)
        self.link = link
        self.pid: int | None = None
        """Process id on the node, once it is known."""
        self._head = b""
        self._channel: paramiko.Channel = link.channel(window, timeout)
        try:
            self._channel.settimeout(timeout)
            self._channel.exec_command(line)
            self._channel.settimeout(0.0)
        except (paramiko.SSHException, EOFError, OSError) as error:
            self.close()
            if link.transport.is_active() and isinstance(error, TimeoutError):
                link.close()
            raise lost(link.address, str(error) or type(error).__name__) from error
        self._poll = select.poll()
        self._poll.register(self._channel.fileno(), select.POLLIN)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes | memoryview) -> int:
        """Offer input; returns how much was taken, 0 while the node's window is full. Raises ConnectionLost, or
        BrokenPipeError when the command takes no input any more."""
        view = memoryview(data)
        if self._first:
            taken = self._send(memoryview(self._first))
            self._first = self._first[taken:]
            if self._first:
                return 0
        return self._send(view) if view else 0

    def _send(self, view: memoryview) -> int:
        try:
            return int(self._channel.send(view))
        except TimeoutError:
            self._check()
            return 0
        except EOFError as error:
            raise self._broken(error) from error
        except OSError as error:
            if not self.link.transport.is_active():
                raise self._broken(error) from error
            raise BrokenPipeError from error

    @property
    def unsent(self) -> bool:
        """Whether the environment is still on its way: nothing of the command's own input was sent yet."""
        return bool(self._first)

    def finish_input(self) -> None:
        """The end of the command's input."""
        with suppress(OSError, EOFError):
            self._channel.shutdown_write()

    def receive(self, timeout: float, limit: int = BLOCK) -> tuple[bytes, bytes] | None:
        """The next piece of (stdout, stderr): at most `limit` bytes of each, both empty after `timeout` seconds without
        any, None at the end of both. Raises ConnectionLost."""
        deadline = time.monotonic() + timeout
        while True:
            output, error = self._take(limit, stderr=False), self._take(limit, stderr=True)
            error = self._without_pid(error) if error else error
            if output or error:
                return output or b"", error or b""
            if output is None and error is None:
                return None
            left = deadline - time.monotonic()
            if left <= 0:
                return b"", b""
            self._check()
            if output is None or error is None:  # one stream has ended: its pipe stays readable for ever
                time.sleep(min(left, 0.005))
            else:
                self._poll.poll(min(left, 1.0) * 1000)

    @property
    def exited(self) -> bool:
        """Whether the exit status has arrived."""
        return bool(self._channel.status_event.is_set())

    def exit_code(self, timeout: float) -> int | None:
        """The exit status, SIGNALLED where a signal ended the command, None while it is not known. Raises ConnectionLost,
        SessionRefused."""
        if not self._channel.status_event.wait(timeout):
            self._check()
            return None
        status = int(self._channel.exit_status)
        if status >= 0:
            return status
        # No status: the link broke, or a signal ended the command, which paramiko does not pass on.
        self.link.open_channel(None, 10).close()
        return SIGNALLED

    def close(self) -> None:
        """Let go of the channel."""
        with suppress(OSError, EOFError):
            self._channel.close()

    def _take(self, limit: int, *, stderr: bool) -> bytes | None:
        """What has arrived on one stream; b"" for nothing yet, None at its end."""
        try:
            data: bytes = self._channel.recv_stderr(limit) if stderr else self._channel.recv(limit)
        except TimeoutError:
            return b""
        except (EOFError, OSError) as error:  # reading also tells the node that there is room again
            raise self._broken(error) from error
        return data or None

    def _without_pid(self, data: bytes) -> bytes:
        """Take the first line out of stderr."""
        if self.pid is not None:
            return data
        self._head += data
        line, found, rest = self._head.partition(b"\n")
        if not found:
            return b""
        self.pid = int(line) if line.strip().isdigit() else 0
        return rest if self.pid else self._head

    def _broken(self, error: Exception) -> ConnectionLost:
        self.link.close()
        return lost(self.link.address, str(error) or "the connection was cut")

    def _check(self) -> None:
        if not self.link.alive:
            self.link.close()
            raise lost(self.link.address, "it is silent")
