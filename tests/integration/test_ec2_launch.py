"""The whole CLI against AWS as moto has it, with real SSH nodes behind its instances: the main job, and each way it can go wrong.

Each case ends with no instance left (the server's teardown checks it) and at most one launch for each intent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest

from tests.aws_server import SECRET, AwsServer, aws_factory  # noqa: F401
from tests.cli import Cli, spec
from tests.plain_trainer import plain_trainer

pytestmark = pytest.mark.slow
Make = Callable[..., tuple[AwsServer, Cli]]
HARDWARE = {"provider": "ec2", "gpu": "A10G:1", "regions": ["us-east-1"]}


@pytest.fixture
def rented(
    aws_factory: Callable[..., AwsServer],  # noqa: F811
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Make]:
    """Makes an account with real nodes, and a CLI that takes it for AWS."""
    clis: list[Cli] = []

    def make(**options: Any) -> tuple[AwsServer, Cli]:
        server = aws_factory(real_nodes=True, **options)
        home = tmp_path / f"cli{len(clis)}"
        clis.append(Cli(home, server.environment(home), cache=tmp_path_factory.getbasetemp() / "shards"))
        return server, clis[-1]

    yield make
    for cli in clis:
        left = cli.left()
        cli.end()
        assert left == []


def launch(cli: Cli, code: int, *args: str, **changes: Any) -> str:
    """`llmctl launch`, which must end with `code`; the run's id."""
    usual = {
        "trainer": {"path": plain_trainer(cli.home)},
        "hardware": HARDWARE,
        "budget": {"max_usd": 5, "max_hours": 1},
    }
    (cli.home / "run.yaml").write_text(spec(**usual | changes))
    cli.run("launch", "run.yaml", "-y", *args, code=code)
    return cli.only()


def intents(server: AwsServer) -> list[str]:
    """The intent of every instance there ever was; one that was launched twice is a fault."""
    found = [
        next(tag["value"] for tag in item.get_tags() if tag["key"] == "llmctl-intent")
        for item in server.instances()
    ]
    assert len(set(found)) == len(found), "an intent was launched twice"
    return found


def node_texts(server: AwsServer, node_id: str) -> Iterator[tuple[str, str]]:
    """(where, text) of everything on a node: its files, the environments and the command lines of its processes."""
    home = server.directory / "nodes" / "homes" / node_id
    for path in home.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix not in {".bin", ".safetensors", ".pt"}:
            with suppress(FileNotFoundError):  # a temporary one, renamed meanwhile
                yield str(path), path.read_bytes().decode(errors="replace")
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("HOME") == str(home):
                yield f"environment of {process.pid}", json.dumps(process.environ())
                yield f"command line of {process.pid}", " ".join(process.cmdline())


def shards_in_s3(server: AwsServer, cli: Cli, tmp_path: Path) -> str:
    """Text made to shards and pushed; the folder in S3."""
    server.client("s3").create_bucket(Bucket="corpus")
    source = tmp_path / "text.txt"
    source.write_text("the quick brown fox jumps over the lazy dog, again and again\n" * 4000)
    (tmp_path / "more.txt").write_text("what is written without effort is read without pleasure\n" * 2000)
    cli.run("data", "prepare", str(source), str(tmp_path / "more.txt"), "--to", str(tmp_path / "shards"), "--tokenizer", "bytes",
            "--shard-tokens", "60000", "--validation-fraction", "0.5")  # fmt: skip
    first = cli.json("data", "push", str(tmp_path / "shards"), "--to", "s3://corpus/fox")
    again = cli.json("data", "push", str(tmp_path / "shards"), "--to", "s3://corpus/fox")
    assert (
        first["uploaded"]
        and not first["unchanged"]
        and again["unchanged"] == first["uploaded"]
        and not again["uploaded"]
    )
    assert cli.json("data", "verify", "s3://corpus/fox")["ok"]
    return "s3://corpus/fox"


