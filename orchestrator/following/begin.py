"""Beginning a run: a recipe as a file, the checks that cost nothing, the run, its driver, and following it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.actions import requests
from orchestrator.clock import Clock, SystemClock
from orchestrator.driver.process import driver_alive, spawn
from orchestrator.errors import Invalid, Usage
from orchestrator.following import attend
from orchestrator.progress import bar
from orchestrator.render import text as render
from orchestrator.render.live import Screen
from runs.store import Store, run_dir

if TYPE_CHECKING:
    from orchestrator.actions.limits import Limits
    from orchestrator.actions.plan import Plan
    from orchestrator.data.sources import DataPlan
    from runs.sections import RunSpec


# ---------------------------------------------------------------- init


def write_recipe(file: Path, recipe: str, *, force: bool) -> None:
    """Write a shipped recipe to `file`. Raises UnknownRecipe, Usage where the file exists, Invalid where it cannot be."""
    from runs import recipes

    text = recipes.text(recipe)
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise Usage(f"{file} exists already", "give another name, or --force to replace it") from None
    except OSError as error:
        raise Invalid(
            f"{file} cannot be written: {error.strerror}", "choose a folder that you can write to"
        ) from error


def say_recipe(file: Path, recipe: str) -> None:
    """What was written, and what to do with it."""
    from runs import recipes

    render.line(f"Wrote {file}: {recipes.summary(recipe)}")
    render.line(f"Next: llmctl plan {file}, then llmctl launch {file}")


# ---------------------------------------------------------------- launch


def begin(store: Store, plan: Plan, limits: Limits, origin: requests.Origin | None = None) -> str:
    """Create the run that was planned, with its data resolved before anything is rented, and start its driver.

    Raises DataError where the data cannot serve; then there is no run.
    """
    from orchestrator.data import sources

    data = resolve(store.home, plan.spec)
    run = requests.create(
        store,
        plan.spec,
        now=SystemClock().now(),
        wait_seconds=limits.wait_seconds,
        max_usd=limits.max_usd,
        origin=origin or requests.Origin(on=plan.on.key if plan.on is not None else None),
    )
    sources.save_plan(data, run_dir(store.home, run) / "data.json")
    spawn(store.home, run)
    return run


def wait_for_driver(home: Path, run: str, clock: Clock, patience: float = 10.0) -> bool:
    """Whether a driver has taken the run within `patience` seconds: so that `--detach` leaves nothing unwatched."""
    never, start = threading.Event(), clock.monotonic()
    while not (taken := driver_alive(home, run)) and clock.monotonic() - start < patience:
        clock.wait(never, 0.05)
    return taken


def state_of(store: Store, run: str) -> str:
    """The run's state as it is stored now."""
    row = store.summary(run)
    return str(row["state"]) if row else "planned"


def resolve(home: Path, spec: RunSpec) -> DataPlan:
    """The files that the run reads; built-in and text sources are tokenised now. Raises DataError, and Invalid or ProviderError
    where its checkpoints could not be pushed."""
    from orchestrator.data import buckets, needed

    buckets.check_push(spec.trainer_config())
    with bar() as progress:
        return needed.files(spec, home / "cache", progress=progress)


def say_plan(plan: Plan) -> None:
    """The plan in two lines on stderr, before the question."""
    for text in plan.lines():
        sys.stderr.write(text + "\n")


def say_detached(run: str) -> None:
    """What to do with a run that is not followed."""
    render.line(run)
    sys.stderr.write(
        f"{run} is on its way. Follow it: llmctl tail {run} · look: llmctl status · end it: llmctl stop {run}\n"
    )


def follow(store: Store, run: str, *, as_json: bool, cancels: bool = False) -> int:
    """Follow a run to its end and say what came of it: the `show` document, or a few lines. Returns the exit code."""
    from orchestrator.actions import show
    from orchestrator.actions.show import print_json
    from runs.store import utcnow

    sys.stderr.write(f"{run}: following; Ctrl-C stops following, not the run\n")
    clock: Clock = SystemClock()
    code = attend.attend(store.home, run, clock, Screen(log=not as_json), cancels=cancels)
    record = store.record(run)
    if record is None:
        return code
    if as_json:
        print_json(show.show(store, record, utcnow()))
    elif record.outcome is not None:
        from orchestrator.render import show as render_show

        render_show.ending(record, utcnow())
    return code
