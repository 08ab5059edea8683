"""The whole CLI against AWS as moto has it, with real SSH nodes behind its instances: the main job, and each way it can go wrong.

Each case ends with no instance left (the server's teardown checks it) and at most one launch for each intent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.aws_server import AwsServer, aws_factory  # noqa: F401
from tests.cli import Cli, spec

pytestmark = pytest.mark.slow
Make = Callable[..., tuple[AwsServer, Cli]]
HARDWARE = {"provider": "ec2", "gpu": "A10G:1", "regions": ["us-east-1"]}


@pytest.fixture
def rented(aws_factory: Callable[..., AwsServer], tmp_path: Path) -> Iterator[Make]:  # noqa: F811
    """Makes an account with real nodes, and a CLI that takes it for AWS."""
    clis: list[Cli] = []

    def make(**options: Any) -> tuple[AwsServer, Cli]:
        server = aws_factory(real_nodes=True, **options)
        home = tmp_path / f"cli{len(clis)}"
        clis.append(Cli(home, server.environment(home)))
        return server, clis[-1]

    yield make
    for cli in clis:
        left = [" ".join(process.cmdline())[:200] for process in cli.processes()]
        cli.end()
        assert left == []


def launch(cli: Cli, code: int, *args: str, **changes: Any) -> str:
    """`llmctl launch`, which must end with `code`; the run's id."""
    wanted = {"hardware": HARDWARE, "budget": {"max_usd": 5, "max_hours": 1}, **changes}
    (cli.home / "run.yaml").write_text(spec(**wanted))
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


def test_train_fetch_terminate(rented: Make) -> None:
    """The main job; the bill counts seconds, a minute at the least."""
    server, cli = rented()
    run = launch(cli, 0)
    document = cli.show(run)
    assert document["state"] == "succeeded" and len(intents(server)) == 1
    assert document["cost_usd"] >= 1.02 / 60 and document["billed_seconds"] >= 60
    assert cli.json("fetch-checkpoint", run)["verified"]
