"""Files of JSON lines that a long job appends to and goes on from: a line is written whole or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any


class Lines:
    """A file that only grows. Threads may share it; a line is on the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.rows = [row for line in path.read_bytes().splitlines() if (row := _row(line)) is not None]
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(
                self._descriptor, b"\n"
            )  # a kill cut the last line off: end it, so that the next one stands alone

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and wait for the disk."""
        data = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._lock:
            written = os.write(self._descriptor, data)
            if written != len(data):  # a full disk takes a part
                os.write(self._descriptor, b"\n")
                raise OSError(28, os.strerror(28))
            os.fsync(self._descriptor)
            self.rows.append(row)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
