"""What a run's spec and record say about its limits: how long, how much, how many processes, which checkpoints. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from runs import charges
from runs.record import AttemptRecord, CheckpointRecord, RunRecord

ENVIRONMENT_GIB = 20
"""What an isolated environment with torch takes, rounded up generously."""
COLLECT_RESERVE_SECONDS = 120.0
"""Paid time kept back for the last checkpoint and its transfer, when budget or deadline end a run."""
LARGE_BYTES = 256 * 2**20
"""Above this a finished run brings home the weights alone: the optimizer's state would only be paid for."""


def hardware(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's hardware section as providers take it: with `disk_gib`, what a volume must hold besides the image."""
    from trainer import config, reading
    from trainer.flops import parameters

    section = dict(spec["hardware"])
    if not {"model", "checkpoint", "train"} <= set(spec):
        return section
    model: config.ModelConfig = reading.from_dict(config.ModelConfig, spec["model"], "model.")
    train = spec["train"]
    sequences = int(train.get("global_batch_size") or 1) * int(train.get("steps") or 0)
    tokens = int(train.get("tokens") or 0) or sequences * model.context_length
    # Weights and two moments in float32, for keep + best + one in writing; tokens of two bytes, in whole shards of 100 million.
    held = 12 * parameters(model) * (int(spec["checkpoint"].get("keep") or 1) + 2) + 2 * (tokens + 10**8)
    return {**section, "disk_gib": ENVIRONMENT_GIB + math.ceil(held / 2**30)}


def deadline(run: RunRecord) -> datetime | None:
    """When the run's time is over: `max_hours` after the first attempt since its creation or last resume began. None
    without a limit, or before."""
    started = next((item.started_at for item in run.recent_attempts if item.keys), None)
    if started is None or run.max_seconds is None:
        return None
    return started + timedelta(seconds=run.max_seconds)


def ends(run: RunRecord, now: datetime) -> datetime | None:
    """When the run's time or its money is used up at the present rate, whichever comes first: the node's own deadline, and its lease.
    None without a limit, or before anything was rented."""
    end, speed = deadline(run), charges.rate(run)
    if not run.max_micro_usd or not speed:
        return end
    lasts = now + timedelta(hours=max(0, run.max_micro_usd - charges.accrued(run, now)) / speed)
    lasts = lasts.replace(microsecond=0)  # the rounding of money is no later end
    return min(end, lasts) if end is not None else lasts


def grace_seconds(run: RunRecord) -> float:
    """How long before its own deadline a node asks the trainer to end: a minute, or half of what the driver keeps back, who so
    comes first where there is one."""
    speed = charges.rate(run)
    lasts = run.max_micro_usd * 3600 / speed if run.max_micro_usd and speed else None
    shares = [seconds / 20 for seconds in (run.max_seconds, lasts) if seconds]
    return min([COLLECT_RESERVE_SECONDS / 2, *shares])


def reserve_seconds(run: RunRecord) -> float:
    """Time kept back for collecting before the deadline: two minutes, or a tenth of a short run."""
    return min(COLLECT_RESERVE_SECONDS, (run.max_seconds or 0) / 10)


def seconds_left(run: RunRecord, now: datetime, *, reserve: bool) -> tuple[float, str] | None:
    """Seconds until the nearer of deadline and budget is reached, and which it is; None without either.

    With `reserve`, until just enough is left for collecting. Infinite where nothing bills yet.
    """
    limits: list[tuple[float, str]] = []
    end = deadline(run)
    if end is not None:
        kept = reserve_seconds(run) if reserve else 0.0
        limits.append(((end - now).total_seconds() - kept, "deadline"))
    if run.max_micro_usd:
        speed = charges.rate(run)
        spared = min(round(speed * COLLECT_RESERVE_SECONDS / 3600), run.max_micro_usd // 10) if reserve else 0
        left = run.max_micro_usd - spared - charges.total(run, now)
        limits.append((0.0 if left <= 0 else left * 3600 / speed if speed else math.inf, "budget"))
    return min(limits, default=None)


def no_time_left(run: RunRecord, now: datetime) -> bool:
    """Not even collecting may go on: the budget or the lease is used up."""
    left = seconds_left(run, now, reserve=False)
    return left is not None and left[0] <= 0


def kept_until(run: RunRecord, now: datetime, seconds: float) -> datetime:
    """Until when a node may be kept after the run: `seconds`, and no longer than budget and lease allow."""
    left = seconds_left(run, now, reserve=True)
    return now + timedelta(seconds=min(seconds, left[0] if left is not None else math.inf))


def wanted(run: RunRecord, attempt: AttemptRecord) -> tuple[int, ...]:
    """Steps whose checkpoints must be here before the node may go: the spec's on success, else the newest."""
    fetch = run.spec["checkpoint"]["fetch"] if attempt.trainer_end == "finished" else "latest"
    chosen: dict[str, list[CheckpointRecord | None]] = {
        "none": [],
        "latest": [run.latest],
        "best": [run.best],
        "all": list(run.available),
    }
    return tuple(item.step for item in chosen[fetch] if item is not None)


def large(run: RunRecord, steps: tuple[int, ...]) -> bool:
    """Whether those checkpoints are so big that only their weights are worth waiting for."""
    return sum(run.checkpoints[step].bytes for step in steps) > LARGE_BYTES


def world_size(run: RunRecord, gpus: int) -> int:
    """Processes on one node: as the spec says, else one per GPU, on the CPU one."""
    train = run.spec["train"]
    return int(train.get("processes_per_node") or (max(1, gpus) if train["device"] == "cuda" else 1))


def lease_end(run: RunRecord, now: datetime) -> datetime:
    """When a node that is launched now must be gone: the run's deadline, or when its money would be used up if billing began at once;
    a day where the spec sets neither. It is extended as the boot takes its unpaid time."""
    limits = [deadline(run) or now + timedelta(days=1)]
    attempt = run.attempt
    speed = attempt.offer.tariff.micro_usd_per_hour * len(attempt.keys) if attempt is not None else 0
    if run.max_micro_usd and speed:
        left = max(0, run.max_micro_usd - charges.accrued(run, now))
        limits.append(now + timedelta(hours=left / speed))
    return min(limits)
