"""The first look at a fresh node, before anything is sent to it: its disk, and its GPUs against those that were rented."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.data.sources import DataPlan
from orchestrator.remote.node import Remote
from runs.facts import Offer
from runs.record import NodeRecord, RunRecord
from trainer import config, reading

_ROOM = """
import json, os, shutil, sys
data = sys.argv[1]
found = [os.path.relpath(os.path.join(folder, name), data) for folder, _, names in os.walk(data) for name in names]
apart = os.path.isdir(data) and os.stat(data).st_dev != os.stat(".").st_dev
print(json.dumps({"free": shutil.disk_usage(".").free, "there": found, "apart": apart}))
"""
"""Free bytes, the shards that are there already, and whether they lie on another disk."""


class PreflightError(Exception):
    """The node is not what was rented."""


def check(remote: Remote, run: RunRecord, node: NodeRecord, data: DataPlan, folder: str) -> None:
    """Disk and GPUs against what is needed and was rented; shards go to `folder`. The CPU is never a silent fallback.

    Raises PreflightError, RemoteError.
    """
    seen = json.loads(remote.run(["python3", "-c", _ROOM, folder]).text)
    missing = sum(item.bytes or 0 for item in data.shards if item.node_name not in set(seen["there"]))
    need = disk_bytes(run) + (0 if seen["apart"] else missing)
    if seen["free"] < need:
        raise PreflightError(
            f"{seen['free'] / 2**30:.1f} GiB of disk are free, {need / 2**30:.1f} GiB are needed for checkpoints and shards"
        )
    if run.spec["train"]["device"] == "cpu":
        return
    problem = gpu_problem(node.facts.get("gpus"), node.offer)
    if problem is not None:
        raise PreflightError(problem)


def disk_bytes(run: RunRecord) -> int:
    """Bytes that the checkpoints of a run may take at once: weights and two moments in float32, keep + best + one in writing."""
    from trainer.flops import parameters

    model: config.ModelConfig = reading.from_dict(config.ModelConfig, run.spec["model"], "model.")
    return 12 * parameters(model) * (int(run.spec["checkpoint"]["keep"]) + 2)


def gpu_problem(gpus: object, offer: Offer) -> str | None:
    """Why the GPUs that the probe saw are not those of the offer, or None. `gpus`: [{name, memory_mib, used_mib, celsius}]."""
    if not isinstance(gpus, list) or not gpus:
        return "nvidia-smi shows no GPU, and train.device is cuda"
    if offer.gpus and len(gpus) < offer.gpus:
        return f"{len(gpus)} GPUs are there, {offer.gpus} were rented"
    for index, gpu in enumerate(gpus):
        if gpu["used_mib"] > 500:
            return f"GPU {index} is in use: {gpu['used_mib']} MiB are taken before the run has begun"
        if gpu["celsius"] >= 60:
            return f"GPU {index} has {gpu['celsius']} °C without work: it would run throttled"
    return _memory_problem(gpus, offer)


def _memory_problem(gpus: list[dict[str, Any]], offer: Offer) -> str | None:
    from trainer.gpus import GPUS

    known = GPUS.get(offer.gpu or "")
    least = min(gpu["memory_mib"] for gpu in gpus)
    # Boards report a little less than the name says (ECC, reserved pages).
    if known is not None and least / 1024 < 0.9 * known.memory_gib:
        return f"a GPU has {least / 1024:.0f} GiB, {offer.gpu} has {known.memory_gib:g}"
    return None
