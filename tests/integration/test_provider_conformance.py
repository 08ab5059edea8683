"""What the rest of the program relies on in every provider (docs/providers.md): one suite, each provider in its own small world.

A new provider adds a `World` here; the suite is red until it does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest

from provisioning import open_provider, provider_names
from provisioning.base import Ambiguous, Home, LaunchRequest, Provider, Unavailable
from runs.facts import ENDED, Marker, NodeFacts
from runs.rows import MICRO
from runs.sections import HARDWARE
from tests.aws_server import AwsServer, aws, aws_factory  # noqa: F401
from tests.lambda_fixtures import Paper, paper  # noqa: F401
from tests.lambda_fixtures import request as plain_request

OWNER, NEIGHBOUR = "0123abcd", "89ef4567"


@dataclass
class World:
    """A provider, and what a test does to the wire and to time."""

    name: str
    root: Path
    hardware: dict[str, object]
    lose: Callable[[str], None] | None = None
    """Make the next launch lose its `request` or its `answer`; None: nothing lies between this program and the nodes."""
    deafen: Callable[[], None] | None = None
    """Make the reads of the next inventory fail for good; None as above."""
    tick: Callable[[float], None] = lambda _: None
    """Let seconds pass at the provider."""
    opened: dict[str, Provider] = field(default_factory=dict)
    """By owner."""

    def fresh(self, owner: str = OWNER) -> Provider:
        """The provider as a process that has just begun opens it, from the LLMCTL_HOME of `owner`."""
        home = Home(self.root / owner, owner)
        home.path.mkdir(exist_ok=True)
        self.opened[owner] = open_provider(self.name, home, self.hardware)
        return self.opened[owner]

    def open(self, owner: str = OWNER) -> Provider:
        """The one that was opened last."""
        return self.opened.get(owner) or self.fresh(owner)

    def request(self, attempt: int = 1, owner: str = OWNER) -> LaunchRequest:
        """For the first free offer."""
        offers = self.open(owner).offers(self.hardware)
        offer = next(offer for offer in offers if offer.available)
        plain = plain_request(attempt=attempt, owner=owner, **self.hardware)
        return dataclasses.replace(plain, offer=offer)

    def settle(self) -> None:
        """Long enough for a boot or an end, and for a reading that is shared to be old."""
        self.tick(30)

    def look(self, key: str, owner: str = OWNER) -> NodeFacts | None:
        """The node of that intent in an inventory of now."""
        provider = self.open(owner)
        if (shared := getattr(provider, "_shared", None)) is not None:
            shared.forget()
        return provider.inventory().find(key)


def _local(case: pytest.FixtureRequest, root: Path) -> World:
    return World("local", root, {"usd_per_hour": 0.35})


def _ssh(case: pytest.FixtureRequest, root: Path) -> World:
    return World("ssh", root, {"host": "box", "usd_per_hour": 0.35})


def _lambda(case: pytest.FixtureRequest, root: Path) -> World:
    server: Paper = case.getfixturevalue("paper")
    return World(
        "lambda", root, {"gpu": "A10:1"},
        lose=lambda what: server.fault("instance-operations/launch", f"lose-{what}"),
        deafen=lambda: server.fault("GET /instances", "refuse", times=5, status=500, code=None),
        tick=server.tick,
    )  # fmt: skip


def _ec2(case: pytest.FixtureRequest, root: Path) -> World:
    server: AwsServer = case.getfixturevalue("aws")
    return World(
        "ec2", root, {"gpu": "A10G:1", "regions": ["us-east-1"]},
        lose=lambda what: server.fault("RunInstances", f"lose-{what}"),
        deafen=lambda: server.fault("DescribeInstances", "refuse", times=4, code="InternalError", status=500),
    )  # fmt: skip


WORLDS = {"local": _local, "ssh": _ssh, "lambda": _lambda, "ec2": _ec2}
WIRED = ["lambda", "ec2"]
"""Those whose requests and answers may get lost."""


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """With nothing left in it: what a test launched ends with it, and the suite fails where it does not."""
    root = tmp_path / "homes"
    root.mkdir()
    made = WORLDS[request.param](request, root)
    yield made
    for owner, provider in made.opened.items():
        for node in provider.inventory().nodes:
            if node.owner == owner and node.status not in ENDED:
                provider.terminate(node.id)


def test_every_provider_is_in_this_suite() -> None:
    """And each that can be opened can be written in a spec."""
    assert list(WORLDS) == provider_names() == list(HARDWARE)


def test_traits_say_what_a_decision_may_rely_on(world: World) -> None:
    provider = world.open()
    assert isinstance(provider, Provider) and provider.name == world.name
    traits = provider.traits
    behind_a_wire = world.name in WIRED
    assert traits.rented == behind_a_wire == (world.lose is not None)
    # One look settles it only where nothing can arrive late.
    assert (traits.looks >= 3 and traits.look_seconds > 0) if behind_a_wire else traits.looks == 1
    assert traits.unguarded == (traits.rented and not traits.lease_on_node)
    assert traits.host_key in {"injected", "accept-new"}
    checks = provider.check()
    assert checks and all(check.ok or check.hint for check in checks)
    assert all(isinstance(sentence, str) for sentence in provider.leftovers())


def test_offers_have_a_price_and_keep_to_the_section(world: World) -> None:
    provider = world.open()
    everything, fitting = provider.offers({}), provider.offers(world.hardware)
    assert fitting and {offer.instance_type for offer in fitting} <= {
        offer.instance_type for offer in everything
    }
    for offer in everything:
        assert offer.provider == world.name and offer.instance_type
        assert offer.region or not offer.available, "what can be launched is somewhere"
        assert (offer.gpus > 0) == (offer.gpu is not None)
        assert isinstance(offer.tariff.micro_usd_per_hour, int)
        assert offer.tariff.granularity_seconds >= 1 and offer.tariff.minimum_seconds >= 0
        assert offer.tariff.micro_usd_per_hour > 0
    if provider.traits.rented:
        dearest = max(offer.tariff.micro_usd_per_hour for offer in fitting)
        below = provider.offers({**world.hardware, "max_usd_per_hour": (dearest - 1) / MICRO})
        assert all(offer.tariff.micro_usd_per_hour < dearest for offer in below)
        pair = {**world.hardware, "max_usd_per_hour": (2 * dearest - 1) / MICRO, "nodes": 2}
        assert all(offer.tariff.micro_usd_per_hour < dearest for offer in provider.offers(pair))
    else:
        assert [offer.tariff.micro_usd_per_hour for offer in fitting] == [350_000]


def test_a_node_carries_its_marker_owner_lease_and_price_until_its_end(world: World) -> None:
    wanted = world.request()
    assert wanted.host_private_key is not None
    shown = json.dumps(world.open().redacted(wanted), default=str)
    secret = wanted.host_private_key.splitlines()[1]
    assert wanted.marker.name in shown and secret not in shown and secret not in repr(wanted)
    assert world.look(wanted.marker.key) is None, "showing a request launches nothing"

    node_id = world.open().launch(wanted)
    world.settle()
    node = world.look(wanted.marker.key)
    assert node is not None and (node.id, node.provider) == (node_id, world.name)
    assert node.status in {"booting", "active"}
    assert Marker.parse(node.name) == wanted.marker
    assert (node.key, node.owner, node.lease_end) == (wanted.marker.key, OWNER, wanted.marker.lease_end)
    assert node.micro_usd_per_hour == wanted.offer.tariff.micro_usd_per_hour
    found = world.open().find(node_id)
    assert found is not None and (found.id, found.key, found.owner) == (node_id, node.key, OWNER)

    later = wanted.marker.model_copy(update={"lease_end": wanted.marker.lease_end + timedelta(hours=3)})
    world.open().extend(node_id, later)
    node = world.look(later.key)
    assert node is not None and (node.lease_end, node.id) == (later.lease_end, node_id)

    world.open().terminate(node_id)
    world.settle()
    found = world.open().find(node_id)
    assert found is None or found.status in ENDED
    node = world.look(later.key)
    assert node is None or node.status in ENDED
    world.open().terminate(node_id)  # what is gone already is a success


def test_a_launch_whose_answer_is_lost_is_found_by_its_marker(world: World) -> None:
    """The program dies, or the wire does: what there is, the inventory shows under the marker, once and with its owner."""
    wanted = world.request()
    expected: AbstractContextManager[object] = nullcontext()
    if world.lose is not None:
        world.lose("answer")
        expected = pytest.raises(Ambiguous)
    with expected:
        world.open().launch(wanted)  # its answer is forgotten
    world.settle()
    world.fresh()
    node = world.look(wanted.marker.key)
    assert node is not None and (node.owner, node.lease_end) == (OWNER, wanted.marker.lease_end)
    alive = [item.id for item in world.open().inventory().nodes if item.status not in ENDED]
    assert alive == [node.id]


@pytest.mark.parametrize("world", WIRED, indirect=True)
def test_a_launch_that_never_arrived_is_ambiguous_and_not_sent_again(world: World) -> None:
    wanted = world.request()
    assert world.lose is not None
    world.lose("request")
    with pytest.raises(Ambiguous):
        world.open().launch(wanted)
    world.settle()
    assert world.look(wanted.marker.key) is None


def test_an_inventory_tells_whose_each_node_is(world: World) -> None:
    """Two homes on one account. Where the account is shared, each sees the other's nodes, and whose they are."""
    mine, other = world.request(1), world.request(2, NEIGHBOUR)
    world.open().launch(mine)
    world.open(NEIGHBOUR).launch(other)
    world.settle()
    whose = {item.key: item.owner for item in world.open().inventory().nodes}
    both = {mine.marker.key: OWNER, other.marker.key: NEIGHBOUR}
    assert whose == (both if world.open().traits.rented else {mine.marker.key: OWNER})
    seen = world.look(other.marker.key, NEIGHBOUR)
    assert seen is not None and seen.owner == NEIGHBOUR


@pytest.mark.parametrize("world", WIRED, indirect=True)
def test_a_look_that_fails_is_no_empty_inventory(world: World) -> None:
    assert world.deafen is not None
    world.deafen()
    with pytest.raises(Unavailable):
        world.open().inventory()
