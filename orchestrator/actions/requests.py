"""What a user may ask of a run: create, stop, resume, extend, cancel, remove. Each leaves an event; the driver acts on it."""

from __future__ import annotations

import json
import secrets
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.clock import Clock
from orchestrator.driver.process import driver_alive, spawn
from orchestrator.errors import CommandError, Invalid, NoSuchRun, OverBudget, Usage
from runs import events as e
from runs.rows import MICRO
from runs.store import Store, StoreError, run_dir

if TYPE_CHECKING:
    from runs.record import RunRecord
    from runs.sections import RunSpec

SILENT_SECONDS = 30.0
"""A driver whose heartbeat is older than this no longer answers."""
_LETTERS = string.ascii_lowercase + string.digits


def new_id(store: Store, name: str) -> str:
    """`NAME-xxxx`, one that no run has had. A removed run's id stays taken: its nodes and their charges carry it."""
    for _ in range(1000):
        run = f"{name}-{''.join(secrets.choice(_LETTERS) for _ in range(4))}"
        if store.last_seq(run) == 0 and not run_dir(store.home, run).exists():
            return run
    raise CommandError(f"no id is left for the name {name!r}", "choose another name")


@dataclass(frozen=True)
class Origin:
    """Where a run comes from, if not from nothing: a sweep, a node that is kept."""

    sweep: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    on: str | None = None
    """Key of the kept node that it takes over."""
    on_or_rent: bool = False


def create(
    store: Store, spec: RunSpec, *, now: datetime, wait_seconds: float = 0.0, max_usd: float | None = None,
    origin: Origin = Origin(),
) -> str:  # fmt: skip
    """Create the run: its folder, `spec.yaml`, and the event that makes it exist. Nothing is rented.

    Raises Invalid where LLMCTL_HOME cannot be written to; then there is no run.
    """
    run = new_id(store, spec.name)
    directory = run_dir(store.home, run)
    values = spec.to_dict()
    limit = max_usd if max_usd is not None else spec.budget.max_usd
    created = e.RunCreated(
        at=now,
        run=run,
        spec=values,
        steps=spec.steps,
        max_micro_usd=round(limit * MICRO) if limit is not None else None,
        max_seconds=spec.budget.max_hours * 3600 if spec.budget.max_hours is not None else None,
        wait_seconds=wait_seconds,
        **vars(origin),
    )
    try:
        directory.mkdir(parents=True)
        (directory / "spec.yaml").write_text(as_yaml(values), encoding="utf-8")
        store.commit([(e.run_stream(run), created)])
    except (OSError, StoreError) as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, StoreError):
            raise
        raise Invalid(
            f"{store.home} cannot be written to: {error.strerror}",
            "free some disk space, or set LLMCTL_HOME to a folder of yours",
        ) from error
    return run


def as_yaml(values: dict[str, object]) -> str:
    """A spec's plain values as YAML 1.2."""
    import io

    from ruamel.yaml import YAML

    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.dump(values, text)
    return text.getvalue()


def stop(store: Store, run: RunRecord, clock: Clock, *, now: bool) -> None:
    """Ask for the end of a run and see to it that somebody acts on it.

    `now` skips the checkpoint, and takes over from a driver that no longer answers.
    """
    if run.live and (run.stop is None or (now and run.stop.checkpoint)):
        request = e.StopRequested(at=clock.now(), reason="user", checkpoint=not now)
        store.commit([(e.run_stream(run.run), request)])
        # It may have ended first, and kept a node: then there is nothing to stop, and the node is to be let go.
        run = store.record(run.run) or run
    for node in run.owned:
        if run.keeps(node):
            store.commit([(e.run_stream(run.run), e.ReleaseRequested(at=clock.now(), key=node.key))])
    ensure_driver(store, run.run, clock, force_silent=now)


def ensure_driver(store: Store, run: str, clock: Clock, *, force_silent: bool = False) -> None:
    """Start a driver where none holds the lock; with `force_silent`, also in the place of one whose heartbeat stopped."""
    if not driver_alive(store.home, run):
        spawn(store.home, run)
    elif force_silent and silent_seconds(run_dir(store.home, run), clock) > SILENT_SECONDS:
        spawn(store.home, run, force=True)


def taker(home: Path, run: str, clock: Clock) -> Callable[[object], bool]:
    """For `stop --now`: while it follows, a driver that stops answering is replaced. Always True: the following goes on."""
    last = clock.monotonic()

    def look(_row: object) -> bool:
        nonlocal last
        if (
            clock.monotonic() - last > SILENT_SECONDS
            and silent_seconds(run_dir(home, run), clock) > SILENT_SECONDS
        ):
            last = clock.monotonic()
            spawn(home, run, force=True)
        return True

    return look


