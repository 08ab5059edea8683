"""Ending a run and taking home what it made, as commands do it: ask, follow, and say what came of it."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import exits
from orchestrator.actions import requests
from orchestrator.clock import Clock
from orchestrator.errors import Unverified
from orchestrator.figures import dollars, red, size
from orchestrator.following import attend
from orchestrator.progress import bar
from orchestrator.render import text as render
from orchestrator.render.live import Screen
from runs.rows import usd
from runs.store import Store, utcnow

if TYPE_CHECKING:
    from runs.record import CheckpointRecord, RunRecord


def stop(store: Store, run: RunRecord, clock: Clock, *, now: bool, as_json: bool) -> int:
    """Stop `run` and follow it until its nodes are gone: 0 then, 8 where that is not confirmed (also after
    Ctrl-C), 101 where Ctrl-C came before the run had ended."""
    over = run.outcome is not None and all(node.settled for node in run.owned)
    if not over:
        requests.stop(store, run, clock, now=now)
        watch = requests.taker(store.home, run.run, clock) if now else None
        code = attend.attend(store.home, run.run, clock, Screen(log=False), released=True, keep_going=watch)
    after = store.record(run.run) or run
    for node in after.nodes:
        if node.run != run.run and not node.settled:
            sys.stderr.write(f"{node.key} serves {node.run} now: `llmctl stop {node.run}` ends it\n")
    result = _ended(after) if over or code not in {exits.UNFINISHED, exits.MAY_BILL} else code
    if as_json:
        from orchestrator.actions import show
        from orchestrator.actions.show import print_json

        print_json(show.show(store, after, utcnow()))
    else:
        from orchestrator.render import show as render_show

        if after.outcome is not None:
            render_show.ending(after, utcnow())
        if result == exits.MAY_BILL:
            sys.stderr.write(red(render_show.alarm(after), sys.stderr) + "\n")
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
    from orchestrator.site import fetch

    wanted = which or run.spec["checkpoint"]["fetch"]
    wanted = "best" if wanted == "none" else wanted
    chosen = fetch.choose(run, wanted, fetch.elsewhere(run))
    sound = [_sound(run, item) for item in chosen]
    with bar() as progress:
        told = None if quiet else lambda done, total: progress("checkpoint", done, total)
        wholes = fetch.fetch(store, run, sound, to=to, weights_only=weights_only, progress=told)
    documents = [
        {"run": run.run, "step": item.step, "path": str(item.path), "sha256": item.sha256, "bytes": item.bytes,
         "verified": True}
        for item in wholes
    ]  # fmt: skip
    return documents if wanted == "all" else documents[0]


def _sound(run: RunRecord, item: CheckpointRecord) -> CheckpointRecord:
    """A checkpoint whose files here, if any, have the checksums of its manifest. Damaged ones are set aside, and it is as
    if they had never come. Raises Unverified where that leaves nothing to have it from."""
    from trainer import manifest

    if item.path is None or not (Path(item.path) / manifest.NAME).exists():
        return item
    folder = Path(item.path)
    listed = manifest.read(folder).files
    present = [entry for entry in listed if (folder / entry.name).is_file()]
    bad = [entry.name for entry in present if manifest.sha256(folder / entry.name) != entry.sha256]
    if not bad:
        return item
    if not any(node.ip and not node.settled for node in run.nodes):
        raise Unverified(
            f"{folder}: {', '.join(bad)} is not what its manifest says, and the node that had it is gone",
            f"take another one: `llmctl fetch-checkpoint {run.run} --which all` tells which are whole", run=run.run,
        )  # fmt: skip
    folder.rename(folder.with_name(f"{folder.name}.damaged-{secrets.token_hex(3)}"))
    return item.model_copy(update={"path": None})


def say_checkpoints(document: dict[str, Any] | list[dict[str, Any]]) -> None:
    """The path of each checkpoint on stdout, one a line; what it is on stderr."""
    from orchestrator.site import collect

    for item in document if isinstance(document, list) else [document]:
        whole = collect.here(Path(item["path"]))
        alone = ", the weights alone" if whole is not None and whole.weights_only else ""
        sys.stderr.write(
            f"step {item['step']}: {size(item['bytes'])}, verified, sha256 {item['sha256'][:16]}…{alone}\n"
        )
        render.line(item["path"])


def say_removed(run: str) -> None:
    """That a run is gone from here."""
    render.line(f"removed {run}; its charges stay in the store")
