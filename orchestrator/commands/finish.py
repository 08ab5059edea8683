"""Ending runs and taking home what they made: stop, extend, fetch-checkpoint, ssh, rm, reap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.actions.show import find as find_run
from orchestrator.actions.show import find_record
from orchestrator.commands.common import (
    AnyRun,
    Form,
    Json,
    MaxUsd,
    Output,
    Run,
    Yes,
    add,
    answer,
    confirm,
    interactive,
    machine,
    open_store,
    tell,
)

PANEL = "Finish"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, PANEL, "stop", stop, "llmctl stop", "llmctl stop RUN --now")
    add(app, PANEL, "extend", extend, "llmctl extend RUN --max-usd 60 --max-hours 8")
    add(
        app,
        PANEL,
        "fetch-checkpoint",
        fetch_checkpoint,
        "llmctl fetch-checkpoint RUN --which latest --to ./weights --weights-only",
    )
    add(app, PANEL, "ssh", ssh, "llmctl ssh", "llmctl ssh RUN -- nvidia-smi")
    add(app, PANEL, "rm", rm, "llmctl rm RUN")
    add(app, PANEL, "reap", reap, "llmctl reap", "llmctl reap --yes")


def stop(
    run: AnyRun = None,
    *,
    now: Annotated[
        bool,
        typer.Option("--now", help="Skip the checkpoint; take over from a driver that no longer answers."),
    ] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> int:
    """Checkpoint, collect and release a run. Ends when the provider confirms that its nodes are gone."""
    from orchestrator.clock import SystemClock
    from orchestrator.following import ending

    store = open_store()
    record = find_record(store, run)
    return ending.stop(store, record, SystemClock(), now=now, as_json=machine(as_json, output))


def extend(
    run: AnyRun = None,
    *,
    max_usd: MaxUsd = None,
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", min=0.0, metavar="N", help="Hours from the first node on.")
    ] = None,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Raise the limits of a living run: its budget, its lease, and the node's own deadline."""
    from orchestrator.actions import requests
    from orchestrator.clock import SystemClock
    from orchestrator.following import ending

    store = open_store()
    record = find_record(store, run)
    requests.extend(store, record, SystemClock(), max_usd=max_usd, max_hours=max_hours)
    document = ending.limits(store, record.run)
    answer(document, as_json=machine(as_json, output), human=lambda: ending.say_limits(document))


def fetch_checkpoint(
    run: AnyRun = None,
    *,
    which: Annotated[
        str | None,
        typer.Option("--which", metavar="best|latest|STEP|all", help="Default: the spec's checkpoint.fetch."),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Also put a copy there.")] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Without the optimizer's state.")
    ] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Bring a verified checkpoint here. What is here already moves no bytes; a broken transfer is carried on."""
    from orchestrator.following import ending

    store = open_store()
    record = find_record(store, run)
    quiet = machine(as_json, output)
    document = ending.fetch_checkpoint(
        store, record, which=which, to=to, weights_only=weights_only, quiet=quiet
    )
    answer(document, as_json=quiet, human=lambda: ending.say_checkpoints(document))


def ssh(
    run: AnyRun = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- CMD]...", help="Run it instead of a shell.", show_default=False),
    ] = None,
) -> int:
    """Log in to a run's first node, with its own key and pinned host key."""
    from orchestrator.actions import login

    store = open_store()
    return login.login(store, find_record(store, run), command or [])


def rm(run: Run, *, yes: Yes = False, as_json: Json = False, output: Output = Form.TEXT) -> None:
    """Remove a finished run and its files from this machine. Refuses while anything bills, and keeps the charges."""
    from orchestrator.actions import requests
    from orchestrator.following import ending

    store = open_store()
    chosen = find_run(store, run)
    requests.check_removable(store, chosen)
    if not confirm(f"Remove {chosen} with its log, metrics and checkpoints?", yes=yes):
        raise typer.Abort
    requests.remove(store, chosen)
    answer({"removed": chosen}, as_json=machine(as_json, output), human=lambda: ending.say_removed(chosen))


def reap(
    *,
    yes: Yes = False,
    foreign: Annotated[bool, typer.Option("--foreign", help="Also unexpired nodes of other owners.")] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> int:
    """Find nodes at every provider that no live run has, or that are past their lease; end them, and see that they end."""
    from orchestrator.actions import reap as reaping
    from orchestrator.clock import SystemClock
    from orchestrator.render import doctor as render_doctor

    store, clock = open_store(), SystemClock()
    found = reaping.find(store, clock, foreign=foreign)
    quiet = machine(as_json, output)
    if not quiet:
        render_doctor.found(found)
    if found.nodes and not yes:
        if quiet or not interactive():
            answer(found.document(), as_json=quiet, human=lambda: tell("nothing was ended: add --yes"))
            return 2
        if not confirm(found.question, yes=False):
            return 8
    done = reaping.end(store, clock, found)
    answer(done.document(), as_json=quiet, human=lambda: render_doctor.reaped(done))
    return done.exit_code
