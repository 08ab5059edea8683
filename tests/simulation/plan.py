"""A schedule: what the world is like, and which faults happen in it. Everything is drawn from the seed before it starts."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

NODE_FAULTS = ("terminated", "preempted", "vanished", "unhealthy", "reboot", "supervisor-dies", "cut", "trainer-failed",
               "trainer-interrupted", "never-boots", "host-key", "preflight", "no-echo", "late-echo")  # fmt: skip
CALL_FAULTS = {
    "launch": ("capacity", "refused", "lost", "ambiguous", "late"),
    "terminate": ("lie", "refused", "ambiguous", "lost"),
    "inventory": ("unavailable",),
    "find": ("unavailable",),
    "offers": ("unavailable",),
    "billing_evidence": ("unavailable",),
    "extend": ("ambiguous",),
    "prepare": ("fails", "fatal"),
    "collect": ("fails",),
    "pull": ("fails",),
}
USER_ACTIONS = ("stop", "stop-now", "extend", "cancel", "resume")
CRASH_PLACES = ("commit", "launch", "terminate", "inventory", "find", "offers", "observe", "billing_evidence", "prepare", "start", "stop",
                "collect", "committed", "take-over", "extend")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, or one thing that the user does."""

    kind: str
    """call | node | crash | user | blackout"""
    what: str
    """call: `METHOD:FAULT`; crash: `PLACE<` (before) or `PLACE>` (after); else the fault itself."""
    nth: int = 0
    """Which call, node or passage."""
    at: float = 0.0
    """Seconds: of the schedule (user, blackout), of the node's life (node)."""
    seconds: float = 0.0
    """How long it lasts, or how long the next driver lets itself wait (crash)."""


@dataclass(frozen=True)
class Plan:
    """One schedule."""

    seed: int
    faults: tuple[Fault, ...] = ()
    steps: int = 40
    every: int = 10
    step_seconds: float = 5.0
    boot_seconds: float = 45.0
    ssh_seconds: float = 10.0
    prepare_seconds: float = 30.0
    collect_seconds: float = 12.0
    pull_seconds: float = 8.0
    terminate_seconds: float = 12.0
    vanish_seconds: float = 30.0
    lag_seconds: float = 0.0
    """How old the provider's lists are."""
    granularity_seconds: int = 60
    minimum_seconds: int = 0
    micro_usd_per_hour: int = 12_000_000
    max_micro_usd: int | None = 30_000_000
    max_seconds: float | None = 6 * 3600.0
    wait_seconds: float = 0.0
    offers: int = 2
    nodes: int = 1
    on_finish: str = "terminate"
    fetch: str = "latest"
    keep: int = 100
    """Checkpoints that a node keeps; those before them are let go, fetched or not."""
    max_restarts: int = 3
    audit: str = "none"
    """The provider's log of lives: none | honest | forbidden | skewed (by a clock that is wrong)"""
    audit_lag_seconds: float = 0.0
    late_seconds: float = 150.0
    """How late a launch that nobody was told of appears."""
    neighbour: bool = False
    """After the end another run's driver looks, before the own run's does."""
    crash_at: int | None = None
    """Crash at this passage, counted over all places: for going through them one by one."""
    stop_at: int | None = None
    """The user asks for the run's end at this passage."""
    claim_at: int | None = None
    """Another run wants the node that is kept, from this passage on after the first run's training began."""
    claim_finish: str = "terminate"
    """What that run does with it afterwards."""

    def without(self, *faults: Fault) -> Plan:
        """The same world with fewer faults."""
        return replace(self, faults=tuple(item for item in self.faults if item not in faults))


def _world(rng: random.Random) -> dict[str, Any]:
    return {
        "steps": rng.choice((10, 25, 40)),
        "every": rng.choice((5, 10, 20)),
        "step_seconds": rng.choice((2.0, 6.0)),
        "boot_seconds": rng.choice((0.0, 20.0, 60.0)),
        "ssh_seconds": rng.choice((0.0, 15.0)),
        "prepare_seconds": rng.choice((3.0, 40.0)),
        "collect_seconds": rng.choice((2.0, 30.0)),
        "pull_seconds": rng.choice((2.0, 25.0)),
        "terminate_seconds": rng.choice((0.0, 8.0, 40.0)),
        "vanish_seconds": rng.choice((0.0, 30.0, 1e9)),
        "lag_seconds": rng.choice((0.0, 0.0, 5.0, 20.0)),
        "granularity_seconds": rng.choice((1, 60)),
        "minimum_seconds": rng.choice((0, 60)),
        "max_micro_usd": rng.choice((None, 200_000, 600_000, 30_000_000)),
        "max_seconds": rng.choice((None, 240.0, 900.0, 6 * 3600.0)),
        "wait_seconds": rng.choice((0.0, 0.0, 600.0)),
        "offers": rng.choice((1, 2, 3)),
        "nodes": rng.choice((1, 1, 1, 1, 2)),
        "on_finish": rng.choice(("terminate", "terminate", "terminate", "keep", "3m")),
        "fetch": rng.choice(("latest", "best", "all", "none")),
        "max_restarts": rng.choice((0, 3)),
        "claim_at": rng.choice((None, rng.randrange(120))),
        "claim_finish": rng.choice(("terminate", "keep", "3m")),
        "audit": rng.choice(("none", "none", "none", "honest", "forbidden", "skewed")),
        "audit_lag_seconds": rng.choice((0.0, 12.0, 1e9)),
        "late_seconds": rng.choice((150.0, 150.0, 900.0)),
        "neighbour": rng.choice((False, True)),
        "keep": rng.choice((1, 2, 100)),
    }


def _fault(rng: random.Random) -> Fault:
    kind = rng.choices(("crash", "call", "node", "user", "blackout"), (5, 4, 4, 2, 1))[0]
    if kind == "crash":
        place = rng.choice(CRASH_PLACES)
        nth = rng.randrange(40) if place in {"commit", "observe"} else rng.randrange(4)
        return Fault("crash", place + rng.choice("<>"), nth, seconds=rng.choice((0.5, 20.0, 100.0, 1500.0)))
    if kind == "call":
        method = rng.choice(("launch", "launch", "terminate", "terminate", *CALL_FAULTS))
        what = f"{method}:{rng.choice(CALL_FAULTS[method])}"
        return Fault("call", what, rng.randrange(6) if method == "inventory" else rng.randrange(3),
                     seconds=rng.choice((20.0, 150.0)))  # fmt: skip
    if kind == "node":
        return Fault("node", rng.choice(NODE_FAULTS), rng.randrange(2), at=rng.uniform(0.0, 250.0),
                     seconds=rng.choice((30.0, 300.0, 4000.0)))  # fmt: skip
    if kind == "user":
        return Fault(
            "user", rng.choice(USER_ACTIONS), at=rng.choice((rng.uniform(0.0, 90.0), rng.uniform(0.0, 400.0)))
        )
    return Fault("blackout", "provider", at=rng.uniform(0.0, 400.0), seconds=rng.choice((20.0, 200.0)))


def make(seed: int) -> Plan:
    """The schedule of a seed."""
    rng = random.Random(seed)
    faults = tuple(_fault(rng) for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 6))))
    if any(fault.what in {"stop", "stop-now", "cancel"} for fault in faults) and rng.random() < 0.5:
        faults += (Fault("user", "resume", at=rng.uniform(300.0, 1500.0)),)
    return Plan(seed, faults, **_world(rng))
