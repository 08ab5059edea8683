"""The provider over real HTTP to a server of its own process, whose instances are real SSH nodes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from provisioning import keys, lambda_cloud
from provisioning.base import Ambiguous, Home, LaunchRequest, NoCapacity, Refused
from provisioning.lambda_cloud import LambdaCloud
from runs.facts import Marker, NodeFacts
from tests.lambda_fixtures import CLIENT, REPOSITORY, Cloud, cloud, lambda_cloud_factory, request

__all__ = ["cloud", "lambda_cloud_factory"]
LAUNCH, TERMINATE = "instance-operations/launch", "instance-operations/terminate"
Factory = Callable[..., Cloud]


def use(made: Cloud, monkeypatch: pytest.MonkeyPatch, home: Path, **hardware: object) -> LambdaCloud:
    for name, value in made.environment(home).items():
        monkeypatch.setenv(name, value)
    return lambda_cloud.open(Home(home, "0123abcd"), hardware)


def until(look: Callable[[], Any], seconds: float = 60) -> Any:
    """The first truthy value of `look`, which asks the provider and so paces itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
    raise AssertionError("it did not come to that")


def status(provider: LambdaCloud, node: str) -> str:
    facts = provider.find(node)
    return facts.status if facts else "gone"


def log_in(node: NodeFacts, host_public_key: str) -> str:
    """What the node says to `echo` over a connection whose host key is already known."""

    async def go() -> str:
        known = ([asyncssh.import_public_key(host_public_key)], [], [])
        key = asyncssh.import_private_key(CLIENT.private)
        async with asyncssh.connect(
            node.ip or "", node.port, username=node.user, client_keys=[key], known_hosts=known, config=None
        ) as connection:
            result = await connection.run("echo $((6 * 7))", check=True)
            return str(result.stdout).strip()

    return asyncio.run(go())


def reachable(provider: LambdaCloud, node: str) -> NodeFacts | None:
    """The node once its port accepts connections (`active` does not mean that)."""
    facts = provider.find(node)
    if facts is None or facts.status != "active":
        return None
    with socket.socket() as probe:
        probe.settimeout(2)
        return facts if probe.connect_ex((facts.ip or "", facts.port)) == 0 else None


def end(provider: LambdaCloud, node: str) -> None:
    """Terminate, and believe it only when it is seen."""
    provider.terminate(node)
    until(lambda: status(provider, node) in ("terminated", "gone"))


def smoke(provider: LambdaCloud, wanted: LaunchRequest, boot_seconds: float) -> None:
    """The cheapest life: launched, logged into over a connection that was verified from the first byte, ended. The live
    smoke runs this very function."""
    try:
        node = provider.launch(wanted)
    except Ambiguous:  # it may be there all the same
        found = until(lambda: provider.inventory().find(wanted.marker.key), 180)
        end(provider, found.id)
        raise
    try:
        facts = until(lambda: reachable(provider, node), boot_seconds)
        assert (facts.key, facts.owner) == (wanted.marker.key, wanted.owner)
        assert log_in(facts, wanted.host_public_key or "") == "42"
    finally:
        for _ in range(20):
            try:
                end(provider, node)
                break
            except (Ambiguous, Refused) as error:
                print(error)
        else:
            raise AssertionError(f"{node} may still be billing: end it in the console")
    assert [
        item.id
        for item in provider.inventory().nodes
        if item.status == "active" and item.key == wanted.marker.key
    ] == []


def test_a_life_with_real_ssh(cloud: Cloud, tmp_path: Path) -> None:
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    smoke(provider, request(), 30)
    (machine,) = cloud.machines()
    assert (machine["terminates"], machine["status"]) == (1, "terminated")


