"""The tables of the store, and how an older store gets them. The standard library only."""

from __future__ import annotations

import secrets
import sqlite3

MIGRATIONS = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, stream TEXT NOT NULL, version INTEGER NOT NULL,
        kind TEXT NOT NULL, at TEXT NOT NULL, epoch INTEGER NOT NULL, body TEXT NOT NULL);
    CREATE INDEX events_stream ON events (stream, seq);
    CREATE TABLE runs (
        run TEXT PRIMARY KEY, name TEXT NOT NULL, created TEXT NOT NULL, state TEXT NOT NULL, live INTEGER NOT NULL,
        epoch INTEGER NOT NULL, record TEXT NOT NULL, summary TEXT NOT NULL);
    CREATE INDEX runs_live ON runs (live, created);
    CREATE INDEX runs_created ON runs (created);
    CREATE TABLE nodes (
        key TEXT PRIMARY KEY, run TEXT NOT NULL, provider TEXT NOT NULL, unsettled INTEGER NOT NULL, record TEXT NOT NULL);
    CREATE INDEX nodes_run ON nodes (run);
    CREATE INDEX nodes_unsettled ON nodes (unsettled);
    """,
    """
    CREATE INDEX nodes_given_up ON nodes (provider) WHERE json_extract(record, '$.answer') = 'abandoned';
    """,
)
"""Each is what one version adds to the one before."""


def version(db: sqlite3.Connection) -> int:
    """How many migrations a store has had."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def migrate(db: sqlite3.Connection) -> None:
    """Bring a store up to date, inside the caller's transaction."""
    for number in range(version(db), len(MIGRATIONS)):
        for statement in MIGRATIONS[number].split(";"):
            if statement.strip():
                db.execute(statement)
        db.execute(f"PRAGMA user_version={number + 1}")
    db.execute("INSERT OR IGNORE INTO meta VALUES ('owner', ?)", (secrets.token_hex(8),))
