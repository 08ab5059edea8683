"""paramiko's transport, with AES-GCM in front, and in which a channel says nothing after its end.

paramiko builds a message under the channel's lock and sends it outside of it. In between, its own thread may answer the
node's end of the channel, and then an EOF (or input, or room for output) follows the CLOSE: RFC 4254 section 5.3 forbids
that, and both OpenSSH and asyncssh drop the whole connection for it, with every command that runs on it.
"""

from __future__ import annotations

import socket
from typing import Any

import paramiko  # noqa: TID253  this module is imported where a connection is opened
from paramiko.common import MSG_CHANNEL_CLOSE  # noqa: TID253

_GCM = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")


class Transport(paramiko.Transport):  # type: ignore[misc]  # paramiko is not followed by mypy
    """A connection to a node."""

    def __init__(self, peer: socket.socket, **options: Any) -> None:
        super().__init__(peer, **options)
        security = self.get_security_options()
        others = [name for name in security.ciphers if name not in _GCM]
        # Twice as fast as paramiko's default, which stays as the fallback.
        security.ciphers = [name for name in _GCM if name in security.ciphers] + others

    def open_session(self, *args: Any, **options: Any) -> paramiko.Channel:
        """A channel whose messages end with its CLOSE. Raises SSHException, EOFError, OSError."""
        channel = super().open_session(*args, **options)
        channel.transport = _Sender(self)
        return channel

    def _send_message(self, data: paramiko.Message) -> None:
        # paramiko sends one message of its callers at a time: nothing comes between this question and the sending.
        sender: _Sender | None = getattr(data, "sender", None)
        if sender is not None:
            if sender.closed:
                return
            sender.closed = data.asbytes()[:1] == bytes([MSG_CHANNEL_CLOSE])
        super()._send_message(data)


class _Sender:
    """The transport as one channel sees it: what it says is marked as its own."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _send_user_message(self, message: paramiko.Message) -> None:
        message.sender = self
        self._transport._send_user_message(message)  # noqa: SLF001
