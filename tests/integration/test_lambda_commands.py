"""The other commands beside a rented node: stop, extend, reap, and Ctrl-C while nothing is rented."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from tests.integration.test_lambda_launch import (  # noqa: F401  fixtures
    Make,
    honest,
    lambda_cloud_factory,
    lambda_spec,
    launch,
    launches,
    rented,
)
from tests.plain_trainer import plain_trainer

pytestmark = pytest.mark.slow
LONG = {"train__steps": 5000, "train__validate_every": 1000, "checkpoint": {"every_steps": 100}}


def detached(cli, **changes) -> str:
    """A run that is not followed, some steps on its way."""
    (cli.home / "run.yaml").write_text(
        lambda_spec(**LONG, trainer={"path": plain_trainer(cli.home)}, **changes)
    )
    cli.run("launch", "run.yaml", "-y", "--detach")
    run = cli.only()
    cli.wait(lambda: (cli.row(run)["step"] or 0) > 20)
    return run


def test_extend_raises_every_limit_of_a_living_run_at_once(rented: Make) -> None:  # noqa: F811
    """In the store, in the node's name, and on the node; and a stop brings the newest checkpoint home."""
    cloud, cli = rented()
    run = detached(cli, budget={"max_usd": 5, "max_hours": 1})
    planned = cli.run("plan", "run.yaml")
    assert "nothing ends the node" in " ".join((planned.stdout + planned.stderr).split())
    assert "while this machine sleeps" in " ".join(cli.run("status").stderr.split())
    (machine,) = cloud.machines()
    before, place = (
        machine["name"],
        cloud.directory / "state" / "homes" / machine["id"] / "llmctl" / "runs" / run,
    )
    deadline = json.loads((place / "supervisor.json").read_text())["deadline"]
    cli.run("extend", run, "--max-hours", "2", "--max-usd", "9")
    renamed = cli.wait(lambda: [item["name"] for item in cloud.machines() if item["name"] != before])
    assert len(renamed) == 1, "the lease in the node's name moved too"

    def moved() -> float:
        return float(json.loads((place / "supervisor.json").read_text())["deadline"] - deadline)

    cli.wait(lambda: moved() == pytest.approx(3600, abs=1))
    cli.run("stop", run)
    document = cli.show(run)
    assert (document["state"], document["reason"]) == ("stopped", "user")
    newest = max(document["checkpoints"], key=lambda item: item["step"])
    assert newest["fetched"]
    assert len(launches(cloud)) == 1
    honest(cloud, cli, run)


@pytest.mark.harness
def test_the_budget_ends_a_run_with_its_checkpoint_here(rented: Make) -> None:  # noqa: F811
    """The bill exceeds it by a billing minute at most, and the time that the end takes; what was trained is here."""
    cloud, cli = rented()
    run = launch(cli, 103, **LONG | {"train__steps": 500_000}, budget={"max_usd": 0.03, "max_hours": 1})
    document = cli.show(run)
    assert (document["state"], document["reason"]) == ("stopped", "budget")
    assert max(document["checkpoints"], key=lambda item: item["step"])["fetched"]
    assert cloud.usd() <= 0.03 + 1.29 / 60 + 1e-6
    honest(cloud, cli, run)


def test_reap_ends_what_nobody_answers_for(rented: Make) -> None:  # noqa: F811
    """A home that is gone, its driver killed: another machine's `reap` leaves the node alone until told otherwise."""
    cloud, cli = rented()
    run = detached(cli)
    os.kill(cli.driver_pid(run), signal.SIGKILL)
    assert cli.json("reap")["found"] == [], "a live run's node is not an orphan, driver or not"
    lost = cli.home.with_name("another")
    other = type(cli)(lost, {**cloud.environment(lost)})
    assert other.json("reap")["found"] == [], "a colleague's unexpired node is nobody's business"
    shown = other.run("reap", "--foreign", "--json", code=2)
    assert cloud.billing() and cloud.machines()[0]["id"] in shown.stdout + shown.stderr
    ended = other.json("reap", "--foreign", "--yes")
    assert [item["id"] for item in ended["terminated"]] == [cloud.machines()[0]["id"]]
    assert cloud.billing() == []
    # Back at the first machine the run finds its node gone, and needs no help to carry on or to stop.
    cli.run("stop", run, "--now", code=None)
    cli.wait(lambda: cli.show(run)["state"] in {"stopped", "failed", "lost"})
    shutil.rmtree(lost)


def test_a_wait_for_capacity_is_interrupted_and_resumed(rented: Make) -> None:  # noqa: F811
    """It tells what is free meanwhile. Ctrl-C cancels it: exit 130, and no request to rent was ever sent. `resume` waits again, and
    the node that comes is told of."""
    elsewhere = {"gpu_1x_a10": [], "gpu_8x_a100": ["us-east-1"]}
    cloud, cli = rented(capacity=elsewhere)
    notes, said = cli.home / "notes", cli.home / "said"
    notify = f'echo "$LLMCTL_MESSAGE" >>{notes}'
    (cli.home / "run.yaml").write_text(lambda_spec(notify=notify, trainer={"path": plain_trainer(cli.home)}))
    with said.open("w") as file:
        waiting = cli.start("launch", "run.yaml", "-y", "--wait", "10h", stderr=file)
    free = "waiting for capacity; free now: gpu_8x_a100 ($15.92/h, us-east-1)"
    cli.wait(lambda: free in said.read_text())
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert cloud.sent("POST /instance-operations/launch") == []
    run = cli.only()
    cloud.set(capacity={}, capacity_after=100)
    cli.run("resume", run, "--wait", "1h")
    assert cli.show(run)["state"] == "succeeded" and len(launches(cloud)) == 1
    told = notes.read_text()
    assert f"{run}: got gpu_1x_a10 in us-" in told and f"{run} succeeded" in told


def test_what_a_key_on_the_node_risks_is_said_where_it_is_switched_on(rented: Make) -> None:  # noqa: F811
    """And what is unguarded without it."""
    _, cli = rented()
    for switched, words in (
        (False, "nothing ends the node"),
        (True, "leaves the Lambda API key on the node"),
    ):
        (cli.home / "run.yaml").write_text(lambda_spec(node={"self_terminate": switched}))
        planned = cli.run("plan", "run.yaml")
        assert words in " ".join((planned.stdout + planned.stderr).split())
