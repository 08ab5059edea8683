"""Before and at the start of a run: init, doctor, offers, plan, launch, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.actions.show import find_record
from orchestrator.commands.common import (
    Assignments,
    Form,
    Json,
    MaxUsd,
    Output,
    Run,
    Yes,
    add,
    answer,
    confirm,
    machine,
    open_store,
    tell,
)
from orchestrator.completion import complete_recipe, complete_run

PANEL = "Begin"
Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="A run.yaml.", show_default=False)]
WaitFor = Annotated[
    str | None,
    typer.Option("--wait", metavar="DURATION", help="How long to wait for capacity, as 30m, 6h, 2d."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, PANEL, "init", init, "llmctl init", "llmctl init big.yaml --recipe 8xh100")
    add(app, PANEL, "doctor", doctor, "llmctl doctor", "llmctl doctor --json")
    add(app, PANEL, "offers", offers, "llmctl offers --gpu H100:8", "llmctl offers run.yaml")
    add(app, PANEL, "plan", plan, "llmctl plan run.yaml", "llmctl plan run.yaml --set train.tokens=1e9")
    add(
        app,
        PANEL,
        "launch",
        launch,
        "llmctl launch run.yaml",
        "llmctl launch run.yaml --wait 6h --detach -y",
        "llmctl launch run.yaml --on RUN",
    )
    add(app, PANEL, "sweep", sweep, "llmctl sweep sweep.yaml --dry-run", "llmctl sweep sweep.yaml -y")
    add(app, PANEL, "resume", resume, "llmctl resume RUN", "llmctl resume RUN --max-usd 60")


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write it.")] = Path("run.yaml"),
    *,
    recipe: Annotated[
        str,
        typer.Option("--recipe", metavar="NAME", help="A shipped recipe.", autocompletion=complete_recipe),
    ] = "quickstart",
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it exists.")] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Write a commented run.yaml from a shipped recipe."""
    from orchestrator.following import begin

    begin.write_recipe(file, recipe, force=force)
    document = {"path": str(file), "recipe": recipe}
    answer(document, as_json=machine(as_json, output), human=lambda: begin.say_recipe(file, recipe))


def doctor(*, as_json: Json = False, output: Output = Form.TEXT) -> int:
    """Check this machine and each configured provider; for every fault, what it means and what to type."""
    from orchestrator.actions import doctor as examine
    from orchestrator.render import doctor as render_doctor

    checks = examine.examine()
    document = examine.document(checks)
    answer(document, as_json=machine(as_json, output), human=lambda: render_doctor.checks(checks))
    return examine.exit_code(checks)


def offers(
    spec: Annotated[
        Path | None,
        typer.Argument(metavar="[SPEC]", help="Also predict this run on each.", show_default=False),
    ] = None,
    *,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME:N", help="As H100:8 or A100-40GB.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what is sold out, and machines without a GPU.")
    ] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """List live offers: price per hour and per GPU-hour, regions with capacity; with a SPEC also hours and dollars."""
    from orchestrator.actions import market
    from orchestrator.render import plan as render_plan

    found = market.listing(open_store(), spec, gpu=gpu, everything=everything)
    answer(found.document(), as_json=machine(as_json, output), human=lambda: render_plan.offers(found))


def plan(
    spec: Spec, *, assignments: Assignments = None, as_json: Json = False, output: Output = Form.TEXT
) -> int:
    """Validate a spec, choose an offer and predict memory, speed, hours and dollars. Changes nothing."""
    from orchestrator.actions import plan as planning
    from orchestrator.render import plan as render_plan

    store = planning.quiet_store()
    made = planning.make(store, planning.read(spec, assignments or []))
    answer(made.document(), as_json=machine(as_json, output), human=lambda: render_plan.plan(made))
    return made.exit_code


