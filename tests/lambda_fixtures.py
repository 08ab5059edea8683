"""Fixtures around the Lambda-shaped server. In a test module or a conftest:

    from tests.lambda_fixtures import cloud, lambda_cloud_factory, paper  # noqa: F401

`cloud` is a well-behaved server, its own process with real SSH nodes; `lambda_cloud_factory(**switches)` makes one with
other switches. `paper` is a server in this process, without SSH nodes, whose time the test moves. All fail the test in their teardown when a request or an answer went against the API document, or
when an instance still bills that the test did not declare with `cloud.may_bill()`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from provisioning import keys, lambda_cloud
from provisioning.base import Home, LaunchRequest
from provisioning.lambda_cloud import LambdaCloud
from runs.facts import Marker, Offer, Tariff
from tests.lambda_server.server import PREFIX, LambdaServer
from tests.lambda_server.switches import Switches
from tests.lambda_server.world import Machine

CLIENT = keys.generate("llmctl")
"""The client key of the tests."""
REPOSITORY = Path(__file__).resolve().parents[1]
PACE = 0.05
"""Real seconds in a virtual one, unless a test says otherwise: a launch every 0.6 s, three looks in 3 s."""


def named(row: dict[str, Any]) -> str:
    """A request's method and path, without and with the prefix of the API's paths."""
    return f"{row['method']} {row['path']} {row['method']} {PREFIX}{row['path']}"


class Cloud:
    """A running server, and the test's door to it."""

    def __init__(self, directory: Path, **switches: Any) -> None:
        self.directory = directory
        self.pace = float(switches.setdefault("pace", PACE))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "switches.json").write_text(json.dumps(switches))
        argv = [
            sys.executable,
            "-m",
            "tests.lambda_server",
            "--attached",
            "--state",
            str(directory / "state"),
        ]
        self._process = subprocess.Popen(
            [*argv, "--switches", str(directory / "switches.json")],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server did not start"
        facts = json.loads(line)
        self.url: str = facts["url"]
        self.key: str = facts["key"]
        self._admin: str = facts["admin"]
        self._ports: str = facts["ports"]
        self._may_bill = False
        self._may_violate = False

    def environment(self, home: Path) -> dict[str, str]:
        """What a llmctl process needs to take this server for Lambda; `home` becomes LLMCTL_HOME."""
        return {
            "LLMCTL_HOME": str(home),
            "LAMBDA_API_BASE_URL": self.url,
            "LAMBDA_API_KEY": self.key,
            "LLMCTL_TEST_PACE": str(self.pace),
            "LLMCTL_TEST_SSH_PORTS": self._ports,
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "NO_PROXY": "127.0.0.1",
        }

    def set(self, **switches: Any) -> None:
        """Change switches while it runs (tests/lambda_server/switches.py)."""
        self._call("/admin/switches", switches)

    def fault(self, match: str, kind: str, times: int = 1, **more: Any) -> None:
        """What happens to the next `times` requests whose `METHOD /path` contains `match`."""
        self._call("/admin/fault", {"match": match, "kind": kind, "times": times} | more)

    def kill(self, machine_id: str, how: str = "terminated") -> None:
        """The instance dies by itself: terminated, unhealthy, preempted or vanished."""
        self._call("/admin/kill", {"id": machine_id, "how": how})

    def foreign(self, **request: Any) -> None:
        """Someone else's instance (name, tags …), which bills until somebody ends it."""
        self._call("/admin/foreign", request)

    def state(self) -> dict[str, Any]:
        """machines, ledger, requests, violations, switches, keys."""
        return self._call("/admin/state", None)

    def machines(self) -> list[dict[str, Any]]:
        """Every instance there ever was: {id, name, region, type, status, terminates, lies, user_data, keys}."""
        machines: list[dict[str, Any]] = self.state()["machines"]
        return machines

    def billing(self) -> list[dict[str, Any]]:
        """Ledger rows whose meter runs."""
        return [row for row in self.state()["ledger"] if row["billing"]]

    def usd(self) -> float:
        """The provider's own bill so far."""
        return sum(float(row["usd"]) for row in self.state()["ledger"])

    def sent(self, match: str) -> list[dict[str, Any]]:
        """Requests whose `METHOD /path` contains `match`: {method, path, at, status, effect}."""
        return [row for row in self.state()["requests"] if match in named(row)]

    def wait_for(self, what: Callable[[Cloud], Any], seconds: float = 60.0) -> Any:
        """The first truthy `what(cloud)`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := what(self):
                return found
            time.sleep(0.05)
        raise AssertionError(f"not so after {seconds} s: {self.state()}")

    def may_bill(self) -> None:
        """The test leaves an instance on purpose."""
        self._may_bill = True

    def may_violate(self) -> None:
        """The test breaks the API document on purpose."""
        self._may_violate = True

    def close(self) -> None:
        """End the server and its nodes, then complain about what was left."""
        try:
            state = self.state()
        finally:
            self._process.terminate()
            assert self._process.wait(60) == 0
        assert state["unfired"] == [], "these faults never happened: the test shows nothing"
        if not self._may_violate:
            assert state["violations"] == []
        if not self._may_bill:
            assert [row for row in state["ledger"] if row["billing"]] == []

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(self._admin + path, data=data), timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@pytest.fixture
def lambda_cloud_factory(tmp_path: Path) -> Iterator[Callable[..., Cloud]]:
    """Makes servers with the given switches; all are closed and checked at the end."""
    clouds: list[Cloud] = []

    def make(**switches: Any) -> Cloud:
        clouds.append(Cloud(tmp_path / f"cloud{len(clouds)}", **switches))
        return clouds[-1]

    yield make
    for cloud in clouds:
        cloud.close()


@pytest.fixture
def cloud(
    lambda_cloud_factory: Callable[..., Cloud], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Cloud:
    """A well-behaved server, which this process too takes for Lambda."""
    made = lambda_cloud_factory()
    for name, value in made.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    return made


class Paper:
    """A server in this process whose instances exist on paper, and whose clock stands until `tick`."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        self.directory = directory
        switches = Switches(rate_limits=False)
        self.server = LambdaServer(directory, switches, real_nodes=False, clock=lambda: self.now).start()
        self.may_bill = False
        self.may_violate = False
        environment = {
            "LAMBDA_API_BASE_URL": self.server.url,
            "LAMBDA_API_KEY": self.server.key,
            "LLMCTL_TEST_PACE": "0.0001",
            "XDG_CACHE_HOME": str(directory / "cache"),
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    def provider(self, owner: str = "0123abcd", **hardware: object) -> LambdaCloud:
        """The provider of one LLMCTL_HOME."""
        return lambda_cloud.open(Home(self.directory / owner, owner), hardware)

    def set(self, **switches: Any) -> None:
        """Change switches."""
        self.server.world.set(switches)

    def fault(self, match: str, kind: str, times: int = 1, **more: Any) -> None:
        """See Cloud.fault."""
        self.server.admin("/admin/fault", {"match": match, "kind": kind, "times": times} | more)

    def tick(self, seconds: float) -> None:
        """Let time pass at the provider."""
        self.now += seconds
        with self.server.world.lock:
            self.server.world.advance()

    def sent(self, match: str) -> list[dict[str, Any]]:
        """Requests whose `METHOD /path` contains `match`."""
        return [row for row in self.server.requests if match in named(row)]

    @property
    def machines(self) -> list[Machine]:
        """Every instance there ever was."""
        return list(self.server.world.machines.values())


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paper]:
    """A server without nodes in this process."""
    made = Paper(tmp_path, monkeypatch)
    yield made
    made.server.stop()
    assert made.server.armed == made.server.fired, "some faults never happened: the test shows nothing"
    if not made.may_violate:
        assert made.server.violations == []
    if not made.may_bill:
        assert [row for row in made.server.world.ledger() if row["billing"]] == []


def request(
    run: str = "run-abcd",
    attempt: int = 1,
    *,
    region: str = "us-west-1",
    owner: str = "0123abcd",
    **options: object,
) -> LaunchRequest:
    """A launch of the cheapest GPU type, with real keys."""
    lease = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(hours=2)
    offer = Offer(
        provider="lambda",
        instance_type="gpu_1x_a10",
        region=region,
        gpu="A10-24GB",
        gpus=1,
        tariff=Tariff(micro_usd_per_hour=1_290_000, granularity_seconds=60),
    )
    host = keys.generate()
    return LaunchRequest(
        marker=Marker(run=run, attempt=attempt, index=0, lease_end=lease),
        offer=offer,
        owner=owner,
        public_key=CLIENT.public,
        host_private_key=host.private,
        host_public_key=host.public,
        options=options,
    )


def outside_environment() -> dict[str, str]:
    """This process's environment without anything that names a cloud account."""
    hidden = ("AWS_", "LAMBDA_", "LLMCTL_", "WANDB_", "HF_")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