@pytest.mark.slow
def test_a_life_at_the_real_pace_never_meets_a_limit(
    lambda_cloud_factory: Factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = lambda_cloud_factory(pace=1.0, boot_seconds=2.0)
    provider = use(made, monkeypatch, tmp_path / "home")
    assert [check.ok for check in provider.check()] == [True] * 4
    smoke(provider, request(), 30)
    assert {row["status"] for row in made.state()["requests"]} == {200}


@pytest.mark.live
@pytest.mark.skipif(
    not (os.environ.get("LLMCTL_LIVE_LAMBDA") and os.environ.get("LAMBDA_API_KEY")),
    reason="spends real money: set LLMCTL_LIVE_LAMBDA=1 and LAMBDA_API_KEY",
)
def test_the_live_smoke(tmp_path: Path) -> None:
    provider = lambda_cloud.open(Home(tmp_path, "5e0ce5e0"), {})
    offer = min(
        (offer for offer in provider.offers({}) if offer.available), key=lambda offer: offer.usd_per_hour
    )
    assert offer.usd_per_hour <= 5, "the cheapest free type is too dear for a smoke"
    wanted = request(run=f"smoke-{os.urandom(2).hex()}", owner="5e0ce5e0")
    lease = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=45)
    marker = Marker(run=wanted.marker.run, attempt=1, index=0, lease_end=lease)
    host = keys.host_key(tmp_path, marker.key)
    chosen = LaunchRequest(marker, offer, "5e0ce5e0", CLIENT.public, host.private, host.public)
    smoke(provider, chosen, 1800)


def test_an_image_that_ignores_user_data_shows_another_host_key(cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(user_data_ignored=True)
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    wanted = request()
    node = provider.launch(wanted)
    facts = until(lambda: reachable(provider, node))
    with pytest.raises(asyncssh.HostKeyNotVerifiable):
        log_in(facts, wanted.host_public_key or "")
    end(provider, node)


def test_active_is_not_yet_ssh(cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(ssh_delay=60, boot_seconds=0)
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    wanted = request()
    node = provider.launch(wanted)
    until(lambda: status(provider, node) == "active")
    assert reachable(provider, node) is None
    assert log_in(until(lambda: reachable(provider, node)), wanted.host_public_key or "") == "42"
    end(provider, node)


def test_ssh_that_never_opens(cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(ssh="never", boot_seconds=0)
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    node = provider.launch(request())
    until(lambda: status(provider, node) == "active")
    for _ in range(5):
        assert reachable(provider, node) is None
    end(provider, node)


@pytest.mark.parametrize("how", ["terminated", "preempted", "vanished", "unhealthy"])
def test_a_node_that_dies_takes_its_ssh_with_it(cloud: Cloud, tmp_path: Path, how: str) -> None:
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    wanted = request()
    node = provider.launch(wanted)
    facts = until(lambda: reachable(provider, node))
    cloud.kill(node, how)
    assert status(provider, node) == {"vanished": "gone"}.get(how, how)

    def refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((facts.ip or "", facts.port)) != 0

    until(refused)
    if how == "unhealthy":  # it goes on billing until it is ended
        assert [row["id"] for row in cloud.billing()] == [node]
    provider.terminate(node)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "lose-answer"},
        {"kind": "lie", "status": 503},
        {"kind": "lie", "status": 429, "code": None},
        {"kind": "garbage"},
    ],
)
def test_a_launch_whose_answer_is_lost_is_found_by_its_marker(
    cloud: Cloud, tmp_path: Path, fault: dict[str, Any]
) -> None:
    cloud.set(list_lag=20.0, echo_tags=False)
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    cloud.fault(LAUNCH, **fault)
    wanted = request()
    with pytest.raises(Ambiguous):
        provider.launch(wanted)
    found = until(lambda: provider.inventory().find(wanted.marker.key))
    assert len(cloud.sent(LAUNCH)) == len(cloud.machines()) == 1
    until(lambda: status(provider, found.id) == "active")
    end(provider, found.id)


