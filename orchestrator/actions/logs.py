"""The mirrored log of a run: of its first node, or of several nodes merged.

Where several nodes train, each line of a trainer begins with `[rank N] `, and the log of each node is in a file of its own:
`train.log`, `train.n1.log` and so on. What has no rank is torchrun's or the supervisor's.
"""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Protocol

from runs.store import Store, run_dir

_RANK = re.compile(rb"\[rank (\d+)\] ?")


class Log(Protocol):
    """A log that is read onwards."""

    def read(self) -> bytes:
        """What was added since; empty: nothing."""


def open_log(store: Store, run: str, lines: int | None, ranks: int | None) -> Log:
    """The log of a run, from its start or its last `lines` lines: of one rank, or (None) of all, each line with its rank."""
    directory, record = run_dir(store.home, run), store.record(run)
    nodes = int(record.spec["hardware"].get("nodes") or 1) if record is not None else 1
    first = directory / "train.log"
    if nodes == 1 and not ranks:
        return LogFile(first, lines)
    return RankLog([first, *(directory / f"train.n{index}.log" for index in range(1, nodes))], ranks, lines)


class LogFile:
    """The mirrored log, read onwards from a position."""

    def __init__(self, path: Path, lines: int | None = None) -> None:
        """From the start, or from the last `lines` lines."""
        self.path = path
        self.offset = 0 if lines is None else _last_lines(path, lines)

    def read(self, limit: int = 1 << 20) -> bytes:
        """What was added since, at most `limit` bytes."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(limit)
        except FileNotFoundError:
            return b""
        self.offset += len(data)
        return data


def _last_lines(path: Path, lines: int, block: int = 1 << 16) -> int:
    """The offset at which the last `lines` lines begin."""
    try:
        position = path.stat().st_size
    except FileNotFoundError:
        return 0
    if lines <= 0:
        return position
    found = 0
    with path.open("rb") as file:
        end = position
        while position > 0:
            step = min(block, position)
            position -= step
            file.seek(position)
            data = file.read(step)
            for index in range(len(data) - 1, -1, -1):
                # The newline that ends the file ends its last line; it does not begin another.
                if data[index] == 0x0A and position + index != end - 1:
                    found += 1
                    if found == lines:
                        return position + index + 1
    return 0


class RankLog:
    """The logs of all nodes, in whole lines: those of one rank, without their mark, or of all."""

    def __init__(self, paths: list[Path], rank: int | None, lines: int | None = None) -> None:
        self._files = [LogFile(path) for path in paths]
        self._rests = [b""] * len(paths)
        self._rank, self._lines = rank, lines

    def read(self) -> bytes:
        """The lines that were added since, at most some megabytes of them; the first time, the last `lines` of all."""
        if self._lines is None:
            return self._more()
        kept: deque[bytes] = deque(maxlen=self._lines)
        while data := self._more():
            kept.extend(data.splitlines(keepends=True))
        self._lines = None
        return b"".join(kept)

    def _more(self) -> bytes:
        while True:
            found, moved = [], False
            for node, file in enumerate(self._files):
                data = file.read()
                moved = moved or bool(data)
                whole, newline, self._rests[node] = (self._rests[node] + data).rpartition(b"\n")
                if newline:
                    found += [
                        shown for line in whole.split(b"\n") if (shown := self._shown(line, node)) is not None
                    ]
            if found or not moved:
                return b"".join(line + b"\n" for line in found)

    def _shown(self, line: bytes, node: int) -> bytes | None:
        """The line as it is shown; None: not."""
        marked = _RANK.match(line)
        if self._rank is None:
            return line if marked or len(self._files) == 1 else b"[node %d] " % node + line
        if marked:
            return line[marked.end() :] if int(marked[1]) == self._rank else None
        return line if self._rank == 0 and node == 0 else None
