"""SHA-256 of local files, remembered: a file is read again only when its size, time or inode has changed."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from orchestrator.data.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and with how much of how much is done."""


def quiet(_what: str, _done: int, _total: int) -> None:
    """The progress callback of someone who does not look."""


class HashCache:
    """The remembered hashes, in `hashes.db` under `folder`; several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "hashes.db"
        with closing(self._open()) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, "
                             "inode INTEGER, sha256 TEXT) WITHOUT ROWID")  # fmt: skip

    def sha256(self, path: Path, progress: Progress = quiet) -> str:
        """Hex SHA-256 of `path`. Raises DataError where it cannot be read, or changes while it is being read."""
        path = path.resolve()
        try:
            before = _stamp(path)
            if (known := self._known(path, before)) is not None:
                return known
            digest = _read(path, before[0], progress)
            after = _stamp(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        if before != after:
            raise DataError(
                f"{path} changed while it was being read", "Wait until whatever writes it has ended"
            )
        with closing(self._open()) as database, database:
            database.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", (str(path), *after, digest)
            )
        return digest

    def _known(self, path: Path, stamp: tuple[int, int, int]) -> str | None:
        with closing(self._open()) as database:
            row = database.execute(
                "SELECT size, mtime_ns, inode, sha256 FROM files WHERE path = ?", (str(path),)
            ).fetchone()
        return row[3] if row is not None and row[:3] == stamp else None

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=30)
        database.execute("PRAGMA synchronous = OFF")  # what a power cut loses is hashed again
        return database


def _stamp(path: Path) -> tuple[int, int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns, info.st_ino


def _read(path: Path, size: int, progress: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(4 << 20):
            digest.update(block)
            done += len(block)
            progress(f"hashing {path.name}", done, size)
    return digest.hexdigest()
