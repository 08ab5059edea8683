"""The script that ends a node by itself (`node.self_terminate: true`), run for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from provisioning import lambda_cloud
from provisioning.base import Home, LaunchRequest
from provisioning.cloudinit import SelfTerminate, guard_files
from runs.facts import Marker
from tests.lambda_fixtures import Cloud, Paper, cloud, lambda_cloud_factory, paper, request

__all__ = ["cloud", "lambda_cloud_factory", "paper"]
TERMINATE = "instance-operations/terminate"


def past(minutes: int = 2) -> datetime:
    return datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=minutes)


def over(wanted: LaunchRequest, lease_end: datetime) -> LaunchRequest:
    """The same request with a lease that ends then."""
    import dataclasses

    return dataclasses.replace(wanted, marker=wanted.marker.model_copy(update={"lease_end": lease_end}))


class Guarded:
    """A node on paper, and the guard's directory as cloud-init would leave it."""

    def __init__(self, paper: Paper, lease_end: datetime, name: str = "guard") -> None:
        self.provider = paper.provider()
        wanted = over(request(), lease_end)
        self.marker = wanted.marker
        self.node = self.provider.launch(wanted)
        paper.tick(30)
        self.directory = paper.directory / name
        self.directory.mkdir()
        guard = SelfTerminate(paper.server.key, paper.server.url, wanted.marker.key, lease_end)
        for file in guard_files(guard):
            (self.directory / Path(file["path"]).name).write_text(file["content"])
        self.settings = self.directory / "settings.json"
        self.settings.write_text(json.dumps(json.loads(self.settings.read_text()) | {"pause_seconds": 0}))

    def run(self) -> subprocess.CompletedProcess[str]:
        """One beat of the timer, on a bare Python."""
        env = {
            "LLMCTL_GUARD_DIRECTORY": str(self.directory),
            "PATH": os.environ["PATH"],
            "NO_PROXY": "127.0.0.1",
        }
        argv = [sys.executable, "-I", str(self.directory / "guard.py")]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_before_the_end_of_the_lease_it_asks_nobody(paper: Paper) -> None:
    guarded = Guarded(paper, past(-60))
    before = len(paper.server.requests)
    assert guarded.run().returncode == 0
    assert len(paper.server.requests) == before
    guarded.provider.terminate(guarded.node)


def test_after_it_the_machine_ends_itself_and_no_other(paper: Paper) -> None:
    guarded = Guarded(paper, past())
    other = guarded.provider.launch(request(attempt=11))  # its name begins like ours: …-a1 and …-a11
    paper.tick(30)
    done = guarded.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert [machine.terminate_accepted is not None for machine in paper.machines] == [True, False]
    again = guarded.run()
    assert again.returncode == 0
    assert len(paper.sent(TERMINATE)) == 1
    guarded.provider.terminate(other)


@pytest.mark.parametrize(("name", "tags"), [(True, False), (False, True)])
def test_either_echo_tells_which_machine_it_is(paper: Paper, name: bool, tags: bool) -> None:
    paper.set(echo_name=name, echo_tags=tags)
    assert Guarded(paper, past()).run().returncode == 0
    assert paper.machines[0].terminate_accepted is not None


def test_without_any_echo_it_ends_nothing_and_goes_on_trying(paper: Paper) -> None:
    paper.set(echo_name=False, echo_tags=False)
    guarded = Guarded(paper, past())
    done = guarded.run()
    assert done.returncode == 1
    assert "does not show this machine" in done.stderr
    assert paper.sent(TERMINATE) == []
    guarded.provider.terminate(guarded.node)


def test_an_extended_lease_is_read_from_the_name_and_remembered(paper: Paper) -> None:
    guarded = Guarded(paper, past())
    later = past(-90)
    guarded.provider.extend(guarded.node, Marker(run="run-abcd", attempt=1, index=0, lease_end=later))
    assert guarded.run().returncode == 0
    assert json.loads(guarded.settings.read_text())["lease_end"] == later.timestamp()
    assert guarded.settings.stat().st_mode & 0o777 == 0o600
    before = len(paper.server.requests)
    assert guarded.run().returncode == 0
    assert len(paper.server.requests) == before
    assert paper.sent(TERMINATE) == []
    guarded.provider.terminate(guarded.node)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "refuse", "status": 429, "code": None},
        {"kind": "refuse", "status": 500},
        {"kind": "refuse", "status": 401, "code": "global/invalid-api-key"},
        {"kind": "lose-request"},
        {"kind": "garbage"},
        {"kind": "empty"},
    ],
)
@pytest.mark.parametrize("match", ["GET /instances", TERMINATE])
def test_whatever_goes_wrong_it_tries_again_and_tells_no_secret(
    paper: Paper, match: str, fault: dict[str, Any]
) -> None:
    guarded = Guarded(paper, past())
    paper.fault(match, **fault)
    first = guarded.run()
    assert paper.server.key not in first.stdout + first.stderr
    if not (
        match == TERMINATE and fault["kind"] in ("garbage", "empty")
    ):  # then it was accepted all the same
        assert first.returncode == 1
        assert first.stderr
        assert guarded.run().returncode == 0
    assert paper.machines[0].terminate_accepted is not None


def test_a_node_ends_itself_while_nobody_else_lives(cloud: Cloud, tmp_path: Path) -> None:
    """End to end: user data as launched, the script on the node, the provider's list."""
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {"self_terminate": True})
    node = provider.launch(over(request(), past()))
    sent = len([row for row in cloud.sent("") if row["effect"]])
    cloud.wait_for(lambda made: made.machines()[0]["status"] == "terminated", 60)
    rows = cloud.sent("")[sent:]
    assert {row["path"] for row in rows} == {"/instances", f"/{TERMINATE}"}
    assert [row["id"] for row in cloud.state()["ledger"]] == [node]
    assert cloud.billing() == []


def test_user_data_that_is_ignored_leaves_the_node_alive(cloud: Cloud, tmp_path: Path) -> None:
    """Why the option is no substitute for `reap`."""
    cloud.set(user_data_ignored=True, boot_seconds=0)
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {"self_terminate": True})
    node = provider.launch(over(request(), past()))
    cloud.wait_for(lambda made: made.billing())
    deadline = time.monotonic() + 3 * 60 * cloud.pace / 3  # a beat of the timer, and some
    while time.monotonic() < deadline:
        assert provider.find(node) is not None
    assert cloud.billing()
    provider.terminate(node)