def launch(
    spec: Spec,
    *,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not follow.")] = False,
    wait: WaitFor = None,
    max_usd: MaxUsd = None,
    assignments: Assignments = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="NODE",
            help="On a kept node: its name, key or id, or the run that keeps it.",
            autocompletion=complete_run,
        ),
    ] = None,
    yes: Yes = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, request and bytes to send; change nothing.")
    ] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> int:
    """Create the run, start its driver, and follow it. Ctrl-C stops following; the run goes on."""
    from orchestrator.actions import kept
    from orchestrator.actions import plan as planning
    from orchestrator.actions.limits import Limits
    from orchestrator.clock import SystemClock
    from orchestrator.following import begin

    machine_reads = machine(as_json, output)
    wanted = planning.read(spec, assignments or [])
    limits = Limits.read(wait, max_usd)
    if dry_run:
        from orchestrator.actions import dryrun
        from orchestrator.render import plan as render_plan

        rehearsal = dryrun.rehearse(wanted, limits, on)
        answer(rehearsal.document(), as_json=machine_reads, human=lambda: render_plan.rehearsal(rehearsal))
        return rehearsal.plan.exit_code
    store = open_store()
    made = planning.make(store, wanted, limits, kept.find(store, on) if on is not None else None)
    if not machine_reads:
        begin.say_plan(made)
    planning.refuse(made)
    if made.rented and not confirm(made.question, yes=yes):
        tell("nothing was rented")
        return 130
    run = begin.begin(store, made, limits)
    if detach:
        begin.wait_for_driver(store.home, run, SystemClock())
        answer(
            {"run": run, "state": begin.state_of(store, run)},
            as_json=machine_reads,
            human=lambda: begin.say_detached(run),
        )
        return 0
    return begin.follow(store, run, as_json=machine_reads, cancels=True)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep.yaml.", show_default=False)],
    *,
    wait: WaitFor = None,
    yes: Yes = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the runs and what each is expected to cost; change nothing."),
    ] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> int:
    """Make many runs of one spec under one budget, on nodes that they share. The same command again carries it on."""
    from orchestrator.actions import plan as planning
    from orchestrator.clock import SystemClock
    from orchestrator.following import sweeping
    from orchestrator.render import sweep as render_sweep

    machine_reads = machine(as_json, output)
    store = planning.quiet_store() if dry_run else open_store()
    planned = sweeping.plan(store, file, wait)
    members = sweeping.Look(store, planned).members() if store is not None else []
    document = sweeping.document(planned, members)
    if dry_run:
        answer(document, as_json=machine_reads, human=lambda: render_sweep.planned(document))
        sweeping.refuse(planned, members)
        return 0
    assert store is not None
    sweeping.refuse(planned, members)
    left = len(document["left"])
    if (
        left
        and planned.plan.rented
        and not confirm(f"Make {left} runs, for at most {planned.limit_text}?", yes=yes)
    ):
        tell("nothing was rented")
        return 130
    try:
        members = sweeping.Driving(store, planned, SystemClock()).go()
    except KeyboardInterrupt:
        return sweeping.interrupted(sweeping.Look(store, planned).members())
    document = sweeping.document(planned, members)
    answer(document, as_json=machine_reads, human=lambda: render_sweep.result(store, document))
    return sweeping.exit_code(planned, members)


def resume(
    run: Run,
    *,
    max_usd: MaxUsd = None,
    wait: WaitFor = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not follow.")] = False,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> int:
    """Carry a run on: with a live driver only follow it, else re-attach to its node, or take a new one."""
    from orchestrator.actions import requests
    from orchestrator.actions.limits import Limits
    from orchestrator.clock import SystemClock
    from orchestrator.following import begin

    store = open_store()
    record = find_record(store, run)
    limits = Limits.read(wait, max_usd)
    requests.resume(store, record, SystemClock(), max_usd=limits.max_usd, wait_seconds=limits.wait_seconds)
    if detach:
        begin.wait_for_driver(store.home, record.run, SystemClock())
        document = {"run": record.run, "state": begin.state_of(store, record.run)}
        answer(document, as_json=machine(as_json, output), human=lambda: begin.say_detached(record.run))
        return 0
    return begin.follow(store, record.run, as_json=machine(as_json, output))
