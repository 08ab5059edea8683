"""`trainer preflight` in real processes: they find each other, and a slow exchange is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def preflight(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"]
    return subprocess.run(
        [sys.executable, *command, "preflight", *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_two_processes_exchange_and_tell_how_fast() -> None:
    done = preflight("--device", "cpu", "--floor", "1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["world_size"] == 2 and told["bus_bytes_per_second"] > 1


def test_an_exchange_below_the_floor_is_no_node_to_train_on() -> None:
    done = preflight("--device", "cpu", "--floor", "1e15")
    assert done.returncode != 0
    assert "preflight: all-reduce over 2 processes moves" in done.stderr
