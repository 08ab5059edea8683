"""The whole CLI against the Lambda-shaped server, whose instances are real SSH nodes: the main job, and each way it can go wrong.

Each case ends with zero instances billing and no request against the API document (the server's fixture checks both), at
most one launch for each intent, and the exit code that PRODUCT promises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from runs.store import Store
from tests.cli import Cli, spec
from tests.lambda_fixtures import Cloud, lambda_cloud_factory  # noqa: F401
from tests.plain_trainer import plain_trainer

pytestmark = pytest.mark.slow
LAUNCH = "POST /api/v1/instance-operations/launch"
TERMINATE = "POST /api/v1/instance-operations/terminate"
Make = Callable[..., tuple[Cloud, Cli]]


def harness(*values: Any) -> Any:
    """A case that `make faults` runs; its sister is part of `make test`."""
    return pytest.param(*values, marks=pytest.mark.harness)


@pytest.fixture
def rented(
    lambda_cloud_factory: Callable[..., Cloud],  # noqa: F811
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Make]:
    """Makes a server with the given switches, and a CLI that takes it for Lambda."""
    clis: list[Cli] = []

    def make(**switches: Any) -> tuple[Cloud, Cli]:
        cloud = lambda_cloud_factory(**{"pace": 0.02, "boot_seconds": 10, **switches})
        home = tmp_path / f"home{len(clis)}"
        clis.append(Cli(home, cloud.environment(home), cache=tmp_path_factory.getbasetemp() / "shards"))
        return cloud, clis[-1]

    yield make
    for cli in clis:
        left = cli.left()
        cli.end()
        assert left == []


def lambda_spec(**changes: Any) -> str:
    """A tiny run on the cheapest GPU type, on its CPU."""
    hardware = {"provider": "lambda", "gpu": "A10:1"}
    return spec(**{"hardware": hardware, "budget": {"max_usd": 5, "max_hours": 1}, **changes})


def launch(cli: Cli, code: int, *args: str, timeout: float = 180, **changes: Any) -> str:
    """`llmctl launch`, which must end with `code`; the run's id. What the trainer does is not the point, unless changes say so."""
    usual = {"trainer": {"path": plain_trainer(cli.home)}}
    (cli.home / "run.yaml").write_text(lambda_spec(**usual | changes))
    cli.run("launch", "run.yaml", "-y", *args, code=code, timeout=timeout)
    return cli.only()


def launches(cloud: Cloud) -> list[str]:
    """The names of all instances that ever were; a name stands for one intent."""
    names = [machine["name"] for machine in cloud.machines()]
    assert [name for name, count in Counter(names).items() if count > 1] == [], "an intent was launched twice"
    return names


def honest(cloud: Cloud, cli: Cli, run: str) -> None:
    """The dollars in `show` are the provider's own, to one billing minute a node."""
    document = cli.show(run)
    rows = cloud.state()["ledger"]
    minute = len(rows) * 1.29 / 60
    assert document["cost_usd"] == pytest.approx(sum(row["usd"] for row in rows), abs=minute + 1e-6)


def test_launch_with_default_settings_and_rate_limits(rented: Make) -> None:
    """Train, fetch, terminate; the bill is the server's own."""
    cloud, cli = rented()
    run = launch(cli, 0, trainer={"path": None})
    assert cli.show(run)["state"] == "succeeded"
    assert len(launches(cloud)) == 1
    honest(cloud, cli, run)
    document = cli.show(run)
    (said,) = [event for event in document["events"] if event["kind"] == "BillingReconciled"]
    assert said["contradiction"] is None
    assert datetime.fromisoformat(document["charges"][-1]["end"]) == datetime.fromisoformat(said["ended"])
    assert "by Lambda's audit log" in cli.run("show", run).stdout
    assert [row for row in cloud.state()["requests"] if row["status"] == 429] == []
    assert cli.json("fetch-checkpoint", run)["verified"]
    assert "billing" not in cli.run("status").stderr


@pytest.mark.parametrize("kind", ["lose-answer", harness("lose-request"), harness("garbage")])
def test_lost_answer_to_launch(rented: Make, kind: str) -> None:
    """The truth is read from the instance list: what exists is used, what does not is asked for under a new name."""
    cloud, cli = rented()
    cloud.fault(LAUNCH, kind)
    run = launch(cli, 0)
    honest(cloud, cli, run)
    assert len(launches(cloud)) == 1


@pytest.mark.harness  # in `make test`: a launch at the documented limits above, stricter ones in test_lambda_api.py
@pytest.mark.parametrize("status", [429, 503])
def test_storm(rented: Make, status: int) -> None:
    """Reads, launches and terminates are refused for a while, some after they have had their effect."""
    cloud, cli = rented()
    code = None if status == 503 else "global/too-many-requests"
    cloud.fault("GET", "refuse", times=3, status=status, code=code)
    cloud.fault(LAUNCH, "refuse", times=1, status=status, code=code)
    cloud.fault(TERMINATE, "lie", times=1, status=status, code=code)
    run = launch(cli, 0)
    launches(cloud)
    honest(cloud, cli, run)


def test_no_capacity_anywhere(rented: Make) -> None:
    """Nothing is rented, and the exit code says so."""
    cloud, cli = rented(capacity={"gpu_1x_a10": []})
    run = launch(cli, 5)
    assert launches(cloud) == [] and cli.show(run)["reason"] == "no-capacity"


def test_capacity_in_the_third_region_only(rented: Make) -> None:
    """The list shows three regions; two refuse the launch; the third serves."""
    regions = ["us-west-1", "us-east-1", "us-south-2"]
    cloud, cli = rented(
        capacity={"gpu_1x_a10": regions}, ghost_capacity=[f"gpu_1x_a10/{name}" for name in regions[:2]]
    )
    run = launch(cli, 0, "--wait", "10m")
    assert [machine["region"] for machine in cloud.machines()] == ["us-south-2"]
    honest(cloud, cli, run)