def test_capacity_in_the_third_region_only(cloud: Cloud, tmp_path: Path) -> None:
    places = ["us-west-1", "us-east-1", "us-south-2"]
    cloud.set(
        capacity={"gpu_1x_a10": places}, ghost_capacity=["gpu_1x_a10/us-west-1", "gpu_1x_a10/us-east-1"]
    )
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    offers = provider.offers({"gpu": "A10:1"})
    assert [(offer.region, offer.available) for offer in offers] == [(place, True) for place in places]
    for place in places[:2]:
        with pytest.raises(NoCapacity):
            provider.launch(request(region=place))
    end(provider, provider.launch(request(region=places[2])))
    assert [row["status"] for row in cloud.sent(LAUNCH)] == [400, 400, 200]


def test_a_terminate_that_fails_five_times_and_lies_twice(cloud: Cloud, tmp_path: Path) -> None:
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    node = provider.launch(request())
    until(lambda: status(provider, node) == "active")
    cloud.fault(TERMINATE, "refuse", times=5, status=503, code=None)
    cloud.set(terminate_lies=2)
    for _ in range(5):
        with pytest.raises(Ambiguous):
            provider.terminate(node)
    for _ in range(2):
        provider.terminate(node)
        assert status(provider, node) == "active"
    assert len(cloud.billing()) == 1
    end(provider, node)
    assert len(cloud.sent(TERMINATE)) == 8


READER = """
import sys
from pathlib import Path
from provisioning import lambda_cloud
from provisioning.base import Home
provider = lambda_cloud.open(Home(Path(sys.argv[1]), sys.argv[1][-1] * 8), {})
for _ in range(int(sys.argv[2])):
    getattr(provider, sys.argv[3])(*(["0" * 32] if sys.argv[3] == "find" else []))
"""


def processes(made: Cloud, tmp_path: Path, count: int, method: str, times: int) -> None:
    """`count` llmctl processes of one user, each with an LLMCTL_HOME of its own."""
    started = []
    for number in range(count):
        home = tmp_path / f"home{number}"
        argv = [sys.executable, "-c", READER, str(home), str(times), method]
        started.append(subprocess.Popen(argv, env=os.environ | made.environment(home), cwd=REPOSITORY))
    assert [process.wait(120) for process in started] == [0] * count


def test_processes_of_one_user_share_the_pace(lambda_cloud_factory: Factory, tmp_path: Path) -> None:
    made = lambda_cloud_factory(pace=0.2)
    processes(made, tmp_path, 3, "find", 4)
    rows = made.state()["requests"]
    assert [row["status"] for row in rows] == [404] * 12


def test_limits_that_are_stricter_than_documented_cost_time_only(cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(request_interval=2.5, launch_interval=30.0)
    provider = lambda_cloud.open(Home(tmp_path / "home", "0123abcd"), {})
    assert [check.ok for check in provider.check()] == [True] * 4
    nodes: list[str] = []

    def launch() -> bool:
        try:
            nodes.append(provider.launch(request(attempt=len(nodes) + 1)))
        except Ambiguous as error:
            assert error.code == "http-429"
        return len(nodes) == 2

    until(launch)
    assert len(cloud.machines()) == 2
    assert 429 in {row["status"] for row in cloud.sent("")}
    for node in nodes:

        def ended(node: str = node) -> bool:
            try:
                provider.terminate(node)
            except Ambiguous:
                return False
            return True

        until(ended)


def test_processes_of_one_user_share_one_inventory(lambda_cloud_factory: Factory, tmp_path: Path) -> None:
    made = lambda_cloud_factory(pace=5.0, rate_limits=False)  # a reading stays young for 25 s
    processes(made, tmp_path, 4, "inventory", 3)
    assert len(made.sent("GET /instances")) == 1


def test_the_server_never_outlives_its_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Cloud(tmp_path / "cloud")
    provider = use(made, monkeypatch, tmp_path / "home")
    node = provider.launch(request())
    facts = until(lambda: reachable(provider, node))
    assert made._process.stdin is not None
    made._process.stdin.close()
    assert made._process.wait(30) == 0
    with socket.socket() as probe:
        assert probe.connect_ex((facts.ip or "", facts.port)) != 0
