"""The documents that `status` and `show` print: plain JSON values, made of stored rows and records.

At module level the standard library only: `status --json` starts as fast as Python does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs.lock import driver_lock, held
from runs.rows import LIVE, status_document, usd
from runs.store import Store, run_dir

if TYPE_CHECKING:
    from runs.record import RunRecord

INVENTORY = "inventory"
"""The note under which the last look at all providers is remembered."""
LONG = 1000
"""Elements of a JSON list that are still indented for people."""


def status(store: Store, run: str | None = None) -> list[dict[str, Any]]:
    """`status --json`: every run, newest first, and the nodes of the last inventory that no run has."""
    if run is not None:
        row = store.summary(run)
        return [_document(store.home, row)] if row else []
    rows = store.summaries()
    return [_document(store.home, row) for row in rows] + unowned(store, rows)


def print_status(word: str | None) -> int:
    """`status [RUN] --json`, straight to stdout. Raises NoSuchRun, Usage."""
    from runs.store import default_home

    home = default_home()
    rows: list[dict[str, Any]] = []
    if word is not None or (home / "llmctl.db").exists():
        store = Store(home)
        rows = status(store, find(store, word) if word is not None else None)
    print_json(rows)
    return 0


def print_json(document: Any) -> None:
    """One JSON document on stdout; a very long list with one element a line, which is written in less than half the time."""
    if isinstance(document, list) and len(document) > LONG:
        line = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
        text = "[\n" + ",\n".join(map(line, document)) + "\n]"
    else:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def find(store: Store, word: str | None) -> str:
    """The run that `word` means. Raises NoSuchRun, or Usage where a prefix is not unique."""
    from orchestrator.errors import NoSuchRun, Usage

    try:
        run = store.find(word)
    except LookupError as error:
        raise Usage(
            f"{word!r} is the beginning of several runs: {error}", "write more of the one you mean"
        ) from None
    if run is None:
        what = f"no run is called {word!r}" if word else "there are no runs yet"
        raise NoSuchRun(
            what, "`llmctl status` lists the runs" if word else "`llmctl launch SPEC` starts one", run=word
        )
    return run


def find_record(store: Store, word: str | None) -> RunRecord:
    """The record of the run that `word` means. Raises NoSuchRun, Usage."""
    from orchestrator.errors import NoSuchRun

    run = find(store, word)
    record = store.record(run)
    if record is None:
        raise NoSuchRun(f"{run} was removed just now", "`llmctl status` lists the runs", run=run)
    return record


def _document(home: Path, row: dict[str, Any]) -> dict[str, Any]:
    live = row["state"] in LIVE
    return status_document(row, driver_alive=live and held(driver_lock(run_dir(home, row["run"]))))


def unowned(store: Store, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nodes that the last inventory showed and no stored run has, as elements of `status --json` with `run: null`."""
    note = store.note(INVENTORY)
    if not note:
        return []
    known = {node["id"] for row in rows for node in row["nodes"]} | {
        node["key"] for row in rows for node in row["nodes"]
    }
    found = [
        (name, node) for name, seen in note["providers"].items() for node in seen["nodes"]
        if node["id"] not in known and node["key"] not in known
    ]  # fmt: skip
    return [_unowned(name, node) for name, node in found]


def _unowned(provider: str, node: dict[str, Any]) -> dict[str, Any]:
    rate = usd(node["micro_usd_per_hour"])
    shown = {key: node[key] for key in ("id", "name", "ip", "status")}
    return {
        "run": None, "name": None, "state": None, "reason": None, "provider": provider,
        "instance_type": node["instance_type"], "nodes": [{**shown, "usd_per_hour": rate, "billing": True}],
        "step": None, "steps": None, "loss": None, "validation_loss": None, "tokens_per_second": None,
        "cost_usd": None, "usd_per_hour": rate, "eta_seconds": None, "driver": False,
    }  # fmt: skip


def inventory_age(store: Store, now: datetime) -> float | None:
    """Seconds since the providers were last asked, or None."""
    note = store.note(INVENTORY)
    return (now - datetime.fromisoformat(note["at"])).total_seconds() if note else None


def show(store: Store, run: RunRecord, now: datetime) -> dict[str, Any]:
    """`show RUN --json`: the whole record."""
    from runs import charges

    totals = charges.totals(run, now)
    best = run.best
    return {
        "run": run.run,
        "name": run.name,
        "state": run.state,
        "reason": run.reason,
        "spec": dict(run.spec),
        "attempts": [
            {
                "provider": run.provider,
                "instance_type": item.offer.instance_type,
                "region": item.offer.region,
                "usd_per_hour": item.offer.usd_per_hour,
                "nodes": list(item.keys),
                "started": item.started_at.isoformat(),
                "ended": item.ended_at.isoformat() if item.ended_at else None,
                "from_step": item.from_step,
                "world_size": item.world_size,
                "microbatch_size": item.microbatch_size or run.summary.get("microbatch_size"),
            }
            for item in run.attempts
        ],
        "charges": [
            {"node": item.node, "phase": item.phase, "start": item.start.isoformat(), "end": item.end.isoformat(),
             "usd": usd(item.micro_usd)}
            for item in charges.charges(run, now)
        ],
        "cost_usd": usd(totals.micro_usd),
        "cost_is_upper_bound": not totals.final,
        "billed_seconds": round(totals.billed_seconds, 3),
        "training_seconds": round(totals.training_seconds, 3),
        "overhead_fraction": totals.overhead_fraction,
        "checkpoints": [
            {"step": item.step, "path": item.path, "sha256": item.sha256, "bytes": item.bytes, "fetched": item.fetched,
             "best": best is not None and best.step == item.step}
            for _, item in sorted(run.checkpoints.items())
        ],
        "events": [{"stream": stream, **body} for _, stream, body in store.history(run.run)],
        "summary": {**run.summary, "evaluations": [dict(item) for item in run.evaluations]},
    }  # fmt: skip
