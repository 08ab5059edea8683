"""Ending a run and taking home what it made, as commands do it: ask, follow, and say what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import attend, exits, render, requests
from orchestrator.clock import Clock
from orchestrator.figures import dollars, size
from orchestrator.render_live import Screen
from runs.rows import usd
from runs.store import Store, utcnow

if TYPE_CHECKING:
    from runs.record import RunRecord


def stop(store: Store, run: RunRecord, clock: Clock, *, now: bool, as_json: bool) -> int:
    """Stop `run` and follow it until its nodes are gone: 0 then, 8 where that is not confirmed, 101 after Ctrl-C."""
    over = run.outcome is not None and all(node.settled for node in run.nodes)
    if not over:
        requests.stop(store, run, clock, now=now)
        code = attend.attend(store.home, run.run, clock, Screen(log=False))
    after = store.record(run.run) or run
    result = _ended(after) if over or code not in {exits.UNFINISHED, exits.MAY_BILL} else code
    if as_json:
        from orchestrator import show
        from orchestrator.commands.common import print_json

        print_json(show.show(store, after, utcnow()))
    else:
        from orchestrator import render_show

        if after.outcome is not None:
            render_show.ending(after, utcnow())
        if result == exits.MAY_BILL:
            sys.stderr.write(render_show.alarm(after) + "\n")
    return result


def _ended(run: RunRecord) -> int:
    return exits.MAY_BILL if exits.may_still_bill(run) else exits.OK


def limits(store: Store, run: str) -> dict[str, Any]:
    """The limits of a run as they are now."""
    record = store.record(run)
    assert record is not None
    return {
        "run": run,
        "max_usd": usd(record.max_micro_usd) if record.max_micro_usd is not None else None,
        "max_hours": record.max_seconds / 3600 if record.max_seconds is not None else None,
    }


def say_limits(document: dict[str, Any]) -> None:
    """The new limits in a line."""
    hours = f"{document['max_hours']:g} h" if document["max_hours"] is not None else "no limit of time"
    render.line(
        f"{document['run']}: up to {dollars(document['max_usd'])} and {hours}; its driver passes that on"
    )


def fetch_checkpoint(
    store: Store, run: RunRecord, *, which: str | None, to: Path | None, weights_only: bool, quiet: bool
) -> dict[str, Any] | list[dict[str, Any]]:
    """Bring checkpoints here and verify them. One document, or with `all` a list."""
    from orchestrator import fetch

    wanted = which or run.spec["checkpoint"]["fetch"]
    wanted = "best" if wanted == "none" else wanted
    chosen = fetch.choose(run, wanted)
    del quiet
    wholes = fetch.fetch(store, run, chosen, to=to, weights_only=weights_only)
    documents = [
        {"run": run.run, "step": item.step, "path": str(item.path), "sha256": item.sha256, "bytes": item.bytes,
         "verified": True}
        for item in wholes
    ]  # fmt: skip
    return documents if wanted == "all" else documents[0]


def say_checkpoints(document: dict[str, Any] | list[dict[str, Any]]) -> None:
    """The path of each checkpoint on stdout, one a line; what it is on stderr."""
    for item in document if isinstance(document, list) else [document]:
        sys.stderr.write(
            f"step {item['step']}: {size(item['bytes'])}, verified, sha256 {item['sha256'][:16]}…\n"
        )
        render.line(item["path"])


def say_removed(run: str) -> None:
    """That a run is gone from here."""
    render.line(f"removed {run}; its charges stay in the store")
