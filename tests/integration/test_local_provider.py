"""Providers `local` and `ssh` against the protocol in `provisioning.base`."""

from __future__ import annotations

import getpass
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator.remote.connection import Address
from orchestrator.remote.node import Remote, RemoteError
from provisioning import keys, local, open_provider, provider_names
from provisioning.base import Home, InvalidHardware, LaunchRequest, NoCapacity, Provider, Refused
from runs.facts import Marker, NodeFacts
from tests.nodes import until


def ask(home: Home, provider: Provider, attempt: int = 1, hours: float = 1) -> LaunchRequest:
    """A launch request as the driver makes it."""
    marker = Marker(
        run="quick-ab12", attempt=attempt, index=0, lease_end=datetime.now(UTC) + timedelta(hours=hours)
    )
    pair = keys.host_key(home.path, marker.key)
    keys.pin(keys.known_hosts(home.path, marker.key), pair.public)
    public = keys.public_key(keys.client_key(home.path))
    return LaunchRequest(marker, provider.offers({})[0], home.owner, public, pair.private, pair.public)


def address(home: Home, node: NodeFacts) -> Address:
    known = keys.known_hosts(home.path, node.id)
    return Address(node.ip or "", node.port, node.user, keys.client_key(home.path), known, node.id)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path, "0123abcd")


def test_registry(home: Home) -> None:
    assert {"local", "ssh", "lambda"} <= set(provider_names())
    assert isinstance(open_provider("local", home, {}), Provider)
    assert isinstance(open_provider("ssh", home, {"host": "h"}), Provider)
    with pytest.raises(InvalidHardware, match="no provider is called 'lokal'") as caught:
        open_provider("lokal", home, {})
    assert "local" in caught.value.hint


def test_offer_and_price(home: Home) -> None:
    (offer,) = open_provider("local", home, {"usd_per_hour": 0.35}).offers({})
    assert (offer.instance_type, offer.region, offer.tariff.micro_usd_per_hour) == ("local", "local", 350_000)
    assert open_provider("local", home, {}).offers({})[0].usd_per_hour == 0
    for bad in (-1, "much", float("nan"), float("inf")):
        with pytest.raises(InvalidHardware, match="usd_per_hour"):
            open_provider("local", home, {"usd_per_hour": bad})


def test_gpus_come_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Home) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'NVIDIA GeForce RTX 3090, 24576\\nNVIDIA GeForce RTX 3090, 24576\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    provider = open_provider("local", home, {})
    (offer,) = provider.offers({"gpu": "RTX3090"})
    assert (offer.gpu, offer.gpus) == ("RTX3090-24GB", 2)
    assert provider.offers({"gpu": "RTX3090-24GB:2"})
    assert provider.offers({"gpu": ["H100:8", "RTX3090:1"]})
    assert provider.offers({"gpu": "RTX3090:4"}) == []
    assert provider.offers({"gpu": "A100"}) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", (None, 0)),
        ("NVIDIA H100 80GB HBM3, 81559\n" * 8, ("H100-80GB", 8)),
        ("Strange Card, 1000\n", ("Strange Card", 1)),
        (
            "NVIDIA A100-SXM4-40GB, 40960\nNVIDIA A100-SXM4-40GB, 40960\nNVIDIA T400, [N/A]\n",
            ("A100-40GB", 2),
        ),
    ],
)
def test_parse_gpus(answer: str, expected: tuple[str | None, int]) -> None:
    assert local.parse_gpus(answer) == expected


def test_life_of_a_local_node(home: Home) -> None:
    provider = open_provider("local", home, {"usd_per_hour": 1.5})
    request = ask(home, provider)
    node_id = provider.launch(request)
    try:
        assert provider.launch(request) == node_id, "the same intent is the same node"
        node = until(lambda: (found := provider.find(node_id)) and found.status == "active" and found)
        assert node.name == request.marker.name
        assert (node.key, node.owner, node.micro_usd_per_hour) == (request.marker.key, home.owner, 1_500_000)
        with Remote(address(home, node)) as remote:
            assert remote.run(["whoami"]).exit_code == 0
            remote.write("cache/kept", b"1")
            later = request.marker.model_copy(
                update={"lease_end": request.marker.lease_end + timedelta(hours=3)}
            )
            provider.extend(node_id, later)
            assert provider.find(node_id).name == later.name
            provider.terminate(node_id)
            with pytest.raises(RemoteError):
                remote.run(["true"])
        assert provider.inventory().find(request.marker.key).status == "terminated"
        provider.terminate(node_id)
    finally:
        provider.terminate(node_id)
    assert provider.leftovers() == []


