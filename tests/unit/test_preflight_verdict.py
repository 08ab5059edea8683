"""What a fresh node must be before the run is trusted to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.sources import DataPlan, Shard
from orchestrator.remote.connection import Result
from orchestrator.site import preflight
from orchestrator.site.preflight import gpu_problem
from runs.facts import Offer, Tariff
from tests.seeds import Seed

OFFER = Offer(
    provider="lambda",
    instance_type="gpu_8x_h100_sxm5",
    region="us-west-1",
    gpu="H100-80GB",
    gpus=8,
    tariff=Tariff(micro_usd_per_hour=31_920_000),
)


def cards(count: int = 8, **odd: Any) -> list[dict[str, Any]]:
    """H100s as nvidia-smi tells of them, the last one with `odd`."""
    good = {
        "name": "NVIDIA H100 80GB HBM3",
        "memory_mib": 81559,
        "used_mib": 1,
        "celsius": 31,
        "driver": "580.95",
    }
    return [dict(good) for _ in range(count - 1)] + [good | odd]


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (cards(), None),
        ([], "no GPU"),
        (None, "no GPU"),
        (cards(7), "7 GPUs are there, 8 were rented"),
        (cards(memory_mib=40960), "40 GiB, H100-80GB has 80"),
        (cards(used_mib=2048), "GPU 7 is in use"),
        (cards(celsius=71), "GPU 7 has 71 °C without work"),
    ],
)
def test_the_gpus_are_those_that_were_rented_idle_and_cool(gpus: object, words: str | None) -> None:
    problem = gpu_problem(gpus, OFFER)
    assert problem is None if words is None else words in str(problem)


class Node:
    """A node with so much room, and these shards."""

    def __init__(self, free: int, *there: str, apart: bool = False) -> None:
        self.told = json.dumps({"free": free, "there": there, "apart": apart}).encode()

    def run(self, _command: list[str]) -> Result:
        return Result(self.told, b"", 0)


def test_the_disk_must_hold_checkpoints_and_the_shards_that_are_not_there_yet(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented()
    node = seed.record.nodes[0]
    shards = tuple(
        Shard(name, "s3", None, f"s3://b/{name}", None, "0" * 64, 10**9, None, name)
        for name in ("a.bin", "b.bin")
    )
    data = DataPlan(train=shards, validation=(), test_sets=())
    need = preflight.disk_bytes(seed.record) + 2 * 10**9

    def look(free: int, *there: str, apart: bool = False) -> None:
        preflight.check(Node(free, *there, apart=apart), seed.record, node, data, "data")  # type: ignore[arg-type]

    look(need)
    look(need - 10**9, "a.bin")
    look(need - 2 * 10**9, apart=True)
    for short in ((need - 1,), (need - 10**9 - 1, "a.bin")):
        with pytest.raises(preflight.PreflightError, match="needed for checkpoints and shards"):
            look(*short)
