"""Several nodes in one run: the same losses as on one, and what happens when the network or a node fails."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trainer
from tests.cli import Cli, spec
from tests.hosts import Host, three_hosts

pytestmark = pytest.mark.slow

IMPATIENT = """

_job = Job.__init__


def _impatient(self: Job, *words: object, **names: object) -> None:
    _job(self, *words, **names)
    object.__setattr__(self, "stall_floor_seconds", 5.0)
    object.__setattr__(self, "gather_seconds", 10.0)


Job.__init__ = _impatient
"""


def losses(cli: Cli, run: str) -> list[float]:
    """Of each step, in order, each once."""
    lines = [line for line in cli.metrics(run) if line["kind"] == "step"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.mark.parametrize(
    ("alone", "processes"), [([1], 1), pytest.param([1, 4], 2, marks=pytest.mark.harness)], ids=["2x1", "2x2"]
)
def test_two_nodes_are_one(cli: Cli, alone: list[int], processes: int) -> None:
    """The losses are those of one node with one process, and with as many, to rounding; the data leaves this machine once; the log
    tells ranks apart; each node has its charges."""
    runs = []
    for nodes, each in (*((1, count) for count in alone), (2, processes)):
        hardware = {"provider": "local", "usd_per_hour": 3.6, "nodes": nodes}
        changes = {"train__processes_per_node": each, "train__microbatch_size": 2, "train__steps": 12}
        (cli.home / "run.yaml").write_text(spec(hardware=hardware, name=f"n{nodes}x{each}", **changes))
        cli.run("launch", "run.yaml")
        runs.append(f"n{nodes}x{each}")
    *ones, two = (losses(cli, cli.show(run)["run"]) for run in runs)
    for one in ones:
        assert len(one) == 12 and two == pytest.approx(one, rel=1e-5)
    document = cli.show(runs[-1])
    first, second = document["attempts"][0]["nodes"]
    lanes = {(item["key"], item["lane"]): item for item in document["events"] if item["kind"] == "LaneDone"}
    assert lanes[second, "data"]["sent_bytes"] == 0
    assert lanes[second, "first shards"]["detail"]["method"] == "node to node"
    network = lanes[first, "network"]["detail"]
    assert network["interface"] == "lo" and network["bus_bytes_per_second"] > 0
    assert {charge["node"] for charge in document["charges"]} == {first, second}
    assert document["cost_usd"] == pytest.approx(
        sum(charge["usd"] for charge in document["charges"]), abs=1e-6
    )
    default = cli.run("tail", runs[-1], "--no-follow").stdout.splitlines()
    assert any(line.startswith("step 12/12 | loss") for line in default)
    everything = cli.run("tail", runs[-1], "--no-follow", "--ranks", "all").stdout.splitlines()
    assert any(line.startswith("[rank 0] step 12/12 | loss") for line in everything)
    assert "[node 1] [supervisor] ended: finished" in everything


# ---------------------------------------------------------------- three hosts with addresses of their own


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with three_hosts(tmp_path) as made:
        yield made


def launch(cli: Cli, hosts: list[Host], trainer_path: Path | None = None, **changes: Any) -> str:
    """A run on two of the three hosts; returns once it has its id."""
    first = hosts[0].node.address
    hardware = {
        "provider": "ssh",
        "host": [host.address for host in hosts],
        "port": first.port,
        "user": first.user,
        "identity_file": str(first.identity_file),
        "usd_per_hour": 3.6,
        "nodes": 2,
    }
    text = spec(hardware=hardware, trainer={"path": str(trainer_path) if trainer_path else None},
                node={"python": sys.executable}, **changes)  # fmt: skip
    (cli.home / "run.yaml").write_text(text)
    cli.run("launch", "run.yaml", "--detach")
    return cli.only()


def impatient(folder: Path) -> Path:
    """The trainer, with a supervisor that takes seconds for what takes it minutes otherwise."""
    copy = folder / "mine" / "trainer"
    shutil.copytree(Path(trainer.__file__).parent, copy)
    with (copy / "watchdog.py").open("a", encoding="utf-8") as file:
        file.write(IMPATIENT)
    return copy


def ended(cli: Cli, run: str, patience: float = 240) -> dict[str, Any]:
    """The record of the run, once it is over."""
    cli.run("tail", run, code=None, timeout=patience)
    return cli.show(run)


def quiet(cli: Cli, hosts: list[Host]) -> None:
    """Nothing of the run is left on any host, and each is free again."""
    cli.wait(lambda: not cli.processes(), 30)
    cli.wait(
        lambda: not any(host.commands() for host in hosts), 20
    )  # what followed a file learns that nobody reads
    assert list((cli.home / "nodes").glob("ssh-*.json")) == []


def events(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [item for item in document["events"] if item["kind"] == kind]


@pytest.mark.harness
def test_a_slow_network_is_refused_before_the_first_step(cli: Cli, hosts: list[Host]) -> None:
    hosts[1].slow_down("20mbit")
    run = launch(cli, hosts[:2], train__processes_per_node=1)
    document = ended(cli, run)
    assert document["state"] == "failed" and "at least 0.01 are expected" in document["reason"]
    assert f"{hosts[0].address} (eth0)" in document["reason"]
    assert events(document, "TrainerStarted") == []
    quiet(cli, hosts)


LONG = {
    "train__steps": 100_000, "train__validate_every": 0, "train__processes_per_node": 1, "checkpoint": {"every_steps": 10},
}  # fmt: skip


def training(cli: Cli, run: str, attempt: int = 1) -> dict[str, Any]:
    """The record once a checkpoint of that attempt is here."""

    def seen() -> dict[str, Any] | None:
        document = cli.show(run)
        begun = [item["at"] for item in events(document, "AttemptStarted")][attempt - 1 :]
        there = [item["at"] for item in events(document, "CheckpointVerified")]
        return document if begun and there and there[-1] > begun[0] else None

    found: dict[str, Any] = cli.wait(seen, 240)
    return found


def stopped(cli: Cli, run: str, hosts: list[Host]) -> None:
    """A stop ends it on every node: the last checkpoint is here, each step counts once, and nothing is left anywhere."""
    cli.run("stop", run)
    document = cli.show(run)
    assert (document["state"], document["reason"]) == ("stopped", "user")
    assert max(document["checkpoints"], key=lambda item: item["step"])["fetched"]
    assert losses(cli, run)
    quiet(cli, hosts)


def resumed(document: dict[str, Any]) -> list[bool]:
    """Of each attempt, whether it began at a checkpoint."""
    return [attempt["from_step"] > 0 for attempt in document["attempts"]]


@pytest.mark.harness
def test_a_dead_node_is_replaced(cli: Cli, hosts: list[Host], tmp_path: Path) -> None:
    """The whole job goes on from the checkpoint, with the third host in the place of the dead one."""
    run = launch(cli, hosts, impatient(tmp_path), **LONG)
    training(cli, run)
    hosts[1].die()
    document = training(cli, run, attempt=2)
    assert resumed(document) == [False, True]
    assert [item["ip"] for item in events(document, "NodeObserved")][-1] == hosts[2].address
    stopped(cli, run, hosts)


@pytest.mark.harness
def test_a_cut_between_the_nodes_ends_on_both(cli: Cli, hosts: list[Host], tmp_path: Path) -> None:
    """Both nodes answer this machine and not each other: neither waits for the whole outage, and after it the run goes on."""
    run = launch(cli, hosts[:2], impatient(tmp_path), **LONG)
    training(cli, run)
    hosts[0].cut(hosts[1])
    cli.wait(lambda: events(cli.show(run), "TrainerEnded"), 150)
    hosts[0].heal(hosts[1])
    document = training(cli, run, attempt=2)
    assert events(document, "TrainerEnded")[0]["reason"] == "lost"
    assert resumed(document) == [False, True]
    stopped(cli, run, hosts)


@pytest.mark.harness
def test_stop_ends_all_nodes(cli: Cli, hosts: list[Host]) -> None:
    run = launch(cli, hosts[:2], **LONG)
    training(cli, run)
    stopped(cli, run, hosts)
