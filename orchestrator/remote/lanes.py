"""Pieces of files over several channels at once: ssh processes on one ControlMaster, or channels of the Fabric connection.

One SSH channel carries at most its window (2 MiB in OpenSSH) per round trip: at 70 ms that is 30 MB/s. Several channels
carry as much each.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import IO, Protocol

from orchestrator.remote import pieces
from orchestrator.remote.connection import Address, CommandFailed, Result, lost
from orchestrator.remote.node import Remote
from orchestrator.remote.openssh import Carrier
from orchestrator.remote.questions import node_side
from orchestrator.remote.session import Session

PIECE = 16 << 20
STALLED_SECONDS = 60.0
WINDOW = 32 << 20

Piece = tuple[str, str, int, int]
"""(path here, path on the node, offset, length)."""
Tell = Callable[[int], None]


def cut(here: str, there: str, size: int, done: Sequence[Sequence[int]]) -> list[Piece]:
    """What of a file is still to be moved, in pieces of PIECE bytes."""
    have = {(offset, length) for offset, length in done}
    every = [(offset, min(PIECE, size - offset)) for offset in range(0, size, PIECE)]
    return [(here, there, *piece) for piece in every if piece not in have]


class Channel(Protocol):
    """A running node-side operation."""

    def write(self, data: bytes) -> object:
        """Send all of `data`."""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end."""

    def finish(self) -> None:
        """End the input and wait for success. Raises CommandFailed, ConnectionLost."""

    def close(self) -> None:
        """Let go, whatever the state."""


class SshChannel:
    """Over an ssh process on the ControlMaster."""

    def __init__(self, carrier: Carrier, operation: str) -> None:
        self._carrier, self._operation = carrier, operation
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self._process = subprocess.Popen(
            carrier.argv(node_side(operation)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        pieces.widen(self._stdin.fileno(), self._stdout.fileno())

    def write(self, data: bytes) -> None:
        """Send all of `data`."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._stdin.write(view) :]
        except BrokenPipeError:
            self.finish()
            raise

    def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end."""
        return self._stdout.read(size)

    def finish(self) -> None:
        """End the input and wait for success."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        status = self._process.wait()
        self._said.seek(0)
        said = self._said.read()
        self._carrier.check(status, said.decode(errors="replace"))
        if status != 0:
            raise CommandFailed(f"pieces {self._operation}", Result(b"", said, status))

    def close(self) -> None:
        """End the ssh process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._stdin, self._stdout, self._said):
            with suppress(OSError):
                stream.close()


class FabricChannel:
    """Over the Fabric connection, where there is no OpenSSH client."""

    def __init__(self, remote: Remote, operation: str) -> None:
        self._operation = operation
        self._context: AbstractContextManager[Session] = remote.session(node_side(operation), window=WINDOW)
        self._session = self._context.__enter__()
        self._said = b""
        self._ended = False

    def write(self, data: bytes) -> None:
        """Send all of `data`."""
        view, waited = memoryview(data), 0.0
        while view:
            try:
                taken = self._session.send(view)
            except BrokenPipeError:
                self.finish()
                raise
            view, waited = view[taken:], 0.0 if taken else waited + 0.002
            if not taken:
                self._listen(0.002)
            if waited > STALLED_SECONDS:
                self._session.link.close()
                raise lost(self._session.link.address, f"it took nothing for {STALLED_SECONDS:g} s")

    def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end."""
        while not self._ended:
            data = self._listen(STALLED_SECONDS, size)
            if data:
                return data
            if data is None:
                self._session.link.close()
                raise lost(self._session.link.address, f"it sent nothing for {STALLED_SECONDS:g} s")
        return b""

    def finish(self) -> None:
        """End the input and wait for success."""
        self._session.finish_input()
        while not self._ended:
            self._listen(1.0)
        status = self._session.exit_code(STALLED_SECONDS)
        if status is None:
            raise lost(self._session.link.address, "it did not tell how the transfer ended")
        if status != 0:
            raise CommandFailed(f"pieces {self._operation}", Result(b"", self._said, status))

    def close(self) -> None:
        """Close the channel: the node's side reads the end of its input, or cannot write, and ends."""
        self._context.__exit__(None, None, None)

    def _listen(self, timeout: float, size: int = 1 << 20) -> bytes | None:
        """What arrived; b"" for something else than output, None for nothing at all."""
        piece = self._session.receive(timeout, size)
        if piece is None:
            self._ended = True
            return b""
        self._said = (self._said + piece[1])[-4000:]
        return piece[0] if any(piece) else None


def move(
    address: Address,
    open_channel: Callable[[str], Channel],
    work: Sequence[Piece],
    *,
    pull: bool,
    lanes: int,
    tell: Tell,
) -> None:
    """Move the pieces over `lanes` channels. The first error ends all of them and is raised."""
    shares = [share for share in (work[lane::lanes] for lane in range(lanes)) if share]
    stop = threading.Event()

    def checked(count: int) -> None:
        if stop.is_set():
            raise InterruptedError
        tell(count)

    def lane(share: Sequence[Piece]) -> None:
        channel = open_channel("send" if pull else "receive")
        try:
            wanted = {"pieces": [(there, offset, length) for _, there, offset, length in share]}
            channel.write(json.dumps(wanted).encode() + b"\n")
            for here, _, offset, length in share:
                if pull:
                    pieces.write_piece(here, offset, length, channel.read, checked)
                else:
                    pieces.read_piece(here, offset, length, channel.write, checked)
            channel.finish()
        except EOFError:
            stop.set()
            channel.finish()  # raises what the node says about it, if it is the node's fault
            if pull:  # the node sent all and said so, and ssh died before it had passed it on
                raise lost(address, "the end of a piece did not arrive") from None
            raise
        except BaseException:
            stop.set()
            raise
        finally:
            channel.close()

    with ThreadPoolExecutor(max_workers=max(1, len(shares)), thread_name_prefix="lane") as pool:
        futures = [pool.submit(lane, share) for share in shares]
        errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, InterruptedError)):
        raise error
