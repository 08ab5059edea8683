"""The projection row of a run: what `status`, `compare` and completion read, as plain JSON values.

Written with each commit; printed by `runs.rows`, which imports nothing heavy. What moves with time alone (the dollars of a
node that bills now) is stored as (start, rate) and finished there.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from runs import charges, tuning
from runs.record import NodeRecord, RunRecord
from runs.rows import usd

GPU_FIGURES = ("gpu_utilisation", "gpu_memory_gib", "gpu_celsius", "gpu_watts")
"""Means over the GPUs of the first node and its trainer's last minute, as nvidia-smi tells them there."""


def summarise(run: RunRecord, now: datetime | None = None) -> dict[str, Any]:
    """Plain JSON values of a run at `now` (the store: when its newest event was): identity, state, hardware, progress, money."""
    now = now or run.ended_at or datetime.now(UTC)
    totals = charges.totals(run, now)
    spec, summary = run.spec, run.summary
    attempt = next((item for item in reversed(run.attempts) if item.keys), None)
    offer = attempt.offer if attempt else None
    train = spec.get("train", {})
    return {
        "run": run.run,
        "name": run.name,
        "state": run.state,
        "reason": run.reason or _why(run),
        "outcome": run.outcome,
        "provider": run.provider,
        "sweep": run.sweep,
        "overrides": dict(run.overrides),
        "created": run.created_at.isoformat(),
        "ended": run.ended_at.isoformat() if run.ended_at else None,
        "started": _iso(next((item.started_at for item in run.attempts if item.keys), None)),
        "instance_type": offer.instance_type if offer else None,
        "region": offer.region if offer else None,
        "gpu": offer.gpu if offer else None,
        "gpus": offer.gpus * len(attempt.keys) if offer and attempt else None,
        "world_size": attempt.world_size if attempt else None,
        "steps": run.steps,
        "step": summary.get("step", 0),
        "tokens": summary.get("tokens"),
        "epochs": summary.get("epochs"),
        "parameters": summary.get("parameters"),
        "global_batch_size": train.get("global_batch_size"),
        "microbatch_size": summary.get("microbatch_size") or (attempt.microbatch_size if attempt else None),
        "loss": summary.get("loss"),
        "train_loss": summary.get("train_loss"),
        "validation_loss": summary.get("validation_loss"),
        "validation_set": validation_set(spec),
        "evaluations": [dict(item) for item in run.evaluations],
        "tokens_per_second": summary.get("tokens_per_second"),
        "step_seconds": summary.get("step_seconds"),
        "mfu": summary.get("mfu"),
        "memory_gib": summary.get("memory_gib"),
        **{name: summary.get(name) for name in GPU_FIGURES},
        "versions": summary.get("versions"),
        "seed": train.get("seed"),
        "max_usd": usd(run.max_micro_usd) if run.max_micro_usd is not None else None,
        "max_hours": run.max_seconds / 3600 if run.max_seconds else None,
        "driver": {"pid": run.driver_pid, "start_time": run.driver_start_time, "boot_id": run.driver_boot_id},
        "nodes": [_node(run, node, now) for node in run.nodes],
        "micro_usd": totals.micro_usd,
        "final": totals.final,
        "training_micro_usd": totals.training_micro_usd,
        "training_seconds": totals.training_seconds,
        "billed_seconds": totals.billed_seconds,
        "overhead_fraction": totals.overhead_fraction,
        "phases": {phase: usd(amount) for phase, amount in totals.by_phase.items()},
        "projected": now.timestamp(),
        "checkpoints": len(run.checkpoints),
        "best_step": run.best.step if run.best else None,
    }


def _why(run: RunRecord) -> str | None:
    """What a live run waits for, in a few words."""
    if run.stop is not None:
        return f"stopping: {run.stop.reason}"
    if run.attempt is None and run.refusals and run.state == "waiting":
        return "no capacity so far"
    return None


def _node(run: RunRecord, node: NodeRecord, now: datetime) -> dict[str, Any]:
    """One node as this run sees it: settled, where another run has claimed it."""
    mine = node.run == run.run
    bill, whole = charges.node_share(node, run.run, now), charges.node_bill(node, now)
    rate = node.micro_usd_per_hour or node.offer.tariff.micro_usd_per_hour
    return {
        "key": node.key,
        "id": node.id,
        "name": node.marker.name,
        "provider": node.provider,
        "instance_type": node.offer.instance_type,
        "region": node.offer.region,
        "ip": node.ip,
        "status": _status(node) if mine else f"with {node.run}",
        "usd_per_hour": usd(rate),
        "unsettled": mine and not node.settled,
        "unguarded": node.unguarded,
        "kept": mine and run.keeps(node),
        "kept_until": _iso(node.kept_until) if mine else None,
        "billing_from": whole.start.timestamp()
        if whole and bill and not bill.final and not node.settled
        else None,
        "before_micro_usd": whole.micro_usd - bill.micro_usd if whole and bill and mine else 0,
        "granularity_seconds": node.offer.tariff.granularity_seconds,
        "minimum_seconds": node.offer.tariff.minimum_seconds,
        "micro_usd": bill.micro_usd if bill else 0,
        "lease_end": node.marker.lease_end.isoformat(),
        "terminate_unconfirmed": mine and node.terminate_tries > 0 and not node.settled,
        "terminate_tries": node.terminate_tries if mine else 0,
    }


def _status(node: NodeRecord) -> str:
    if node.gone_at is not None:
        return "gone"
    if node.answer in {"refused", "abandoned"}:
        return node.answer
    if node.terminate_intended_at is not None:
        return "terminating"
    if node.answer != "known":
        return "launching"
    return node.status or "booting"


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None


def validation_set(spec: Any) -> str | None:
    """A name for what a validation loss was measured on: the sources, tokenizer and token count, so that only equals meet."""
    if spec.get("tune"):
        examples = tuning.validation_set(spec["tune"])
        return f"examples-{_short(examples)}" if examples else None
    data, train = spec.get("data", {}), spec.get("train", {})
    if not data.get("validation"):
        return None
    what = [
        data["validation"],
        data.get("tokenizer"),
        train.get("validation_tokens"),
        spec.get("model", {}).get("context_length"),
    ]
    return f"validation-{_short(what)}"


def _short(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