def test_homes_are_taken_in_turn_and_kept(home: Home) -> None:
    provider = open_provider("local", home, {})
    ids = [provider.launch(ask(home, provider, attempt)) for attempt in (1, 2)]
    try:
        until(lambda: all(provider.find(node_id).status == "active" for node_id in ids))
        homes = [Path(home.path / "node-home" / name) for name in "01"]
        assert all(place.is_dir() for place in homes)
        (homes[0] / "cached").write_text("1")
        provider.terminate(ids[0])
        ids.append(provider.launch(ask(home, provider, 3)))
        third = until(lambda: (found := provider.find(ids[2])) and found.status == "active" and found)
        with Remote(address(home, third)) as remote:
            assert remote.read("cached") == b"1"
    finally:
        for node_id in ids:
            provider.terminate(node_id)


def test_unwritable_home_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    home = Home(tmp_path / "file", "o")
    provider = open_provider("local", home, {})
    good = Home(tmp_path / "good", "o")
    with pytest.raises(Refused, match="could not be started") as caught:
        provider.launch(ask(good, provider))
    assert caught.value.hint


def test_ids_that_lead_elsewhere(home: Home) -> None:
    provider = open_provider("local", home, {})
    for bad in ("../x", "", ".."):
        with pytest.raises(InvalidHardware):
            provider.terminate(bad)
    assert provider.find("llmctl-none-ab12-a1-n0") is None
    provider.terminate("llmctl-none-ab12-a1-n0")


def test_ssh_host_has_one_claim_at_a_time(home: Home) -> None:
    hardware: dict[str, object] = {"host": "box.example", "port": 2222, "user": "me", "usd_per_hour": 2}
    provider = open_provider("ssh", home, hardware)
    first, second = ask(home, provider, 1), ask(home, provider, 2)
    assert provider.launch(first) == first.marker.key
    assert provider.launch(first) == first.marker.key
    assert provider.offers({})[0].available is False
    with pytest.raises(NoCapacity, match=first.marker.key):
        provider.launch(second)
    node = open_provider("ssh", home, {}).find(first.marker.key)
    assert node is not None, "any process of this home sees the claim"
    assert (node.ip, node.port, node.user, node.status) == ("box.example", 2222, "me", "active")
    assert open_provider("ssh", home, hardware | {"host": "other"}).launch(second)
    provider.terminate(first.marker.key)
    assert provider.find(first.marker.key) is None
    assert provider.offers({})[0].available


def test_ssh_claims_race(home: Home) -> None:
    provider = open_provider("ssh", home, {"host": "h"})
    requests = [ask(home, provider, attempt) for attempt in range(1, 7)]
    barrier, won = threading.Barrier(len(requests)), []

    def claim(request: LaunchRequest) -> None:
        barrier.wait()
        try:
            won.append(provider.launch(request))
        except NoCapacity:
            return

    threads = [threading.Thread(target=claim, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert [node.id for node in provider.inventory().nodes] == won


def test_ssh_pin_outlives_the_claim(home: Home) -> None:
    provider = open_provider("ssh", home, {"host": "h"})
    first = ask(home, provider, 1)
    keys.known_hosts(home.path, first.marker.key).unlink()
    provider.launch(first)
    shown = keys.generate().public
    keys.pin(keys.known_hosts(home.path, first.marker.key), shown)
    provider.terminate(first.marker.key)
    second = Marker(run="quick-ab12", attempt=2, index=0, lease_end=datetime.now(UTC))
    provider.launch(LaunchRequest(second, first.offer, "o", "k", None, None))
    assert keys.pinned(keys.known_hosts(home.path, second.key)) == [tuple(shown.split())]


def test_ssh_bad_hardware(home: Home, tmp_path: Path) -> None:
    for hardware in ({"host": "h", "port": 0}, {"host": "h", "port": "x"}, {"host": "h", "usd_per_hour": -1}):
        with pytest.raises(InvalidHardware):
            open_provider("ssh", home, dict(hardware))
    provider = open_provider("ssh", home, {"host": "h", "identity_file": str(tmp_path / "no")})
    with pytest.raises(InvalidHardware, match="No such file"):
        provider.launch(ask(home, open_provider("ssh", home, {"host": "h"})))
    assert open_provider("ssh", home, {}).offers({}) == []
    assert getpass.getuser() in open_provider("ssh", home, {"host": "h"}).offers({})[0].description
