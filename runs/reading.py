"""Questions to the store that need no record: which runs there are, what they are called, and what happened since."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class Rows:
    """The reading half of `runs.store.Store`: plain values, no pydantic, no fold."""

    _db: sqlite3.Connection

    def since(self, run: str, seq: int) -> list[tuple[int, str, dict[str, Any]]]:
        """(seq, stream, body) of the events of a run and its nodes after `seq`: what a follower has not seen yet."""
        rows = self._db.execute(
            "SELECT seq, stream, body FROM events WHERE seq > ?1 AND (stream = ?2 OR stream LIKE ?3 OR (stream = ?4 AND seq >="
            " (SELECT min(seq) FROM events WHERE stream = ?4 AND kind = 'NodeClaimed' AND json_extract(body, '$.run') = ?5)))"
            " ORDER BY seq",
            (seq, f"run:{run}", f"node:llmctl-{run}-a%", f"node:{self._wanted(run)}", run),
        )
        return [(row[0], row[1], json.loads(row[2])) for row in rows]

    def _wanted(self, run: str) -> str | None:
        """The key of the node that a run was created to take over."""
        row = self._db.execute(
            "SELECT json_extract(record, '$.on') FROM runs WHERE run = ? AND json_valid(record)", (run,)
        ).fetchone()
        return row[0] if row else None

    def last_seq(self, run: str) -> int:
        """Grows with every event of the run and its nodes: a follower's cue."""
        row = self._db.execute(
            "SELECT max(seq) FROM events WHERE stream = ? OR stream LIKE ?",
            (f"run:{run}", f"node:llmctl-{run}-a%"),
        ).fetchone()
        return int(row[0] or 0)

    def specs(self, runs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The specs of those runs, as plain values."""
        found = {}
        for run in runs:
            row = self._db.execute(
                "SELECT json_extract(record, '$.spec') FROM runs WHERE run = ? AND json_valid(record)", (run,)
            ).fetchone()
            if row is not None and row[0] is not None:
                found[run] = json.loads(row[0])
        return found

    def runs(self, *, live: bool | None = None) -> list[tuple[str, str, str]]:
        """(run, name, state), newest first."""
        where = "" if live is None else f"WHERE live = {int(live)}"
        rows = self._db.execute(
            f"SELECT run, name, state FROM runs {where} ORDER BY created DESC, rowid DESC"
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def sweeps(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The runs of those sweeps, oldest first; of no other name."""
        found: dict[str, list[str]] = {}
        rows = self._db.execute(
            "SELECT sweep, run FROM (SELECT run, created, rowid AS nth, CASE WHEN json_valid(record) THEN"
            " json_extract(record, '$.sweep') END AS sweep FROM runs)"
            f" WHERE sweep IN ({','.join('?' * len(names))}) ORDER BY created, nth",
            list(names),
        )
        for sweep, run in rows:
            found.setdefault(sweep, []).append(run)
        return found

    def find(self, word: str | None) -> str | None:
        """The run that `word` means: an id, a unique prefix of one, or a name (its newest run).

        Without a word: the newest live run, else the newest. None where there is no such run; raises LookupError with the
        candidates where a prefix is not unique.
        """
        everything = self.runs()
        if word is None:
            living = self.runs(live=True)
            return next((run for run, _, _ in living or everything), None)
        if any(run == word for run, _, _ in everything):
            return word
        named = [run for run, name, _ in everything if name == word]
        if named:
            return named[0]
        matches = [run for run, _, _ in everything if run.startswith(word)]
        if len(matches) > 1:
            raise LookupError(", ".join(matches[:5]))
        return matches[0] if matches else None


def tenancy(
    run: str, rows: Iterable[tuple[str, str, dict[str, Any]]]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Without what happened to a node while another run had it; a claim belongs to both."""
    owners: dict[str, str] = {}
    for at, stream, body in rows:
        mine = stream.startswith("run:") or owners.get(stream, body.get("run")) == run
        if body["kind"] in {"LaunchIntended", "NodeClaimed"}:
            owners[stream] = body["run"]
        if mine or owners.get(stream) == run:
            yield at, stream, body
