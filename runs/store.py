"""The store: LLMCTL_HOME/llmctl.db (SQLite, WAL). Events are the truth; rows of `runs` and `nodes` are their fold.

Each commit appends events and rewrites the rows they change in one transaction, durable before it returns
(synchronous=FULL): an intent is on disk before the call that it announces. Several processes may write: a driver's events
carry its epoch, and those of a driver that was superseded are refused.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs import mending, tables
from runs.reading import Rows, tenancy

if TYPE_CHECKING:
    from runs import events as e
    from runs.record import NodeRecord, RunRecord


class StoreError(Exception):
    """The store cannot be used: `hint` says what to do. Where it is, is configuration: hence the exit code."""

    exit_code = 3
    code = "store"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class StaleEpoch(StoreError):
    """Another driver has taken this run over: the caller must end without touching anything."""


class NotYours(StoreError):
    """Another run answers for that node, or it is not to be had: nothing was written."""


class Store(Rows):
    """One connection to the store. Not shared between threads."""

    def __init__(self, home: Path, *, synchronous: str = "FULL", read_only: bool = False) -> None:
        self.home = home
        self.path = home / "llmctl.db"
        self._runs: dict[str, RunRecord] = {}
        self._nodes: dict[str, NodeRecord] = {}
        self._views: dict[str, RunRecord] = {}
        self._seen_version = -1
        try:
            if not read_only:
                home.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute(f"PRAGMA synchronous={synchronous}")
            if tables.version(self._db) < len(tables.MIGRATIONS):
                self._db.execute("PRAGMA journal_mode=WAL")
                with self._transaction():
                    tables.migrate(self._db)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"cannot use the store {self.path}: {error}",
                "set LLMCTL_HOME to a folder that you can write to, on a disk with space",
            ) from error

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        self._db.execute(f"BEGIN {kind}")
        try:
            self._forget_stale()
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite ends it by itself on a full disk
                self._db.execute("ROLLBACK")
            raise

    def _forget_stale(self) -> None:
        """Records that were read are kept, parsed, until another connection has written."""
        version = self._db.execute("PRAGMA data_version").fetchone()[0]
        if version != self._seen_version:
            self._runs, self._nodes, self._views, self._seen_version = {}, {}, {}, version

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    # ------------------------------------------------------------ meta

    @property
    def owner(self) -> str:
        """The random id of this LLMCTL_HOME, which its nodes carry as a tag."""
        return str(self._db.execute("SELECT value FROM meta WHERE key = 'owner'").fetchone()[0])

    def note(self, key: str) -> Any:
        """A remembered JSON value (the last inventory, a microbatch choice …), or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def remember(self, key: str, value: Any) -> None:
        """Remember a JSON value under `key`."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    # ------------------------------------------------------------ writing

    def commit(
        self,
        changes: Sequence[tuple[str, e.RunEvent | e.NodeEvent]],
        *,
        epoch: int | None = None,
        run: str | None = None,
    ) -> None:
        """Append events (stream, event) and rewrite the rows that they change, in one durable transaction.

        With an `epoch` (a driver's), raises StaleEpoch and writes nothing where the run has a newer driver. With the `run`
        on whose behalf it is done, raises NotYours and writes nothing where another run answers for a node among them.
        """
        if not changes:
            return
        runs: dict[str, RunRecord] = {}
        nodes: dict[str, NodeRecord] = {}
        try:
            with self._transaction():
                self._append(changes, (epoch, run), runs, nodes)
                views = self._write_rows(changes[-1][1].at, runs, nodes)
        except sqlite3.Error as error:
            raise StoreError(
                f"cannot write to {self.path}: {error}", "free some disk space, then `llmctl resume`"
            ) from error
        self._runs |= runs
        self._nodes |= nodes
        self._views = views

    def _append(
        self,
        changes: Sequence[tuple[str, e.RunEvent | e.NodeEvent]],
        author: tuple[int | None, str | None],
        runs: dict[str, RunRecord],
        nodes: dict[str, NodeRecord],
    ) -> None:
        """Insert the events; leave the records that they make in `runs` and `nodes`. `author`: epoch and run of a driver."""
        from runs import events as e
        from runs.fold import fold_run
        from runs.nodefold import fold_node

        epoch, writer = author
        for stream, event in changes:
            kind, _, name = stream.partition(":")
            if kind == "node":
                known = nodes.get(name) or self._node(name)
                self._permit(known, event, writer, runs)  # type: ignore[arg-type]
                nodes[name] = node = fold_node(known, event)  # type: ignore[arg-type]
                tenants = node.tenants  # the rows of all of them: each pays a part of one bill
            else:
                tenants = (name,)
            for run in tenants:
                before = runs.get(run) or self._bare(run)
                if epoch is not None and before is not None and run == (writer or tenants[-1]):
                    newest = before.epoch + isinstance(event, e.DriverStarted)
                    if newest > epoch:
                        raise StaleEpoch(f"another driver has taken {run} over")
                if kind == "run":
                    runs[run] = fold_run(before, event)  # type: ignore[arg-type]
                elif before is not None:
                    runs[run] = before
            self._db.execute(
                "INSERT INTO events (stream, version, kind, at, epoch, body) VALUES (?, ?, ?, ?, ?, ?)",
                (stream, e.VERSION, event.kind, event.at.isoformat(), epoch or 0, e.dump(event)),
            )

    def _permit(
        self, node: NodeRecord | None, event: e.NodeEvent, writer: str | None, runs: dict[str, RunRecord]
    ) -> None:
        """Raise NotYours where `writer` does not answer for the node; a claim: where nobody keeps it for others."""
        from runs import events as e

        if node is None:
            return
        if not isinstance(event, e.NodeClaimed):
            if writer is not None and writer != node.run:
                raise NotYours(f"{node.key} serves {node.run} now")
            return
        former = runs.get(node.run) or self._bare(node.run)
        if former is None or not former.keeps(node):
            raise NotYours(f"{node.key} is not kept any more")
        if former.live:
            raise NotYours(f"{node.key} is busy: {node.run} has not ended")

    def _write_rows(
        self, at: datetime, runs: dict[str, RunRecord], nodes: dict[str, NodeRecord]
    ) -> dict[str, RunRecord]:
        """Write the rows of changed records; the runs with their nodes."""
        from runs.record import view

        views: dict[str, RunRecord] = {}
        for key, node in nodes.items():
            self._db.execute(
                "INSERT INTO nodes VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET run=excluded.run,"
                " unsettled=excluded.unsettled, record=excluded.record",
                (key, node.run, node.provider, not node.settled, node.model_dump_json()),
            )
        for run, bare in runs.items():
            mine = [nodes.get(node.key, node) for node in self._mine(run, bare, nodes)]
            views[run] = record = view(bare, tuple(mine))
            summary = self._summary(record, at)
            if bare is self._runs.get(run):  # an event of a node alone
                self._db.execute(
                    "UPDATE runs SET state = ?, summary = ? WHERE run = ?", (record.state, summary, run)
                )
                continue
            values = (bare.name, bare.created_at.isoformat(), record.state, bare.live, bare.epoch)
            self._db.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run) DO UPDATE SET name=excluded.name,"
                " state=excluded.state, live=excluded.live, epoch=excluded.epoch, record=excluded.record,"
                " summary=excluded.summary",
                (run, *values, bare.model_dump_json(), summary),
            )
        return views

    def _mine(self, run: str, bare: RunRecord, changed: Mapping[str, NodeRecord]) -> Iterable[NodeRecord]:
        """The nodes of a run in a commit: those of the last view, unless there may be others."""
        known = self._views.get(run)
        if known is not None:
            keys = {node.key for node in known.nodes}
            wanted = {key for attempt in bare.attempts for key in attempt.keys} | changed.keys()
            wanted |= {bare.on} if bare.on else set()
            if wanted <= keys:
                return known.nodes
        return self._select(run, bare)

    def _summary(self, record: RunRecord, at: datetime) -> str:
        from runs.summary import summarise

        return json.dumps(summarise(record, at), allow_nan=False)

    def rebuild(self) -> None:
        """Make all rows anew from the events, which are the truth."""
        from runs import events as e
        from runs.fold import fold_run
        from runs.nodefold import fold_node

        runs: dict[str, RunRecord] = {}
        nodes: dict[str, NodeRecord] = {}
        with self._transaction():
            self._runs, self._nodes, self._views = {}, {}, {}
            last: dict[str, datetime] = {}
            for stream, body in self._db.execute("SELECT stream, body FROM events ORDER BY seq").fetchall():
                kind, _, name = stream.partition(":")
                event = e.load(stream, body)
                if kind == "run":
                    runs[name] = fold_run(runs.get(name), event)  # type: ignore[arg-type]
                else:
                    nodes[name] = fold_node(nodes.get(name), event)  # type: ignore[arg-type]
                last |= dict.fromkeys((name,) if kind == "run" else nodes[name].tenants, event.at)
            self._db.execute("DELETE FROM nodes")
            self._db.execute("DELETE FROM runs")
            if runs or nodes:
                self._write_rows(max(last.values()), {}, nodes)
            for run, bare in runs.items():
                self._write_rows(last[run], {run: bare}, {})

    # ------------------------------------------------------------ reading

    def _bare(self, run: str) -> RunRecord | None:
        from runs.record import RunRecord

        if run not in self._runs:
            row = self._db.execute("SELECT record FROM runs WHERE run = ?", (run,)).fetchone()
            if row is None:
                return None
            try:
                self._runs[run] = RunRecord.model_validate_json(row[0])
            except ValueError:
                self._runs[run] = mending.record(self, run)
        return self._runs[run]

    def _node(self, key: str) -> NodeRecord | None:
        return self._nodes.get(key) or next(iter(self._parsed("key = ?", [key])), None)

    def _parsed(self, where: str, values: Sequence[object]) -> list[NodeRecord]:
        """Node records, oldest intent first."""
        from runs.record import NodeRecord

        query = f"SELECT key, record FROM nodes WHERE {where} ORDER BY rowid"
        result = []
        for key, record in self._db.execute(query, values):
            if key not in self._nodes:
                self._nodes[key] = NodeRecord.model_validate_json(record)
            result.append(self._nodes[key])
        return result

    def _select(self, run: str, bare: RunRecord) -> list[NodeRecord]:
        """The nodes that a run has or had, and the one that it wants to take over."""
        keys = {key for attempt in bare.attempts for key in attempt.keys} | ({bare.on} if bare.on else set())
        mine = self._parsed("run = ?", [run])
        if keys <= {node.key for node in mine}:  # the rest is another run's: seldom, and a longer question
            return mine
        return self._parsed(f"run = ? OR key IN ({','.join('?' * len(keys))})", [run, *keys])

    def record(self, run: str) -> RunRecord | None:
        """The record of a run with its nodes, as one commit left them, or None."""
        from runs.record import view

        self._forget_stale()
        if run not in self._views:
            with self._transaction("DEFERRED"):
                bare = self._bare(run)
                if bare is None:
                    return None
                self._views[run] = view(bare, tuple(self._select(run, bare)))
        return self._views[run]

    def node(self, key: str) -> NodeRecord | None:
        """One node."""
        with self._transaction("DEFERRED"):
            return self._node(key)

    def nodes(self, run: str | None = None, *, unsettled: bool = False) -> list[NodeRecord]:
        """Nodes, oldest first: those that one run answers for, or all."""
        where, values = ["1"], []
        if run is not None:
            where, values = ["run = ?"], [run]
        if unsettled:
            where.append("unsettled = 1")
        with self._transaction("DEFERRED"):
            return self._parsed(" AND ".join(where), values)

    def given_up(self, provider: str, since: datetime, *, beside: str) -> tuple[NodeRecord, ...]:
        """Launches of other runs than `beside` that were given up and intended after `since`, and those of any age that came late
        and are being ended."""
        from runs.record import LATE

        # Asked twice a second by each driver: by two indices, not from every node that there ever was.
        where = (
            "rowid IN (SELECT rowid FROM nodes WHERE provider = ? AND json_extract(record, '$.answer') = 'abandoned'"
            " UNION SELECT rowid FROM nodes WHERE unsettled = 1) AND provider = ? AND run != ?"
        )
        return tuple(
            node for node in self._parsed(where, [provider, provider, beside])
            if (node.intended_at >= since if node.answer == "abandoned" else node.terminate_reason == LATE)
        )  # fmt: skip

    def events(self, stream: str) -> list[e.RunEvent | e.NodeEvent]:
        """All events of a stream, in order."""
        from runs import events as e

        rows = self._db.execute("SELECT body FROM events WHERE stream = ? ORDER BY seq", (stream,))
        return [e.load(stream, row[0]) for row in rows]

    def history(self, run: str) -> list[tuple[str, str, dict[str, Any]]]:
        """(time, stream, body) of all events of a run, and of its nodes while they were its own, in the order in which they
        were committed."""
        record = self.record(run)
        keys = [node.key for node in (record.nodes if record is not None else self.nodes(run))]
        streams = [f"run:{run}", *(f"node:{key}" for key in keys)]
        rows = self._db.execute(
            f"SELECT at, stream, kind, body FROM events WHERE stream IN ({','.join('?' * len(streams))}) ORDER BY seq",
            streams,
        )
        return list(tenancy(run, ((row["at"], row["stream"], json.loads(row["body"])) for row in rows)))

    def summaries(self, *, live: bool | None = None) -> list[dict[str, Any]]:
        """The projection rows, newest first, as stored: no pydantic, no fold."""
        where = "" if live is None else f"WHERE live = {int(live)}"
        rows = self._db.execute(
            f"SELECT run, name, summary FROM runs {where} ORDER BY created DESC"
        ).fetchall()
        try:
            # Read as one text, so that ten thousand rows share their keys: a sixth less time.
            read = list(json.loads(f"[{','.join(row[2] for row in rows)}]"))
        except ValueError:
            read = []
        return (
            read
            if len(read) == len(rows) and all("nodes" in row for row in read)
            else mending.rows(self, map(tuple, rows))
        )

    def concerning(self) -> list[dict[str, Any]]:
        """The projection rows of runs that are live, or have a node that is not settled; newest first."""
        rows = self._db.execute(
            "SELECT run, name, summary FROM runs WHERE live = 1 OR run IN (SELECT run FROM nodes WHERE unsettled = 1)"
            " ORDER BY created DESC"
        )
        return mending.rows(self, map(tuple, rows.fetchall()))

    def summary(self, run: str) -> dict[str, Any] | None:
        """The projection row of one run."""
        row = self._db.execute("SELECT run, name, summary FROM runs WHERE run = ?", (run,)).fetchone()
        return mending.row(self, *row) if row else None

    def forget(self, run: str) -> None:
        """Take a run out of the lists (`llmctl rm`). Its nodes' streams, which are its bill, stay."""
        with self._transaction():
            self._db.execute("DELETE FROM runs WHERE run = ?", (run,))
            self._db.execute("DELETE FROM events WHERE stream = ?", (f"run:{run}",))


def default_home() -> Path:
    """LLMCTL_HOME, or the platform's user data directory."""
    chosen = os.environ.get("LLMCTL_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("llmctl"))


def run_dir(home: Path, run: str) -> Path:
    """`runs/RUN/`: spec.yaml, train.log, metrics.jsonl, checkpoints/."""
    return home / "runs" / run


def utcnow() -> datetime:
    """The wall clock, UTC."""
    from datetime import UTC

    return datetime.now(UTC)
