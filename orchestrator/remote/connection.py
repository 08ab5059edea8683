"""One SSH connection to a node, opened by Fabric and hardened where Fabric as shipped is not.

    RemoteError              what happened, why, what to do now: exit_code, code, hint
    ├── NodeUnreachable      6: no connection: refused, silent, no such name, not SSH
    │   ├── LoginRefused     6: it answers and does not admit this key (a node that boots does so for a while)
    │   └── ConnectionLost   6: the link broke under a command; whether the command ran is unknown
    ├── SessionRefused       6: it takes no further session, though the connection lives
    ├── HostKeyMismatch      6: something else answers at the node's address, or nothing was pinned
    ├── CommandFailed        1: the command ran and failed: `result`
    │   └── NoSuchFile       1: the file to be read is not there
    └── CommandTimeout       1: the command took too long and was ended, with its process group: `result` so far

What Fabric 3.2 does not do and this does: pinned host keys, no keys or agent but the one named, a connect time-out that
covers the whole handshake, TCP_NODELAY, channels that say nothing after their end (transport.py), and three ways to
notice a dead link: TCP keep-alive and TCP_USER_TIMEOUT where the system has them, and an SSH request each PROBE_SECONDS
that the other side must answer.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provisioning import keys

if TYPE_CHECKING:
    import paramiko

PROBE_SECONDS = 10.0
FIRST_PROBES = 3
SILENCE_SECONDS = 35.0
"""A link that did not answer for so long is dead."""
REFUSED_SECONDS = 5.0
"""How long a node may take to notice that commands have ended, and refuse others meanwhile."""


@dataclass(frozen=True)
class Address:
    """Where a node answers, who logs in, and what proves that it is the node."""

    host: str
    port: int
    user: str
    identity_file: Path
    known_hosts: Path
    """The node's own file: whatever key it holds is the node's, at any address."""
    key: str
    """The node's name in that file and in messages."""
    accept_new: bool = False
    """Pin what the first connection shows if nothing is pinned yet."""

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


@dataclass(frozen=True)
class Result:
    """What a command left behind. Output beyond the limit of `run` was dropped: `truncated`."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    """128: ended by a signal (paramiko does not tell which)."""
    truncated: bool = False

    @property
    def text(self) -> str:
        """stdout as text, without the last line break."""
        return self.stdout.decode(errors="replace").rstrip("\n")


class RemoteError(Exception):
    """Base; see the module's tree."""

    exit_code = 6
    code = "remote"
    default_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.default_hint


class NodeUnreachable(RemoteError):
    """No connection could be had."""

    code = "node_unreachable"
    default_hint = (
        "is the node up, and does this network reach it? `llmctl status --refresh` asks the provider"
    )


class LoginRefused(NodeUnreachable):
    """The node does not admit the key."""

    code = "login_refused"
    default_hint = "the public half of the key must be in the node's ~/.ssh/authorized_keys"


class ConnectionLost(NodeUnreachable):
    """The link broke. Nothing is repeated by itself: the caller knows what may be."""

    code = "connection_lost"
    sent = True
    """False: the link broke before anything of a command was sent, so that another try does nothing twice."""
    default_hint = "the job on the node goes on; the next command connects again"


class SessionRefused(RemoteError):
    """The node takes no further session on a connection that lives."""

    default_hint = "its sshd allows too few (MaxSessions); llmctl needs 10"


class HostKeyMismatch(RemoteError):
    """The host key is not the pinned one."""

    code = "host_key_mismatch"
    default_hint = (
        "do not go on: this may be another machine. If it was reinstalled, remove the pinned file named above"
    )


class CommandFailed(RemoteError):
    """A command ended with another status than 0."""

    exit_code = 1
    code = "command_failed"

    def __init__(self, command: str, result: Result) -> None:
        said = (result.stderr or result.stdout).decode(errors="replace").strip()[-500:]
        super().__init__(f"`{command}` ended with {result.exit_code}" + (f": {said}" if said else ""))
        self.result = result


class NoSuchFile(CommandFailed):
    """A file on the node is missing."""

    code = "no_such_file"