def silent_seconds(directory: Path, clock: Clock) -> float:
    """Seconds since the driver's last heartbeat; since the run's folder was made where there never was one."""
    path = directory / "driver.json"
    try:
        at = float(json.loads(path.read_text(encoding="utf-8"))["time"])
    except (OSError, ValueError, KeyError, TypeError):
        try:
            at = directory.stat().st_mtime
        except OSError:
            return 0.0
    return clock.now().timestamp() - at


def resume(
    store: Store, run: RunRecord, clock: Clock, *, max_usd: float | None, wait_seconds: float = 0.0
) -> None:
    """Carry a run on: re-open one that ended, or only see to its driver. Raises Usage for one that succeeded."""
    if run.outcome == "succeeded":
        raise Usage(
            f"{run.run} has succeeded: there is nothing to carry on",
            f"`llmctl launch {run_dir(store.home, run.run) / 'spec.yaml'}` starts it anew", run=run.run,
        )  # fmt: skip
    limit = round(max_usd * MICRO) if max_usd is not None else None
    if run.outcome is not None:
        _check_limits(run, clock.now(), limit)
        request = e.ResumeRequested(at=clock.now(), max_micro_usd=limit, wait_seconds=wait_seconds)
        store.commit([(e.run_stream(run.run), request)])
    elif limit is not None:
        store.commit([(e.run_stream(run.run), e.LimitsRaised(at=clock.now(), max_micro_usd=limit))])
    ensure_driver(store, run.run, clock)


def _check_limits(run: RunRecord, now: datetime, limit: int | None) -> None:
    """Refuse to resume into a budget that is used up: it would rent a node to end it."""
    from runs import charges

    spent, allowed = charges.total(run, now), limit if limit is not None else run.max_micro_usd
    if allowed is not None and spent >= allowed > 0:
        raise OverBudget(
            f"{run.run} has cost ${spent / MICRO:,.2f} of ${allowed / MICRO:,.2f}",
            f"allow it more: `llmctl resume {run.run} --max-usd {round(2 * spent / MICRO + 1)}`",
            run=run.run,
        )  # fmt: skip


def extend(
    store: Store, run: RunRecord, clock: Clock, *, max_usd: float | None, max_hours: float | None
) -> None:
    """Raise the limits of a living run; its driver passes them on to lease and node. Raises Usage."""
    if not run.live:
        raise Usage(
            f"{run.run} is over ({run.state})",
            f"`llmctl resume {run.run} --max-usd N` carries it on",
            run=run.run,
        )
    if max_usd is None and max_hours is None:
        raise Usage("neither --max-usd nor --max-hours is given", "say what to raise", run=run.run)
    micro = round(max_usd * MICRO) if max_usd is not None else None
    seconds = max_hours * 3600 if max_hours is not None else None
    if micro is not None and run.max_micro_usd is not None and micro < run.max_micro_usd:
        raise Usage(f"--max-usd {max_usd:g} is below the present ${run.max_micro_usd / MICRO:,.2f}",
                    "limits are only raised; `llmctl stop` ends the run", run=run.run)  # fmt: skip
    if seconds is not None and run.max_seconds is not None and seconds < run.max_seconds:
        raise Usage(f"--max-hours {max_hours:g} is below the present {run.max_seconds / 3600:g}",
                    "limits are only raised; `llmctl stop` ends the run", run=run.run)  # fmt: skip
    raised = e.LimitsRaised(at=clock.now(), max_micro_usd=micro, max_seconds=seconds)
    store.commit([(e.run_stream(run.run), raised)])
    ensure_driver(store, run.run, clock)


def cancel(store: Store, run: str, clock: Clock) -> None:
    """Give up a wait for capacity, before anything was rented."""
    store.commit([(e.run_stream(run), e.WaitCancelled(at=clock.now()))])


def rented(run: RunRecord) -> bool:
    """Whether anything was rented, or may have been."""
    return any(node.answer not in {"refused", "abandoned"} for node in run.nodes)


def check_removable(store: Store, run: str) -> None:
    """Raise Usage while a run lives or anything of it may bill, NoSuchRun where there is none."""
    record = store.record(run)
    if record is None:
        raise NoSuchRun(f"no run is called {run!r}", "`llmctl status` lists the runs", run=run)
    billing = [node.marker.name for node in record.owned if not node.settled]
    if billing:
        raise Usage(
            f"{run} still has {', '.join(billing)}, which may be billing",
            f"`llmctl stop {run}` releases it",
            run=run,
        )
    if record.live:
        raise Usage(f"{run} is {record.state}", f"`llmctl stop {run}` ends it first", run=run)
    if driver_alive(store.home, run):
        raise Usage(f"the driver of {run} is finishing", "try again in a few seconds", run=run)


def remove(store: Store, run: str) -> None:
    """Take a finished run out of the lists and off the disk. Its nodes' events, which are its bill, stay in the store.

    Raises as `check_removable` does.
    """
    check_removable(store, run)
    store.forget(run)
    shutil.rmtree(run_dir(store.home, run), ignore_errors=True)
