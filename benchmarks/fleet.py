"""Many runs at once from one small machine: what they take of it, what they ask of the provider, how late a line arrives.

    python -m benchmarks fleet [--runs 16] [--seconds 120] [--step-seconds 0.25]

Against the Lambda-shaped server of the tests, in real time and with its rate limits on. Each run has a node of its own behind real
SSH, on which torchrun starts a trainer without tensors: what is measured is this side, not sixteen trainings on one processor. A
line's age is from the `time` that the node wrote into it to the moment at which it stands in the mirrored metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.measure import load

if TYPE_CHECKING:
    from tests.cli import Cli
    from tests.lambda_fixtures import Cloud

MEMORY_BYTES, LATENCY_SECONDS = 1e9, 1.0
"""Targets: all processes of this side together, and the age of a line."""
LOOK_SECONDS = 0.02
"""How often the mirrored files are looked at: an age is too high by so much at most."""


@dataclass
class Seen:
    """What was measured while all runs trained."""

    ages: list[float] = field(default_factory=list)
    """Seconds, of each line that arrived."""
    memory_bytes: int = 0
    """The most at one look: proportional set sizes, so that what processes share counts once."""
    processes: int = 0
    ssh_connections: int = 0
    """Established, at the fullest look, to the nodes."""
    processor: float = 0.0
    """Seconds of processor a second of wall time, of this side alone."""
    lists: int = 0
    """Inventories that the provider was asked for."""
    requests: int = 0
    seconds: float = 0.0


def slow_trainer(folder: Path, step_seconds: float) -> str:
    """The trainer without tensors, with a step of a real run's length."""
    from tests.plain_trainer import MAIN, plain_trainer

    path = plain_trainer(folder)
    written = MAIN.replace("STEP_SECONDS = 0.01", f"STEP_SECONDS = {step_seconds}")
    assert written != MAIN
    (Path(path) / "__main__.py").write_text(written)
    return path


def launch(cli: Cli, runs: int, step_seconds: float) -> list[str]:
    """So many runs, all training; their ids."""
    from tests.cli import spec

    path = slow_trainer(cli.home, step_seconds)
    started = []
    for number in range(runs):
        text = spec(
            name=f"run{number}",
            hardware={"provider": "lambda", "gpu": "A10:1"},
            budget={"max_usd": 5, "max_hours": 2},
            trainer={"path": path},
            train__steps=1_000_000,
            train__processes_per_node=1,
            train__log_every=1,
            train__validate_every=0,
            checkpoint={"every_steps": 200},
        )
        (cli.home / f"run{number}.yaml").write_text(text)
        started.append(cli.start("launch", f"run{number}.yaml", "-y", "--detach"))
    for process in started:
        assert process.wait(600) == 0, process.communicate()[1]
    ids = [row["run"] for row in cli.json("status") if row["run"]]
    cli.wait(lambda: all((cli.home / "runs" / run / "metrics.jsonl").exists() for run in ids), 900)
    return ids


def ages(cli: Cli, runs: list[str], seconds: float) -> list[float]:
    """How old each line was as it arrived, for so long."""
    files = [(cli.home / "runs" / run / "metrics.jsonl").open() for run in runs]
    for file in files:
        file.seek(0, 2)
    rest, found, end = [""] * len(files), [], time.monotonic() + seconds
    while time.monotonic() < end:
        for number, file in enumerate(files):
            text = rest[number] + file.read()
            *lines, rest[number] = text.split("\n")
            now = time.time()
            found += [now - json.loads(line)["time"] for line in lines]
        time.sleep(LOOK_SECONDS)
    for file in files:
        file.close()
    return found


def sizes(processes: list[psutil.Process]) -> tuple[int, int, float]:
    """Proportional memory in bytes, connections to SSH servers, and processor seconds so far."""
    memory = connections = 0
    spent = 0.0
    for process in processes:
        try:
            memory += process.memory_full_info().pss
            connections += sum(
                link.status == psutil.CONN_ESTABLISHED
                for link in process.net_connections("tcp")
                if "ssh" in process.name()
            )
            times = process.cpu_times()
            spent += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return memory, connections, spent


def measure(runs: int, seconds: float, step_seconds: float, folder: Path) -> Seen:
    """Launch, watch, stop."""
    from tests.cli import Cli
    from tests.lambda_fixtures import Cloud

    cloud = Cloud(folder / "cloud", pace=1.0, boot_seconds=10.0)
    cli = Cli(folder / "home", cloud.environment(folder / "home"))
    try:
        ids = launch(cli, runs, step_seconds)
        seen = watch(cli, cloud, ids, seconds)
        stop(cli, ids)
        return seen
    finally:
        cli.end()
        cloud.may_bill()
        cloud.close()


def watch(cli: Cli, cloud: Cloud, ids: list[str], seconds: float) -> Seen:
    """All of it while they train: first the ages alone, so that looking at memory does not make lines late."""
    asked, started = cloud.sent(" /"), time.monotonic()
    before = sizes(cli.processes())
    seen = Seen(ages=ages(cli, ids, seconds))
    processes = cli.processes()
    seen.memory_bytes, seen.ssh_connections, spent = sizes(processes)
    seen.seconds, seen.processes = time.monotonic() - started, len(processes)
    seen.processor = (spent - before[2]) / seen.seconds
    since = cloud.sent(" /")[len(asked) :]
    seen.requests = len(since)
    seen.lists = sum(row["method"] == "GET" and row["path"].endswith("/instances") for row in since)
    return seen


def stop(cli: Cli, ids: list[str]) -> None:
    """Every run to its end, and its bill: nothing may go on."""
    stopped: list[Any] = [cli.start("stop", run, "--now") for run in ids]
    for process in stopped:
        process.wait(600)
    assert cli.left(120) == []


def main() -> None:
    """Measure and print the table that stands in docs/performance.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fleet", description=__doc__)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--step-seconds", type=float, default=0.25)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmctl-fleet-") as folder:
        seen = measure(asked.runs, asked.seconds, asked.step_seconds, Path(folder))
    late = statistics.quantiles(seen.ages, n=100)
    print(f"{load()}; {asked.runs} runs, {asked.step_seconds:g} s a step, watched for {seen.seconds:.0f} s")
    print("| what | measured | target |\n|---|---|---|")
    print(
        f"| memory of this side, all processes | {seen.memory_bytes / 1e6:,.0f} MB in {seen.processes} processes | {MEMORY_BYTES / 1e6:,.0f} MB |"
    )
    print(
        f"| age of a line here, of {len(seen.ages):,}: median, 95th, 99th percentile | {late[49]:.2f} s, {late[94]:.2f} s, {late[98]:.2f} s | {LATENCY_SECONDS:g} s |"
    )
    print(
        f"| inventories asked of the provider | one in {seen.seconds / max(1, seen.lists):.1f} s, for all runs; {seen.requests} requests in all | |"
    )
    print(f"| SSH connections | {seen.ssh_connections / asked.runs:.1f} a run | |")
    print(f"| processor of this side | {seen.processor:.2f} cores | |")


if __name__ == "__main__":
    main()
