"""`tail`: a run's log or metrics from the mirrored files, from the start or the last lines, then as they grow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from orchestrator import exits
from orchestrator.actions import follow, logs
from orchestrator.clock import Clock
from orchestrator.figures import sane
from orchestrator.following import attend
from orchestrator.render.live import Screen
from runs.rows import LIVE
from runs.store import Store, run_dir


def log(
    home: Path, run: str, clock: Clock, *, lines: int | None, following: bool, ranks: int | None = 0
) -> int:
    """Print train.log, sanitised; of one rank, or of all (None). Follows a live run to its end (Ctrl-C: 101); of one that is over prints what there is."""
    store = Store(home)
    try:
        row = store.summary(run)
        if following and row is not None and row["state"] in LIVE:
            return attend.attend(home, run, clock, Screen(events=False), lines=lines, ranks=ranks)
        whole_file(logs.open_log(store, run, lines, ranks))
    finally:
        store.close()
    return exits.OK


def whole_file(file: logs.Log) -> None:
    """Print what a log holds now, in whole lines, with bounded memory."""
    for line in _lines(file):
        sys.stdout.write(sane(line.decode("utf-8", "replace")) + "\n")
    sys.stdout.flush()


def _lines(file: logs.Log) -> Iterator[bytes]:
    """The whole blocks of lines that were added to `file`; at last a line that has no end yet."""
    rest = b""
    while data := file.read():
        whole, newline, rest = (rest + data).rpartition(b"\n")
        if newline:
            yield whole
    if rest:
        yield rest


def metrics(home: Path, run: str, clock: Clock, *, lines: int | None, following: bool) -> int:
    """Print metrics.jsonl as it is, line by line, each once."""
    file = logs.LogFile(run_dir(home, run) / "metrics.jsonl", lines)
    printed = MetricLines(file)
    printed.print()
    if not following:
        return exits.OK
    try:
        for _ in follow.follow(home, run, clock, revive=False, keep_going=lambda _row: printed.print()):
            pass
        printed.print()
    except KeyboardInterrupt:
        return exits.UNFINISHED
    return exits.OK


class MetricLines:
    """The whole lines of a growing file, each printed once."""

    def __init__(self, file: logs.LogFile) -> None:
        self._file, self._rest = file, b""

    def print(self) -> bool:
        """Print what was added; True, so that it may be asked for with every look at the run."""
        while data := self._file.read():
            whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
            if newline:
                sys.stdout.write(whole.decode("utf-8", "replace") + "\n")
        sys.stdout.flush()
        return True
