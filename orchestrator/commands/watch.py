"""Looking at runs: status, tail, show."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.actions.show import find as find_run
from orchestrator.actions.show import find_record, print_json
from orchestrator.commands.common import (
    AnyRun,
    Form,
    Json,
    Output,
    add,
    answer,
    machine,
    open_store,
)

PANEL = "Watch"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, PANEL, "status", status, "llmctl status", "llmctl status --watch", "llmctl status -o json")
    add(
        app,
        PANEL,
        "tail",
        tail,
        "llmctl tail",
        "llmctl tail RUN --lines 50 --no-follow",
        "llmctl tail RUN --ranks all",
    )
    add(app, PANEL, "show", show, "llmctl show", "llmctl show RUN --json | jq .cost_usd")


def status(
    run: AnyRun = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and show what changes.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the providers first.")] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Show every run and every node that bills, with dollars so far. Reads the store alone, unless told to refresh."""
    from orchestrator.actions import show as documents

    store = open_store()
    if refresh:
        from orchestrator.actions import inventory

        inventory.refresh(store)
    chosen = find_run(store, run) if run is not None else None
    if watch and not machine(as_json, output):
        from orchestrator.render import watch as render_watch

        render_watch.watch(store, chosen)
        return
    rows = documents.status(store, chosen)
    if machine(as_json, output):
        print_json(rows)
        return
    from orchestrator.render import status as render_status
    from runs.store import utcnow

    render_status.status(rows, age_seconds=documents.inventory_age(store, utcnow()))


def tail(
    run: AnyRun = None,
    *,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Stay until the run ends.")] = True,
    lines: Annotated[
        int | None,
        typer.Option(
            "--lines", "-n", min=0, metavar="N", help="Begin with the last N lines.", show_default=False
        ),
    ] = None,
    ranks: Annotated[
        str,
        typer.Option(
            "--ranks", metavar="all|N", help="Of several nodes: the log of that process, or of all."
        ),
    ] = "0",
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> int:
    """Print a run's log from its start, then follow it. With --json: the lines of metrics.jsonl."""
    if ranks != "all" and not ranks.isdecimal():
        raise typer.BadParameter(
            f"{ranks!r} is neither `all` nor the number of a process", param_hint="--ranks"
        )
    from orchestrator.clock import SystemClock
    from orchestrator.following import tailing

    store = open_store()
    chosen = find_run(store, run)
    if machine(as_json, output):
        return tailing.metrics(store.home, chosen, SystemClock(), lines=lines, following=follow)
    rank = None if ranks == "all" else int(ranks)
    return tailing.log(store.home, chosen, SystemClock(), lines=lines, following=follow, ranks=rank)


def show(run: AnyRun = None, *, as_json: Json = False, output: Output = Form.TEXT) -> None:
    """Show the whole record of a run: spec, hardware, attempts, timeline, charges by phase, checkpoints, events."""
    from orchestrator.actions import show as documents
    from runs.store import utcnow

    store = open_store()
    record, now = find_record(store, run), utcnow()
    document = documents.show(store, record, now)

    def human() -> None:
        from orchestrator.render import show as render_show

        render_show.show(document, record, now)

    answer(document, as_json=machine(as_json, output), human=human)
