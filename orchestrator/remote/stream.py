"""Following a file that grows on a node.

On the node a few lines of Python send the file from a byte on in frames: four bytes of length, then so many bytes; a frame of
length 0 each second says that the node lives. So a dead link is noticed, and the program on the node notices too: its
next frame fails and it ends.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

from orchestrator.remote.connection import CommandFailed, ConnectionLost, NodeUnreachable, Result, lost
from orchestrator.remote.node import Remote, node_path
from orchestrator.remote.session import Session

SILENT_SECONDS = 20.0
"""Without any frame for so long the link is dead."""
WINDOW = 8 << 20
"""Bytes on their way to us at most, on a slow reader's side too: this bounds the memory."""
_FOLLOW = """
import sys, time
path, offset = sys.argv[1], int(sys.argv[2])
file, out, last = None, sys.stdout.buffer, 0.0
while True:
    if file is None:
        try:
            file = open(path, "rb", buffering=0)
            file.seek(offset)
        except FileNotFoundError:
            pass
    data = file.read(1 << 18) if file else b""
    now = time.monotonic()
    if data or now - last >= 1.0:
        out.write(len(data).to_bytes(4, "big") + data)
        out.flush()
        last = now
    if not data:
        time.sleep(0.03)
"""


def follow(
    remote: Remote,
    path: str,
    offset: int = 0,
    *,
    stop: threading.Event | None = None,
    patience_seconds: float = 600,
) -> Iterator[bytes]:
    """The bytes of the node's file from `offset` on, each once and in order, as they are written; b"" once a second while
    there are none. A file that is not there yet is waited for.

    Ends when `stop` is set. After a lost link it goes on at the byte where it stopped; raises ConnectionLost or
    NodeUnreachable when that does not work for `patience_seconds`, CommandFailed where the node has no python3.
    """
    stop = stop or threading.Event()
    heard, pause = time.monotonic(), 0.25
    while not stop.is_set():
        try:
            for data in _frames(remote, path, offset, stop):
                offset += len(data)
                heard, pause = time.monotonic(), 0.25
                yield data
        except NodeUnreachable:
            if time.monotonic() - heard > patience_seconds:
                raise
            stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  # spreads reconnections, keeps no secret
            pause = min(10.0, pause * 2)


def _frames(remote: Remote, path: str, offset: int, stop: threading.Event) -> Iterator[bytes]:
    """One connection's worth of `follow`."""
    argv = ["python3", "-I", "-c", _FOLLOW, node_path(path), str(offset)]
    with remote.session(argv, window=WINDOW) as session:
        session.send(b"")
        head, left, complaints = bytearray(), 0, b""
        while not stop.is_set():
            piece = _receive(session, stop)
            if piece is None:
                raise _ended(session, path, complaints)
            data, said = memoryview(piece[0]), piece[1]
            complaints = (complaints + said)[-2000:]
            while data:
                if left:
                    yield bytes(data[:left])
                    left, data = left - min(left, len(data)), data[left:]
                    continue
                missing = 4 - len(head)
                head += data[:missing]
                data = data[missing:]
                if len(head) == 4:
                    left = int.from_bytes(head, "big")
                    head.clear()
                    if not left:
                        yield b""


def _receive(session: Session, stop: threading.Event) -> tuple[bytes, bytes] | None:
    """The next piece; both empty only when `stop` was set. Raises ConnectionLost after SILENT_SECONDS without any."""
    deadline = time.monotonic() + SILENT_SECONDS
    while not stop.is_set():
        piece = session.receive(0.5)
        if piece is None or any(piece):
            return piece
        if time.monotonic() > deadline:
            session.link.close()
            raise lost(session.link.address, f"no sign of life for {SILENT_SECONDS:g} s")
    return b"", b""


def _ended(session: Session, path: str, complaints: bytes) -> ConnectionLost | CommandFailed:
    """Why the node's side of `follow`, which never ends by itself, has ended."""
    status = session.exit_code(10)
    if status is None or status == 0:
        return lost(session.link.address, "the node ended the session")
    return CommandFailed(f"follow {path}", Result(b"", complaints, status))