def test_s3_data_in_and_checkpoints_out(rented: Make, tmp_path: Path) -> None:
    """The node reads shards from S3 and writes checkpoints there, with nothing but scoped addresses that expire; what is in S3 comes
    back whole when it is nowhere else."""
    server, cli = rented()
    place = shards_in_s3(server, cli, tmp_path)
    data = {
        "train": [f"{place}/train_*.bin"],
        "validation": [f"{place}/validation_*.bin"],
        "tokenizer": "bytes",
    }
    changes = {"data": data, "checkpoint": {"every_steps": 50, "keep": 2, "push": "s3://corpus/ckpt"}}
    wanted = {
        "hardware": HARDWARE,
        "budget": {"max_usd": 5, "max_hours": 1},
        "train__steps": 300,
        "train__validate_every": 100,
        **changes,
    }
    (cli.home / "run.yaml").write_text(spec(**wanted))
    cli.run("launch", "run.yaml", "-y", "--detach")
    run = cli.only()
    node_id = cli.wait(server.alive)[0]
    home = server.directory / "nodes" / "homes" / node_id
    cli.wait((home / "llmctl" / "runs" / run / "push-status.json").exists)
    addresses: set[str] = set()
    for where, text in node_texts(server, node_id):
        assert SECRET not in text and "AWS_" not in text and "aws_secret" not in text.lower(), where
        addresses |= set(re.findall(r"http://127\.0\.0\.1:\d+/[^\s\"']*X-Amz-Signature[^\s\"']*", text))
    assert addresses
    for address in addresses:
        path, query = urlsplit(address).path, parse_qs(urlsplit(address).query)
        shard = path.startswith("/corpus/fox/")  # one that is still on its way, while the first steps run
        assert shard or path.startswith(f"/corpus/ckpt/{run}/slot-"), "an address for something else"
        assert int(query["X-Amz-Expires"][0]) <= (12 if shard else 2) * 3600
    cli.run("resume", run)
    assert cli.show(run)["state"] == "succeeded"
    assert [path for path in server.objects_got if path.startswith("/corpus/fox/train_")]
    slots = json.loads(
        server.client("s3").get_object(Bucket="corpus", Key=f"ckpt/{run}/slot-0/index.json")["Body"].read()
    )
    assert slots["step"] is not None
    shutil.rmtree(cli.home / "runs" / run / "checkpoints")
    fetched = cli.json("fetch-checkpoint", run, "--which", "latest")
    assert fetched["step"] == 300 and fetched["verified"]
    assert (Path(fetched["path"]) / "training_state.pt").exists()


@pytest.mark.harness
def test_sold_out_zones_a_lost_answer_and_a_terminate_that_lies(rented: Make) -> None:
    """Two zones have no capacity, the third's answer is lost, and two accepted terminates do nothing: one node, and none left. The
    truth is read from the instances, so what exists is used and nothing is launched twice. The bill is a minute at the least."""
    server, cli = rented()
    server.sold_out = {"us-east-1a", "us-east-1b"}
    server.honour_tokens = False
    zone_c = next(item.id for item in server.subnets() if item.availability_zone == "us-east-1c")
    server.fault(f"ec2 RunInstances {zone_c}", "lose-answer")
    server.terminate_lies = 2
    run = launch(cli, 0, "--wait", "10m", train__steps=20, train__validate_every=20)
    assert [item.availability_zone for item in server.instances()] == ["us-east-1c"]
    assert len(intents(server)) == 1
    assert len(server.sent("TerminateInstances")) >= 3
    document = cli.show(run)
    assert document["cost_usd"] >= 1.006 / 60 and document["billed_seconds"] >= 60


@pytest.mark.harness
def test_sold_out_everywhere(rented: Make) -> None:
    """Nothing is rented, and the exit code says so."""
    server, cli = rented()
    server.sold_out = {f"us-east-1{letter}" for letter in "abcdef"}
    run = launch(cli, 5)
    assert intents(server) == [] and cli.show(run)["reason"] == "no-capacity"


@pytest.mark.harness
@pytest.mark.parametrize("phase", ["booting", "training"])
def test_instance_dies(rented: Make, phase: str) -> None:
    """A lost node is replaced, and the run goes on from the last checkpoint that came home."""
    server, cli = rented()
    server.boots = phase == "training"
    (cli.home / "run.yaml").write_text(
        spec(
            hardware=HARDWARE,
            budget={"max_usd": 5, "max_hours": 1},
            train__steps=300,
            train__validate_every=100,
            checkpoint={"every_steps": 50},
            trainer={"path": plain_trainer(cli.home)},
        )
    )
    cli.run("launch", "run.yaml", "-y", "--detach")
    run = cli.only()
    node_id = cli.wait(server.alive)[0]
    if phase == "training":
        cli.wait(lambda: any(item["fetched"] for item in cli.show(run)["checkpoints"]))
    server.boots = True
    server.kill(node_id)
    cli.run("resume", run)
    document = cli.show(run)
    assert document["state"] == "succeeded" and len(intents(server)) == 2
    assert [line["step"] for line in cli.metrics(run) if line["kind"] == "step"] == list(range(1, 301))


