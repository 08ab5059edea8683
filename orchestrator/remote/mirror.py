"""Files that grow on a node, mirrored here byte for byte: the size of the mirror is the cursor, so a crash loses nothing.

One local file serves all attempts of a run: each begins where the last one ended, after a newline if that was cut in the
middle of a line. Where an attempt's bytes begin is written before the first of them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

MIN_FREE_BYTES = 1 << 30
"""The log's mirror stops growing when less than this is free: a node that prints for ever cannot fill this disk."""


class Mirror:
    """The local copy of one growing file of one attempt."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self._base = self._begin(attempt)
        self.paused = False

    def _begin(self, attempt: int) -> int:
        """Where the attempt's bytes start in the local file."""
        known = bases(self.path)
        if attempt not in known:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                size = file.tell()
                if size:
                    file.seek(size - 1)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                        size += 1
            known[attempt] = size
            publish(_note(self.path), json.dumps(known).encode())
        return known[attempt]

    @property
    def offset(self) -> int:
        """How many bytes of the node's file are here."""
        try:
            return max(0, self.path.stat().st_size - self._base)
        except FileNotFoundError:
            return 0

    def append(self, data: bytes) -> bool:
        """Add the next bytes; False (and nothing added) while this disk is nearly full. Raises OSError where only a part, or
        nothing, could be written: then the next bytes are those from `offset` on."""
        self.paused = shutil.disk_usage(self.path.parent).free < MIN_FREE_BYTES + len(data)
        if self.paused:
            return False
        with self.path.open("ab", buffering=0) as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        return True

    def lines(self) -> list[bytes]:
        """All whole lines of the local file, of every attempt."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        return data[: data.rfind(b"\n") + 1].splitlines()


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.bases")


def bases(path: Path) -> dict[int, int]:
    """attempt → where its bytes begin in the mirror at `path`."""
    note = _note(path)
    found: dict[str, int] = json.loads(note.read_text()) if note.exists() else {}
    return {int(attempt): base for attempt, base in found.items()}


def publish(path: Path, data: bytes) -> None:
    """Replace `path` by `data` as a whole, durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
