"""Rows of the store that cannot be read: made anew from the events, which are the truth; else shown as what they are.

A row is a projection. One that a full disk or a broken backup spoilt must not keep anybody from the others. The standard
library only, until something is broken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runs.record import RunRecord
    from runs.store import Store


class Gaps(dict[str, Any]):
    """A projection row of which nothing but the name is known: every other value is None."""

    def __missing__(self, key: str) -> None:
        return None


def rows(store: Store, found: Iterable[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """The projection rows of (run, name, stored text), each as whole as it can be had."""
    return [row(store, *item) for item in found]


def row(store: Store, run: str, name: str, text: str) -> dict[str, Any]:
    """One projection row."""
    try:
        read = json.loads(text)
        if isinstance(read, dict) and "nodes" in read:
            return read
    except ValueError:
        pass
    from runs.rows import UNREADABLE
    from runs.store import StoreError
    from runs.summary import summarise

    try:
        record = store.record(run)
    except StoreError:
        record = None
    if record is not None:
        return summarise(record)
    return Gaps(run=run, name=name, state=UNREADABLE, reason="its record cannot be read", nodes=[], steps=0)


def record(store: Store, run: str) -> RunRecord:
    """The record of a run, without its nodes, folded anew. Raises StoreError where its events cannot be read either."""
    from runs.fold import fold_all
    from runs.store import StoreError

    try:
        made = fold_all(store.events(f"run:{run}"))  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError):
        made = None
    if made is None:
        raise StoreError(
            f"the record of {run} cannot be read, and neither can its events",
            f"what it left is in runs/{run}/; restore llmctl.db from a backup, and look for its nodes with `llmctl reap`",
        )
    return made