@pytest.mark.harness
def test_spot_interruption_carries_on_elsewhere(rented: Make) -> None:
    """The notice makes the trainer checkpoint and stop; the next node goes on from there."""
    server, cli = rented()
    (cli.home / "run.yaml").write_text(
        spec(hardware={**HARDWARE, "market": "spot"}, budget={"max_usd": 5, "max_hours": 1}, train__steps=2000,
             train__validate_every=1000, checkpoint={"every_steps": 100000})
    )  # fmt: skip
    cli.run("launch", "run.yaml", "-y", "--detach")
    run = cli.only()
    node_id = cli.wait(server.alive)[0]
    cli.wait(lambda: (cli.row(run)["step"] or 0) > 20)
    server.metadata[node_id].interruption = {"action": "terminate", "time": "2026-01-01T00:02:00Z"}
    cli.run("resume", run)
    document = cli.show(run)
    assert (
        document["state"] == "succeeded"
        and len(document["attempts"]) == 2
        and document["attempts"][1]["from_step"] > 20
    )
    assert 0.4 < document["attempts"][0]["usd_per_hour"] < 0.45


def test_a_quota_of_zero_names_the_quota_and_how_to_raise_it(rented: Make) -> None:
    """Where the launch says so too, not only the log of its driver."""
    server, cli = rented()
    server.fault("ec2 RunInstances", "refuse", code="VcpuLimitExceeded", status=400)
    (cli.home / "run.yaml").write_text(
        spec(
            hardware=HARDWARE,
            budget={"max_usd": 5, "max_hours": 1},
            trainer={"path": plain_trainer(cli.home)},
        )
    )
    failed = cli.run("launch", "run.yaml", "-y", code=5)
    told = " ".join(failed.stderr.split())
    assert "VcpuLimitExceeded" in told and "L-DB2E81BA" in told and "request-service-quota-increase" in told
    assert intents(server) == []


def test_a_bucket_for_checkpoints_that_is_missing_is_met_before_anything_is_rented(rented: Make) -> None:
    """The code, its meaning and the next step."""
    server, cli = rented()
    push = {"every_steps": 20, "push": "s3://no-such-bucket/ckpt"}
    (cli.home / "run.yaml").write_text(
        spec(hardware=HARDWARE, budget={"max_usd": 5, "max_hours": 1}, checkpoint=push)
    )
    failed = cli.run("launch", "run.yaml", "-y", code=3)
    assert "NoSuchBucket" in failed.stderr and "aws s3 mb s3://no-such-bucket" in failed.stderr
    assert server.instances() == [] and [row for row in cli.json("status") if row["run"]] == []


@pytest.mark.harness
def test_a_machine_that_vanished_leaves_no_bill_behind(rented: Make) -> None:
    """Nobody is left to end the node: its lease does, which is as long as its money lasts, though a day of hours is allowed."""
    server, cli = rented()
    (cli.home / "run.yaml").write_text(
        spec(hardware=HARDWARE, budget={"max_usd": 0.02, "max_hours": 24}, train__steps=500_000,
             checkpoint={"every_steps": 100_000}, trainer={"path": plain_trainer(cli.home)})
    )  # fmt: skip
    cli.run("launch", "run.yaml", "-y", "--detach")
    run = cli.only()
    cli.wait(lambda: (cli.row(run)["step"] or 0) > 20)
    os.kill(cli.driver_pid(run), signal.SIGKILL)
    (node_id,) = server.alive()
    cli.wait(lambda: not server.alive(), 240)
    assert server.sent("TerminateInstances") == []
    (ended,) = [item for item in server.instances() if item.id == node_id]
    assert ended.state_reason.code == "Client.InstanceInitiatedShutdown"
    assert "has no driver" in cli.run("status").stderr
    cli.run("stop", run, code=None)
    assert cli.show(run)["cost_usd"] <= 0.02 + 3 * 1.03 / 60


def test_bad_credentials_are_exit_code_4(rented: Make) -> None:
    """Nothing is created; the next step is named."""
    server, cli = rented()
    server.fault("ec2 ", "refuse", times=1, code="AuthFailure", status=401)
    (cli.home / "run.yaml").write_text(spec(hardware=HARDWARE, budget={"max_usd": 5, "max_hours": 1}))
    failed = cli.run("launch", "run.yaml", "-y", code=4)
    assert "AuthFailure" in failed.stderr and "AWS_PROFILE" in failed.stderr and SECRET not in failed.stderr
    assert server.instances() == []
