"""The driver process: what `llmctl internal-driver RUN` does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.clock import Clock, SystemClock
from orchestrator.data import needed, sources
from orchestrator.data.buckets import objects_for
from orchestrator.driver.awake import inhibit_sleep
from orchestrator.driver.loop import Driver, drive, take_over, write_heartbeat
from orchestrator.driver.sinks import Notify, Wandb
from orchestrator.life.effects import Hands
from orchestrator.remote.access import Access
from orchestrator.site import collect, fetch, prepare
from orchestrator.site.nodes import NodeSite
from provisioning import open_provider
from provisioning.base import Home, ProviderError
from runs import spec as specs
from runs.record import RunRecord
from runs.sections import RunSpec
from runs.store import Store, run_dir

BEAT_SECONDS = 5.0
"""How often a driver that waits for its turn says so."""


def main(home: Path, run: str, *, force: bool = False) -> int:
    """Drive `run` until nothing is left to do. 0 also where another driver has it."""
    clock = SystemClock()
    store = Store(home)
    record = store.record(run)
    if record is None:
        say(f"no such run: {run}")
        return 102
    taken = take_over(store, run, clock, force=force)
    if taken is None:
        say("another driver has this run")
        return 0
    lock, epoch = taken
    say(f"driving as epoch {epoch}, pid {os.getpid()}")
    wake = threading.Event()
    _end_on_signal()
    heart = run_dir(home, run) / "driver.json"
    site, driver, sinks = build(store, record, clock, wake, epoch, patient(heart, clock))

    def beat(why: str) -> None:
        sight, at = driver.hands.sight, clock.now().timestamp()
        why = f"{why}; {sight.free}" if sight.free else why
        write_heartbeat(heart, why, sight.complaint, at, driver.stake)

    try:
        with inhibit_sleep(f"llmctl drives {run}"):
            drive(driver, wake, say, beat)
        _finish(store, run, sinks)
    finally:
        site.close()
        lock.release()
    return 0


def patient(heart: Path, clock: Clock) -> Callable[[float], None]:
    """A sleep that shows that its driver lives: many runs share one provider's pace, and a turn there may take minutes."""

    never = threading.Event()

    def sleep(seconds: float) -> None:
        end = clock.monotonic() + seconds
        while (left := end - clock.monotonic()) > 0:
            write_heartbeat(heart, "waiting for a turn at the provider", None, clock.now().timestamp())
            clock.wait(never, min(left, BEAT_SECONDS))

    return sleep


def build(  # noqa: PLR0917
    store: Store,
    record: RunRecord,
    clock: Clock,
    wake: threading.Event,
    epoch: int,
    sleep: Callable[[float], None],
) -> tuple[NodeSite, Driver, tuple[Wandb, Notify]]:
    """Everything that drives one run."""
    home, run = Home(store.home, store.owner, sleep), record.run
    spec = specs.from_dict(dict(record.spec), "the stored spec")
    hardware = {**record.spec["hardware"], "self_terminate": spec.node.self_terminate}
    provider = open_provider(record.provider, home, hardware)
    plan = replace(plan_of(home.path, run, spec), cache=provider.traits.cache)
    try:
        recovered = fetch.recover(store, record)
    except (ProviderError, collect.VerificationError, OSError) as error:
        say(f"S3 could not be asked for a newer checkpoint: {error}")
    else:
        if recovered is not None:
            say(f"step {recovered} came from S3: the run goes on from there")
    access = Access(home, hardware, provider.traits)
    site = NodeSite(home.path, run, clock, wake.set, address=access.address, plan=plan)
    hands = Hands(store, provider, site, clock, run, epoch, access.request)
    directory = run_dir(home.path, run)
    sinks = Wandb(record, directory, say), Notify(spec.notify, directory, say)
    return site, Driver(run, hands, list(sinks)), sinks


def plan_of(home: Path, run: str, spec: RunSpec) -> prepare.Plan:
    """What will be sent, from the spec: tokenised, hashed and listed before a node is rented."""
    objects = objects_for(spec.trainer_config())
    data = sources.load_plan(run_dir(home, run) / "data.json")
    if data is None:
        data = needed.files(spec, home / "cache")
        sources.save_plan(data, run_dir(home, run) / "data.json")
    return prepare.Plan(
        home,
        data,
        spec.trainer_config(),
        prepare.trainer_path(spec.to_dict()),
        prepare.secret_values(spec.node.secrets),
        objects,
        spec,
    )


def _finish(store: Store, run: str, sinks: tuple[Wandb, Notify]) -> None:
    record = store.record(run)
    if record is not None:
        wandb, notify = sinks
        wandb.finish(record)
        notify.close()


def say(text: str) -> None:
    """A line in driver.log. Lost where the disk is full: that must not end the driver."""
    from datetime import UTC, datetime

    with suppress(OSError):
        sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}Z [{os.getpid()}] {text}\n")
        sys.stdout.flush()


def _end_on_signal() -> None:
    """SIGTERM ends the driver at once: being killed is its ordinary way to end."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    handler: Callable[[int, FrameType | None], Any] = end
    signal.signal(signal.SIGTERM, handler)
    with suppress(AttributeError):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