class CommandTimeout(RemoteError):
    """A command was ended because it took too long."""

    exit_code = 1
    code = "command_timeout"

    def __init__(self, command: str, seconds: float, result: Result) -> None:
        super().__init__(f"`{command}` did not end within {seconds:g} s; its processes were ended")
        self.result = result


class Link:
    """An open connection and the thread that listens whether it lives."""

    def __init__(self, address: Address, timeout: float) -> None:
        self.address = address
        self._connection = _open(address, timeout)
        self.transport: paramiko.Transport = self._connection.transport
        self._heard, self._heard_at = time.monotonic(), time.time()
        self._closed = threading.Event()
        self._ahead: paramiko.Channel | None = None
        self._opening = threading.Lock()
        self._measured = threading.Event()
        self._round_trip: float | None = None
        threading.Thread(target=self._listen, name=f"link {address.key}", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the link was heard of lately."""
        return bool(self.transport.is_active()) and time.monotonic() - self._heard < SILENCE_SECONDS

    def channel(self, window: int | None, timeout: float) -> paramiko.Channel:
        """A channel for one command. `window`: bytes that may be on their way to us. Of the usual window there is one that was
        opened ahead, so that a command costs one exchange and not two; while that command runs, the next one is opened.

        A link that was not heard of lately (this machine slept) is asked first, for what is lost with it must not be a
        command that may have run.
        """
        ahead = None
        if (
            window is None
            and time.time() - self._heard_at < 1.5 * PROBE_SECONDS
            and self._opening.acquire(blocking=False)
        ):
            ahead, self._ahead = self._ahead, None
            threading.Thread(target=self._open_ahead, name=f"channel {self.address.key}", daemon=True).start()
        return self.open_channel(window, timeout) if ahead is None or ahead.closed else ahead

    def _open_ahead(self) -> None:
        import paramiko

        try:
            with suppress(paramiko.SSHException, EOFError, OSError):
                self._ahead = self.transport.open_session(timeout=SILENCE_SECONDS)
        finally:
            self._opening.release()

    def open_channel(self, window: int | None, timeout: float) -> paramiko.Channel:
        """A channel that is opened now, which proves that the link lives. A node counts a command until it has noticed its end: one
        that refuses another is asked again for some seconds. Raises SessionRefused, ConnectionLost."""
        try:
            return self._open_once(window, timeout)
        except SessionRefused:
            from provisioning.retries import stamina

            again = stamina.retry(on=SessionRefused, attempts=None, timeout=REFUSED_SECONDS, wait_initial=0.02, wait_max=0.5,
                                  wait_jitter=0.02)  # fmt: skip
            return again(self._open_once)(window, timeout)

    def _open_once(self, window: int | None, timeout: float) -> paramiko.Channel:
        import paramiko

        began = time.time()  # as paramiko's time-out: it goes on while this machine sleeps
        try:
            return self.transport.open_session(window_size=window, timeout=timeout)
        except (paramiko.SSHException, EOFError, OSError) as error:
            # Of two refusals at once paramiko calls one a ChannelException; the other is an SSHException as any other.
            if self.transport.is_active() and time.time() - began < timeout:
                raise SessionRefused(f"{self.address.key} refuses another session: {error}") from error
            self.close()
            broken = lost(self.address, str(error) or type(error).__name__)
            broken.sent = False
            raise broken from error

    def round_trip(self) -> float:
        """Seconds for one exchange that starts nothing on the node (a shell takes a tenth of a second): the best so far."""
        self._measured.wait(SILENCE_SECONDS)
        if self._round_trip is None:
            self.close()
            raise lost(self.address, "it does not answer")
        return self._round_trip

    def close(self) -> None:
        """Close the socket under everything that uses it."""
        self._closed.set()
        with suppress(OSError, EOFError):
            self.transport.close()
        self._connection.close()

    def _listen(self) -> None:
        import paramiko

        for asked in itertools.count():  # at first several in a row, for the round trip
            if asked == FIRST_PROBES:
                self._measured.set()
            if self._closed.wait(PROBE_SECONDS if asked >= FIRST_PROBES else 0):
                break
            started = time.monotonic()
            with suppress(paramiko.SSHException, EOFError, OSError):
                self.transport.global_request("keepalive@openssh.com", wait=True)
            if not self.transport.is_active():
                break
            self._heard, self._heard_at = time.monotonic(), time.time()
            self._round_trip = min(self._round_trip or SILENCE_SECONDS, self._heard - started)
        self._measured.set()


def lost(address: Address, why: str) -> ConnectionLost:
    """The error for a link that broke."""
    return ConnectionLost(f"the connection to {address.key} ({address}) was lost: {why}")


def _open(address: Address, timeout: float) -> Any:
    """A connected fabric.Connection. Raises NodeUnreachable, LoginRefused, HostKeyMismatch, keys.KeyFileError."""
    import paramiko
    from fabric import Config, Connection

    from orchestrator.remote.transport import Transport

    keys.public_key(address.identity_file)
    allowed = keys.pinned(address.known_hosts)
    peer = _socket(address, timeout)
    connection = Connection(
        address.host,
        user=address.user,
        port=address.port,
        config=Config(lazy=True, ssh_config=paramiko.SSHConfig()),
        forward_agent=False,
        connect_timeout=timeout,
        connect_kwargs={
            "sock": peer,
            "key_filename": [str(address.identity_file)],
            "look_for_keys": False,
            "allow_agent": False,
            "banner_timeout": timeout,
            "auth_timeout": timeout,
            "transport_factory": Transport,
        },
    )
    shown = address.host if address.port == 22 else f"[{address.host}]:{address.port}"
    for kind, base64 in allowed:
        with suppress(paramiko.hostkeys.InvalidHostKey, paramiko.SSHException):
            entry = paramiko.hostkeys.HostKeyEntry.from_line(f"{shown} {kind} {base64}")
            if entry is not None and entry.key is not None:
                connection.client.get_host_keys().add(shown, kind, entry.key)
    connection.client.set_missing_host_key_policy(_policy(address, pinned=bool(allowed)))
    opened = False
    try:
        connection.open()
        opened = True
    except paramiko.BadHostKeyException as error:
        raise _mismatch(address, error.key.get_name()) from error
    except paramiko.AuthenticationException as error:
        raise LoginRefused(f"{address} refused the login with {address.identity_file}: {error}") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise NodeUnreachable(f"{address} does not complete an SSH handshake: {error}") from error
    finally:
        if not opened:
            connection.client.close()
            peer.close()
    return connection


def _socket(address: Address, timeout: float) -> socket.socket:
    try:
        peer = socket.create_connection((address.host, address.port), timeout)
    except OSError as error:
        reason = "timed out" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise NodeUnreachable(f"{address} cannot be reached: {reason}") from error
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {
        "TCP_KEEPIDLE": 10,
        "TCP_KEEPALIVE": 10,
        "TCP_KEEPINTVL": 5,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 25_000,
    }
    for name, value in wanted.items():
        if hasattr(
            socket, name
        ):  # TCP_KEEPALIVE is macOS's word for TCP_KEEPIDLE; only Linux has TCP_USER_TIMEOUT
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _policy(address: Address, *, pinned: bool) -> Any:
    """What to do about a host key that is not among the pinned ones."""
    import paramiko

    class Pin(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]  # paramiko is not followed by mypy
        """Pins the first key where that is allowed, and refuses any other."""

        def missing_host_key(self, _client: object, _hostname: str, key: Any) -> None:
            if pinned or not address.accept_new:
                raise _mismatch(address, key.get_name(), pinned=pinned)
            keys.pin(address.known_hosts, f"{key.get_name()} {key.get_base64()}")

    return Pin()


def _mismatch(address: Address, shown: str, *, pinned: bool = True) -> HostKeyMismatch:
    why = (
        f"is not the one in {address.known_hosts}"
        if pinned
        else f"is unknown: {address.known_hosts} holds no key"
    )
    return HostKeyMismatch(f"the {shown} host key that {address} shows for {address.key} {why}")
