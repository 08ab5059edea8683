"""Stored projection rows as they are printed: the standard library only, so that `status` and completion start at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

MICRO = 1_000_000
LIVE: frozenset[str] = frozenset(
    {"planned", "waiting", "booting", "preparing", "training", "collecting", "releasing"}
)
"""States in which a run should have a driver."""
UNREADABLE = "unreadable"
"""In place of a state: neither the row of the run nor its events can be read, so that its dollars are not known."""


SEED, TUNE_SEED = "train.seed", "tune.train.seed"
"""The key of a run's seed: of pretraining, of tuning."""


def seed_of(overrides: Mapping[str, Any]) -> Any:
    """The seed that a sweep chose for a run; None where it chose none."""
    return overrides.get(SEED, overrides.get(TUNE_SEED))


def label(overrides: Mapping[str, Any]) -> str:
    """The variant of a sweep's run: its overrides but the seed, so that repetitions have one label."""
    varied = {key: value for key, value in overrides.items() if key not in {SEED, TUNE_SEED}}
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in varied.items())


def usd(micro_usd: int) -> float:
    """Micro-dollars as a JSON number of dollars, rounded once."""
    return round(micro_usd / MICRO, 6)


def billing(node: dict[str, Any]) -> bool:
    """The node may be costing money now."""
    return bool(node["unsettled"] and node["billing_from"] is not None)


def cost_now(row: Mapping[str, Any], now: float | None = None) -> int:
    """Micro-dollars of a stored row at `now` (POSIX seconds): the settled part, and the meters that still run."""
    now = time.time() if now is None else now
    micro = 0
    for node in row["nodes"]:
        if node["billing_from"] is None:
            micro += node["micro_usd"]
            continue
        seconds = max(0.0, now - node["billing_from"], node["minimum_seconds"])
        grain = node["granularity_seconds"]
        if grain > 1:
            seconds = -(-seconds // grain) * grain
        whole = round(
            seconds * round(node["usd_per_hour"] * MICRO) / 3600
        )  # whole micro-dollars, as `charges.price` has them
        micro += max(node["micro_usd"], whole - node.get("before_micro_usd", 0))
    return micro


def status_document(row: dict[str, Any], *, driver_alive: bool, now: float | None = None) -> dict[str, Any]:
    """One element of `status --json`."""
    live = row["state"] in LIVE
    rate = sum(node["usd_per_hour"] for node in row["nodes"] if billing(node))
    left = row["steps"] - (row["step"] or 0)
    eta = left * row["step_seconds"] if live and row["step_seconds"] and row["state"] == "training" else None
    return {
        **{key: row[key] for key in ("run", "name", "state", "reason", "provider", "instance_type")},
        "nodes": [
            {
                **{key: node[key] for key in ("id", "name", "ip", "status", "usd_per_hour")},
                "billing": billing(node),
            }
            for node in row["nodes"]
        ],
        **{key: row[key] for key in ("step", "steps", "loss", "validation_loss", "tokens_per_second")},
        "cost_usd": usd(cost_now(row, now)) if row["state"] != UNREADABLE else None,
        "usd_per_hour": rate,
        "eta_seconds": round(eta) if eta is not None else None,
        "driver": driver_alive,
    }