@pytest.mark.harness
def test_wait_for_capacity(rented: Make) -> None:
    """Sold out at first; `--wait` gets the node when it comes."""
    cloud, cli = rented(capacity_after=200)
    run = launch(cli, 0, "--wait", "1h")
    honest(cloud, cli, run)


def test_boot_that_never_ends(rented: Make) -> None:
    """Three nodes are tried, each is terminated, then the launch is given up."""
    cloud, cli = rented(boot_seconds=1e6)
    launch(cli, 6, node={"boot_timeout": "2s"})
    assert len(launches(cloud)) == 3
    assert [machine["status"] for machine in cloud.machines()] == ["terminated"] * 3


def test_ssh_that_never_opens(rented: Make) -> None:
    """An active node that does not answer is ended, not abandoned."""
    cloud, cli = rented(ssh="never")
    run = launch(cli, 6, node={"boot_timeout": "3s"})
    assert len(launches(cloud)) == 3
    honest(cloud, cli, run)


def test_wrong_host_key(rented: Make) -> None:
    """A node that shows another key than the one made for it is ended at once."""
    cloud, cli = rented(user_data_ignored=True)
    run = launch(cli, 6)
    assert len(launches(cloud)) == 1
    assert "host-key" in cli.show(run)["reason"]


@pytest.mark.harness
def test_host_key_accept_new(rented: Make) -> None:
    """The spec may say that the image makes its own key."""
    cloud, cli = rented(user_data_ignored=True)
    launch(cli, 0, hardware={"provider": "lambda", "gpu": "A10:1", "host_key": "accept-new"})
    assert len(launches(cloud)) == 1


@pytest.mark.parametrize(
    ("phase", "how"),
    [
        ("training", "vanished"),
        *(harness("booting", how) for how in ("terminated", "unhealthy")),
        harness("preparing", "terminated"),
        harness("training", "preempted"),
        harness("collecting", "vanished"),
    ],
)
def test_instance_dies(rented: Make, phase: str, how: str) -> None:
    """A lost node is replaced, and the run goes on from the last checkpoint that came home."""
    cloud, cli = rented(boot_seconds=60 if phase == "booting" else 10)
    (cli.home / "run.yaml").write_text(
        lambda_spec(
            train__steps=400,
            train__validate_every=100,
            checkpoint={"every_steps": 50},
            trainer={"path": plain_trainer(cli.home)},
        )
    )
    cli.run("launch", "run.yaml", "-y", "--detach")
    run = cli.only()
    store = Store(cli.home)
    reached = {
        "booting": cloud.machines,
        "preparing": lambda: store.record(run).state == "preparing",
        "training": lambda: any(item.fetched for item in store.record(run).checkpoints.values()),
        "collecting": lambda: store.record(run).attempts[-1:] and store.record(run).attempts[-1].trainer_end,
    }[phase]
    cloud.wait_for(lambda _: reached(), 120)
    cloud.kill(cloud.machines()[0]["id"], how)
    cli.run("resume", run, code=None if phase == "collecting" else 0)  # where all was here, it is over by now
    cli.wait(lambda: cli.show(run)["state"] == "succeeded")
    document = cli.show(run)
    assert len(launches(cloud)) == 2 or phase == "collecting"  # all may have been here by then
    made = [line["step"] for line in cli.metrics(run) if line["kind"] == "step"]
    assert made == list(range(1, 401))
    if phase == "training":
        assert document["attempts"][-1]["from_step"] >= 50
    honest(cloud, cli, run)


@pytest.mark.harness
def test_terminate_that_fails_five_times(rented: Make) -> None:
    """It is sent until it is accepted and confirmed."""
    cloud, cli = rented()
    cloud.fault(TERMINATE, "refuse", times=5, status=500)
    run = launch(cli, 0)
    assert len(cloud.sent(TERMINATE)) >= 6
    honest(cloud, cli, run)


@pytest.mark.harness  # in `make test`: one that lies for ever below, five failures and two lies in test_lambda_api.py
def test_terminate_that_lies_once(rented: Make) -> None:
    """An accepted request is not believed: the instance is looked at, and asked for again."""
    cloud, cli = rented(terminate_lies=1)
    run = launch(cli, 0)
    assert len(cloud.sent(TERMINATE)) >= 2
    honest(cloud, cli, run)


def test_terminate_that_never_works_is_exit_code_8(rented: Make) -> None:
    """Shown in red until it is settled; the driver goes on trying and succeeds when the provider relents."""
    cloud, cli = rented(terminate_lies=-1)
    (cli.home / "run.yaml").write_text(lambda_spec(trainer={"path": plain_trainer(cli.home)}))
    failed = cli.run("launch", "run.yaml", "-y", code=8)
    machine = cloud.machines()[0]["id"]
    for command in (failed, cli.run("status"), cli.run("compare"), cli.run("reap", "--yes", code=8)):
        assert machine in command.stderr and "https://cloud.lambda.ai/instances" in command.stderr
    cloud.set(terminate_lies=0)
    run = cli.only()
    cli.wait(lambda: cli.show(run)["state"] == "succeeded")


def test_bad_key_is_exit_code_4(rented: Make) -> None:
    """Nothing is created at the provider; the next step is named."""
    cloud, cli = rented()
    cli.env["LAMBDA_API_KEY"] = "secret_wrong"
    (cli.home / "run.yaml").write_text(lambda_spec())
    failed = cli.run("launch", "run.yaml", "-y", code=4)
    assert "LAMBDA_API_KEY" in failed.stderr and "secret_wrong" not in failed.stderr
    assert launches(cloud) == []
