"""`torchrun … -m trainer preflight`: can every process use its GPU, and do they talk to each other fast enough?

Run on a node, and over all nodes of a run where there are several, before the first training step. Prints one JSON document on rank 0 and exits with 0, or with 6 where a
check fails: the node is not what was rented.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

FLOOR_BYTES_PER_SECOND = 4e9
"""Bus bandwidth of the all-reduce below which GPUs of one node are not connected as they should be: half of what PCIe 4.0 x8
gives; NVLink gives hundreds of gigabytes."""
BUFFER_BYTES = 64 * 2**20
CPU_BUFFER_BYTES = 4 * 2**20
"""Of a test without GPUs, whose links are a hundred times as slow."""
ROUNDS = 5
SLOW_SECONDS = 0.5
"""A round that takes longer is the last one: any floor is broken by then."""
BETWEEN_NODES = {"cuda": 5e8, "cpu": 1e7}
"""The floor over several nodes. cuda: half of what a 10 Gbit/s network gives; below it the exchange of gradients takes longer than
the steps of any model worth several nodes. cpu: a tenth of a gigabit."""


def check(device: str, floor: float) -> dict[str, Any]:
    """Allocate, multiply and all-reduce on every rank; the same document on all of them. Raises RuntimeError with the reason."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"rank {rank}: torch {torch.__version__} cannot use a GPU here (CUDA build {torch.version.cuda})"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=120))
    try:
        where = torch.device(device, local) if device == "cuda" else torch.device("cpu")
        _multiply(where)
        bandwidth = _all_reduce(where, world)
    finally:
        dist.destroy_process_group()
    if world > 1 and bandwidth < floor:
        raise RuntimeError(
            f"all-reduce over {world} processes moves {bandwidth / 1e9:.3g} GB/s, at least {floor / 1e9:g} are expected"
        )
    return {
        "world_size": world,
        "device": device,
        "torch": torch.__version__,
        "bus_bytes_per_second": round(bandwidth),
    }


def _multiply(where: torch.device) -> None:
    """A matrix product whose result is known: each entry of ones(n, n) @ ones(n, n) is n."""
    ones = torch.ones(512, 512, device=where)
    if not bool(torch.all(ones @ ones == 512)):
        raise RuntimeError(f"{where} multiplies wrongly")


def _all_reduce(where: torch.device, world: int) -> float:
    """Bus bandwidth, bytes/s, of the best of a few all-reduces: 2·(n−1)/n·bytes / seconds (the convention of nccl-tests)."""
    size = BUFFER_BYTES if where.type == "cuda" else CPU_BUFFER_BYTES
    buffer = torch.ones(size // 4, device=where)
    best = float("inf")
    for _ in range(ROUNDS):
        if where.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(buffer)
        if where.type == "cuda":
            torch.cuda.synchronize()
        seconds = torch.tensor(time.perf_counter() - started, device=where)
        best = min(best, float(seconds))
        buffer.fill_(1.0)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        if float(seconds) > SLOW_SECONDS:  # the same on every rank: there is nothing more to learn
            break
    return 2 * (world - 1) / world * size / best if world > 1 else 0.0


def main(argv: list[str]) -> int:
    """The command line: `--device cuda|cpu [--floor BYTES_PER_SECOND]`."""
    parser = argparse.ArgumentParser(prog="python -m trainer preflight", description=check.__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--floor", type=float, help="bytes a second; default: what fits the device and the number of nodes"
    )
    options = parser.parse_args(argv)
    if options.floor is None:
        several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
        options.floor = BETWEEN_NODES[options.device] if several else FLOOR_BYTES_PER_SECOND
    try:
        found = check(options.device, options.floor)
    except RuntimeError as error:
        sys.stderr.write(f"preflight: {error}\n")
        return 6
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    return 0
