"""Many schedules: run, report the first that fails with its history, and shrink it."""

from __future__ import annotations

import gc
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from .engine import Ground, Schedule
from .plan import Plan, make

A_STORE = 100
"""Schedules that share a store."""


@dataclass(frozen=True)
class Failure:
    """A schedule that broke an invariant."""

    plan: Plan
    error: str
    history: tuple[str, ...]

    def __str__(self) -> str:
        faults = "\n".join(f"    {fault}" for fault in self.plan.faults)
        return f"seed {self.plan.seed}: {self.error}\n  {self.plan}\n  faults:\n{faults}\n" + "\n".join(
            f"  {line}" for line in self.history[-120:]
        )


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is such a thing."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="llmctl-simulation-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def ground() -> Iterator[Ground]:
    """A fresh store for some schedules."""
    with scratch() as home:
        shared = Ground(home)
        try:
            yield shared
        finally:
            shared.close()


def try_plan(plan: Plan, shared: Ground) -> tuple[Failure | None, int]:
    """The failure of one schedule, if any, and the places that it passed."""
    schedule = Schedule(plan, shared)
    try:
        schedule.go()
    except Exception as error:  # noqa: BLE001 - whatever a schedule raises is its finding
        told = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(told.filename).name}:{told.lineno}"
        return Failure(
            plan, f"{type(error).__name__}: {error} ({where})", tuple(schedule.history)
        ), schedule.passages
    return None, schedule.passages


def shrink(failure: Failure) -> Failure:
    """The same failure with as few faults as can be, each left out in turn."""
    smallest, kind = failure, failure.error[:24]
    again = True
    while again:
        again = False
        for fault in smallest.plan.faults:
            with ground() as shared:
                smaller, _ = try_plan(smallest.plan.without(fault), shared)
            if smaller is not None and smaller.error[:24] == kind:
                smallest, again = smaller, True
                break
    return smallest


def batch(seeds: Sequence[int]) -> tuple[int, Failure | None]:
    """Run the schedules of some seeds in one store; how many were run, and the first failure."""
    gc.disable()  # a batch is short, and makes no garbage to speak of
    try:
        with ground() as shared:
            for count, seed in enumerate(seeds):
                failure, _ = try_plan(make(seed), shared)
                if failure is not None:
                    return count + 1, failure
    finally:
        gc.enable()
        gc.collect()
    return len(seeds), None


def campaign(
    schedules: int, seed: int, *, skip: int = 0, processes: int = 2, smallest: bool = True
) -> tuple[int, Failure | None]:
    """Run many schedules, those of `seed` after the first `skip`; how many were run, and the first failure, shrunk unless
    `smallest` is false."""
    first = seed * 10_000_019 + skip
    batches = [
        range(start, min(start + A_STORE, first + schedules))
        for start in range(first, first + schedules, A_STORE)
    ]
    done, failure = 0, None
    if processes == 1:
        for seeds in batches:
            count, failure = batch(seeds)
            done += count
            if failure is not None:
                break
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
            for count, failure in pool.map(batch, batches):
                done += count
                if failure is not None:
                    pool.shutdown(cancel_futures=True)
                    break
    return done, shrink(failure) if failure is not None and smallest else failure


def every_place(plan: Plan) -> tuple[int, Failure | None]:
    """One schedule again and again, with a crash at each place that it passes; how many there were, and a failure."""
    with ground() as shared:
        failure, places = try_plan(plan, shared)
        for place in range(places):
            if failure is not None:
                break
            failure, _ = try_plan(replace(plan, crash_at=place), shared)
    return places, failure
