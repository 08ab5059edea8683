"""Nodes that are kept, and the runs that take them over: `launch --on`, on real parts."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from tests.cli import Cli, spec
from tests.plain_trainer import plain_trainer

pytestmark = pytest.mark.slow


def short(cli: Cli, **changes: Any) -> str:
    """A spec of a second's work, whose trainer has no tensors."""
    few = {"train__steps": 20, "train__validate_every": 10, "train__processes_per_node": 1}
    return spec(**few, trainer={"path": plain_trainer(cli.home)}, **changes)


def lanes(cli: Cli, run: str) -> dict[str, dict[str, object]]:
    """The lanes of a run, by name."""
    return {item["lane"]: item for item in cli.show(run)["events"] if item["kind"] == "LaneDone"}


def test_a_second_run_takes_the_kept_node_over(cli: Cli) -> None:
    """Nothing is rented, sent or looked for again; each pays its part of one bill; what is busy, gone or another kind is refused."""
    (cli.home / "keep.yaml").write_text(short(cli, name="first", node={"on_finish": "keep"}))
    (cli.home / "run.yaml").write_text(short(cli, name="second"))
    cli.run("launch", "keep.yaml")
    first = cli.only()
    (node,) = cli.row(first)["nodes"]
    assert node["billing"] and not cli.row(first)["driver"]
    chosen = next(cli.home.glob("node-home/*/llmctl/environments/*.json"))
    noted = chosen.stat().st_mtime_ns
    rehearsed = cli.json("launch", "run.yaml", "--on", first, "--dry-run")
    assert [effect["effect"] for effect in rehearsed["effects"]] == ["Claim"]

    launch = cli.start("launch", "run.yaml", "--on", node["id"])
    second = cli.wait(
        lambda: next((row["run"] for row in cli.json("status") if row["name"] == "second"), None)
    )
    cli.wait(lambda: cli.row(second)["nodes"])
    assert "busy" in cli.run("launch", "run.yaml", "--on", node["id"], code=5).stderr
    assert f"serves {second} now" in cli.run("stop", first).stderr, "it has nothing to stop any more"
    os.kill(cli.driver_pid(second), signal.SIGKILL)  # whoever follows starts another one
    launch.communicate(timeout=120)
    assert launch.returncode == 0

    one, two = cli.show(first), cli.show(second)
    assert (two["state"], two["reason"]) == ("succeeded", "finished")
    kinds = [item["kind"] for item in two["events"]]
    assert (kinds.count("NodeClaimed"), kinds.count("LaunchIntended"), kinds.count("NodeGone")) == (1, 0, 1)
    assert "TerminateIntended" not in [item["kind"] for item in one["events"]]
    assert {name: lane["sent_bytes"] for name, lane in lanes(cli, second).items()} == {
        "code": 0, "environment": 0, "first shards": 0, "data": 0, "ready": 0,
    }  # fmt: skip
    assert chosen.stat().st_mtime_ns == noted, "no environment was looked for"
    assert lanes(cli, first)["data"]["hash"] == lanes(cli, second)["data"]["hash"]
    claimed = next(item["at"] for item in two["events"] if item["kind"] == "NodeClaimed").replace(
        "Z", "+00:00"
    )
    assert one["charges"][-1]["end"] == claimed == two["charges"][0]["start"]
    seconds = one["billed_seconds"] + two["billed_seconds"]
    assert one["cost_usd"] + two["cost_usd"] == pytest.approx(seconds * 3.6 / 3600, abs=2e-6)
    assert not one["cost_is_upper_bound"] and not two["cost_is_upper_bound"]

    assert "is gone" in cli.run("launch", "run.yaml", "--on", node["id"], code=5).stderr
    assert "no node is called" in cli.run("launch", "run.yaml", "--on", "nowhere", code=2).stderr
    cli.run("rm", first, "-y")
    cli.run("rm", second, "-y")


def test_a_node_of_another_kind_is_refused(cli: Cli) -> None:
    """And the kept one is released by `stop` of the run that keeps it."""
    (cli.home / "keep.yaml").write_text(short(cli, node={"on_finish": "10m"}))
    cli.run("launch", "keep.yaml")
    first = cli.only()
    other = short(cli, hardware={"provider": "ssh", "host": "127.0.0.1", "user": "nobody"})
    (cli.home / "other.yaml").write_text(other)
    assert "asks for ssh" in cli.run("launch", "other.yaml", "--on", first, code=3).stderr
    cli.run("stop", first)
    (node,) = cli.row(first)["nodes"]
    assert node["status"] == "gone", "`stop` ends when that is confirmed"
    assert "is gone" in cli.run("launch", "keep.yaml", "--on", first, code=5).stderr
