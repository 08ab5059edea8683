"""The hands: intent before effect, outcome after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.actions.dryrun import plain
from orchestrator.life import world as w
from orchestrator.life.effects import Hands
from orchestrator.life.sight import SiteView
from provisioning.base import (
    Ambiguous,
    CredentialsError,
    LaunchRequest,
    NoCapacity,
    Refused,
    Traits,
    Unavailable,
)
from provisioning.keys import KeyFileError
from runs import events as e
from runs.facts import BillingEvidence, Inventory, NodeFacts
from runs.record import NodeRecord, RunRecord
from runs.store import StaleEpoch, Store
from tests.simulation.builders import KEY, OFFER, RUN, Story, at


class Fake:
    """A provider whose answers are set by the test; remembers what was in the store when it was called."""

    name = "sim"
    traits = Traits()

    def __init__(self, home: Path) -> None:
        self.home = home
        self.raises: Exception | None = None
        self.said = BillingEvidence(source="the log")
        self.nodes: list[NodeFacts] = []
        self.calls: list[tuple[str, Any, list[str]]] = []

    def _called(self, method: str, what: Any = None) -> None:
        kinds = [event.kind for event in Store(self.home).events(e.node_stream(KEY))]
        self.calls.append((method, what, kinds))
        if self.raises is not None:
            raise self.raises

    def launch(self, request: LaunchRequest) -> str:
        self._called("launch", request.marker.key)
        return "i-10"

    def terminate(self, node_id: str) -> None:
        self._called("terminate", node_id)

    def extend(self, node_id: str, marker: Any) -> None:
        self._called("extend", marker.name)

    def offers(self, hardware: dict[str, object]) -> list[Any]:
        self._called("offers", hardware)
        return [OFFER]

    def inventory(self) -> Inventory:
        self._called("inventory")
        return Inventory(at=at(50), nodes=self.nodes)

    def find(self, node_id: str) -> NodeFacts | None:
        self._called("find", node_id)
        return next((node for node in self.nodes if node.id == node_id), None)

    def billing_evidence(self, node_id: str, since: Any) -> BillingEvidence:
        self._called("billing_evidence", (node_id, since))
        return self.said


class StoppedClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> Any:
        return at(self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    def wait(self, event: Any, seconds: float) -> None:
        self.seconds += seconds


class Bench:
    """A store with a story in it, and hands over a fake provider."""

    def __init__(self, home: Path, story: Story) -> None:
        self.store = Store(home, synchronous="OFF")
        self.store.commit(story.changes)
        self.provider, self.clock = Fake(home), StoppedClock()
        self.clock.seconds = story.t
        request = lambda marker, offer: LaunchRequest(marker, offer, "owner", "", None, None)  # noqa: E731
        self.hands = Hands(self.store, self.provider, None, self.clock, RUN, 1, request)  # type: ignore[arg-type]

    @property
    def record(self) -> RunRecord:
        record = self.store.record(RUN)
        assert record is not None
        return record

    @property
    def node(self) -> NodeRecord:
        return self.record.nodes[0]

    def do(self, effect: w.Effect) -> None:
        self.hands.perform(effect, self.record)


@pytest.mark.parametrize(
    ("error", "answer", "capacity"),
    [
        (None, "known", False),
        (NoCapacity("out", code="sold"), "refused", True),
        (Refused("quota", code="quota", hint="raise it"), "refused", False),
        (CredentialsError("key", code="key"), "refused", False),
        (Ambiguous("time-out"), "ambiguous", False),
        (Unavailable("odd"), "ambiguous", False),
    ],
)
def test_a_launch_is_intended_called_once_and_its_outcome_kept(
    tmp_path: Path, error: Exception | None, answer: str, capacity: bool
) -> None:
    bench = Bench(tmp_path, Story().begun())
    bench.provider.raises = error
    bench.do(w.Launch(1, 0, OFFER, at(90)))
    assert bench.provider.calls == [("launch", KEY, ["LaunchIntended"])]
    assert (bench.node.answer, bench.node.capacity_refused) == (answer, capacity)
    assert bench.node.id == ("i-10" if error is None else None)
    assert (bench.node.refusal == "quota: quota; raise it") is (getattr(error, "hint", "") == "raise it")
    assert bench.node.marker.lease_end == at(120)


def test_a_key_that_went_away_refuses_the_launch(tmp_path: Path) -> None:
    def request(*_: object) -> LaunchRequest:
        raise KeyFileError("/nope: No such file or directory", hint="name a readable one")

    bench = Bench(tmp_path, Story().begun())
    bench.hands.request = request
    bench.do(w.Launch(1, 0, OFFER, at(90)))
    assert bench.provider.calls == [] and bench.node.answer == "refused"
    assert bench.node.refusal == "identity_file: /nope: No such file or directory; name a readable one"


@pytest.mark.parametrize(
    ("error", "accepted"), [(None, True), (Refused("no"), False), (Ambiguous("?"), False)]
)
def test_a_termination_is_intended_called_and_answered(
    tmp_path: Path, error: Exception | None, accepted: bool
) -> None:
    bench = Bench(tmp_path, Story().begun().launched())
    bench.provider.raises = error
    bench.do(w.Terminate(KEY, "why"))
    method, node_id, kinds = bench.provider.calls[0]
    assert (method, node_id, kinds[-1]) == ("terminate", "i-10", "TerminateIntended")
    assert (bench.node.terminate_accepted_at is not None) is accepted
    assert bench.node.gone_at is None


def _other_runs_driver(tmp_path: Path) -> Bench:
    """A driver of another run of the same home, which sees an inventory with a launch of ours that was given up."""
    bench = Bench(
        tmp_path, Story().begun().intended().after(70).tell(e.LaunchAbandoned(at=at(70))).attempt_ended("x")
    )
    facts = NodeFacts(id="i-77", name="", key=KEY, status="active", provider="sim", ip="1.1.1.1")
    bench.provider.nodes = [facts]
    created = Story().changes[0][1].model_copy(update={"run": "next-0001"})
    started = e.DriverStarted(at=at(1), epoch=1, pid=1, start_time=0.0, boot_id="b")
    bench.store.commit([(e.run_stream("next-0001"), created), (e.run_stream("next-0001"), started)])
    bench.hands.run = "next-0001"
    # The run of the late node had a driver of a higher epoch: what others do about its node is not stale for that.
    newer = [(e.run_stream(RUN), started.model_copy(update={"epoch": number})) for number in range(2, 5)]
    for change in newer:
        bench.store.commit([change])
    return bench


def test_a_late_arrival_is_found_and_intended_to_end_in_one_commit(tmp_path: Path) -> None:
    bench = _other_runs_driver(tmp_path)
    run = bench.store.record("next-0001")
    assert run is not None
    assert [node.key for node in bench.hands.given_up(run)] == [KEY]
    bench.hands.perform(w.Look("x"), run)
    bench.hands.perform(w.EndLate(KEY, "i-77"), run)
    method, node_id, kinds = bench.provider.calls[-1]
    assert (method, node_id) == ("terminate", "i-77")
    assert kinds[-3:] == ["LaunchFound", "NodeObserved", "TerminateIntended"]
    assert (bench.node.terminate_reason, bench.node.settled) == ("late arrival", False)
    assert [node.key for node in bench.hands.given_up(run)] == [KEY]
    calls = len(bench.provider.calls)
    bench.hands.perform(w.EndLate(KEY, "i-77"), run)  # another driver was quicker
    assert len(bench.provider.calls) == calls
    bench.provider.nodes = []
    bench.hands.perform(w.Confirm(KEY), run)
    assert bench.node.gone_at is not None
    assert bench.hands.given_up(run) == ()


def test_evidence_is_kept_where_there_is_some_and_asked_for_once_where_it_is_forbidden(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, Story().begun().launched().ready().after(100).terminated().after(500).gone())
    bench.provider.said = BillingEvidence(source="the log")
    bench.do(w.Reconcile(KEY))
    assert (bench.node.audited, bench.hands.sight.audits) == (None, {KEY: (at(600), 1)})
    bench.provider.said = BillingEvidence(source="the log", launched=at(1), ended=at(90))
    bench.do(w.Reconcile(KEY))
    assert bench.node.billing_ended_at == at(90)
    assert bench.provider.calls[-1] == ("billing_evidence", ("i-10", at(-60)), bench.provider.calls[-1][2])
    bench.provider.raises = CredentialsError("no", code="forbidden")
    bench.do(w.Reconcile(KEY))
    assert bench.hands.sight.audits[KEY][1] == 4


def test_a_superseded_driver_calls_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Story().begun().launched())
    bench.store.commit(
        [(e.run_stream(RUN), e.DriverStarted(at=at(1), epoch=2, pid=1, start_time=0.0, boot_id="b"))], epoch=2
    )
    for effect in (w.Terminate(KEY, "why"), w.Launch(1, 1, OFFER, at(90))):
        with pytest.raises(StaleEpoch):
            bench.do(effect)
    assert bench.provider.calls == []


def test_looking_notes_what_changed_and_what_is_missing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Story().begun().launched())
    facts = NodeFacts(id="i-10", name="", key=KEY, status="active", provider="sim", ip="1.2.3.4")
    bench.provider.nodes = [facts]
    bench.do(w.Look("x"))
    assert (bench.node.status, bench.node.ip) == ("active", "1.2.3.4")
    before = bench.store.last_seq(RUN)
    bench.do(w.Look("x"))
    assert bench.store.last_seq(RUN) == before  # nothing new, nothing written
    bench.provider.nodes = []
    bench.do(w.Look("x"))
    assert bench.hands.sight.absent[KEY] == (at(50),)
    bench.provider.raises = Unavailable("down")
    bench.do(w.Look("x"))
    assert bench.hands.sight.absent[KEY] == (at(50),)
    assert bench.hands.sight.complaint == "down"


@pytest.mark.parametrize(("moves", "billed"), [(False, 1_000_000), (True, 1_500_000)])
def test_the_price_of_the_start_holds_unless_the_provider_says_that_prices_move(
    tmp_path: Path, moves: bool, billed: int
) -> None:
    story = Story().begun().launched()
    bench = Bench(tmp_path, story)
    bench.provider.traits = Traits(price_moves=moves)

    def look(price: int, status: str = "active") -> int:
        node = story.facts(status).model_copy(update={"micro_usd_per_hour": price})  # type: ignore[arg-type]
        bench.provider.nodes = [node]
        bench.do(w.Look("x"))
        return len(bench.store.events(e.node_stream(KEY)))

    first = look(1_000_000)
    assert look(1_009_000) == first, "less than a hundredth is no news"
    assert look(1_400_000) == first + moves
    bench.provider.nodes = [story.facts("preempted").model_copy(update={"micro_usd_per_hour": 1_500_000})]
    bench.do(w.Confirm(KEY))
    assert bench.node.gone_at is not None and bench.node.micro_usd_per_hour == billed


def test_that_a_node_still_boots_is_noted_now_and_then(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Story().begun().launched())
    bench.provider.nodes = [NodeFacts(id="i-10", name="", key=KEY, status="booting", provider="sim")]
    for seconds, noted in ((5, 5), (20, 5), (36, 36)):
        bench.clock.seconds = seconds
        bench.do(w.Look("x"))
        assert bench.node.observed_at == at(noted)


def test_a_node_without_its_name_is_known_by_its_id(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Story().begun().launched())
    bench.provider.nodes = [NodeFacts(id="i-10", name="", status="active", provider="sim")]
    bench.do(w.Look("x"))
    assert bench.node.status == "active"
    assert bench.hands.sight.absent[KEY] == ()


@pytest.mark.parametrize(
    ("seconds", "seen", "status", "gone"),
    [
        (5, False, None, False),
        (61, False, None, True),
        (5, True, None, True),
        (5, True, "active", False),
        (5, True, "preempted", True),
    ],
)
def test_when_not_found_is_believed(
    tmp_path: Path, seconds: float, seen: bool, status: Any, gone: bool
) -> None:
    story = Story().begun().launched()
    bench = Bench(tmp_path, story.observed("booting") if seen else story)
    bench.clock.seconds = seconds
    if status is not None:
        bench.provider.nodes = [NodeFacts(id="i-10", name="", key=KEY, status=status, provider="sim")]
    bench.do(w.Confirm(KEY))
    assert (bench.node.gone_at is not None) is gone
    assert bench.hands.sight.confirmed_at == {KEY: at(seconds)}


@pytest.mark.parametrize(("status", "noted"), [("active", True), ("unhealthy", True), ("terminating", False)])
def test_that_a_node_runs_on_after_its_end_was_accepted_is_noted(
    tmp_path: Path, status: Any, noted: bool
) -> None:
    story = Story().begun().launched().ready().observed(status).after(20).terminated()
    bench = Bench(tmp_path, story)
    bench.provider.nodes = [story.facts(status)]
    for seconds in (30, 40):
        bench.clock.seconds = seconds
        bench.do(w.Confirm(KEY))
    assert bench.node.running_at == (at(40) if noted else None)


def test_an_adopted_node_is_known_with_what_was_seen(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Story().begun().intended())
    bench.provider.nodes = [
        NodeFacts(id="i-77", name="", key=KEY, status="active", provider="sim", ip="1.1.1.1")
    ]
    bench.do(w.Look("x"))
    assert bench.node.id is None
    bench.do(w.Adopt(KEY, "i-77"))
    assert (bench.node.answer, bench.node.id, bench.node.status, bench.node.ip) == (
        "known",
        "i-77",
        "active",
        "1.1.1.1",
    )


def test_a_later_lease_is_told_to_the_provider_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Story().begun().launched())
    bench.provider.raises = Ambiguous("?")
    bench.do(w.ExtendLease(KEY, at(900_000)))
    assert bench.node.marker.lease_end == at(86_400)
    bench.provider.raises = None
    bench.do(w.ExtendLease(KEY, at(900_000)))
    assert bench.node.marker.lease_end == at(900_000)
    assert bench.provider.calls[-1][1] == bench.node.marker.name


def test_offers_are_kept_with_their_time_and_final_errors_are_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Story())
    bench.do(w.AskOffers())
    assert (bench.hands.sight.offers, bench.hands.sight.offers_at) == ((OFFER,), at(0))
    bench.provider.raises = Unavailable("down")
    bench.do(w.AskOffers())
    assert bench.hands.sight.offers is None
    bench.provider.raises = CredentialsError("bad key", code="key")
    bench.do(w.AskOffers())
    assert bench.hands.sight.offers_error == "key: bad key"


def test_while_nothing_fits_what_is_free_is_told(tmp_path: Path) -> None:
    bench, big = Bench(tmp_path, Story()), OFFER.model_copy(update={"gpus": 8, "instance_type": "gpu_8x"})
    small = big.model_copy(update={"gpus": 1, "instance_type": "gpu_1x", "region": "west"})
    sold_out = OFFER.model_copy(update={"available": False})
    offered = {True: [sold_out], False: [small, big, big.model_copy(update={"region": "north"}), sold_out]}
    bench.provider.offers = lambda hardware: offered[bool(hardware)]  # type: ignore[method-assign]
    bench.do(w.AskOffers())
    assert bench.hands.sight.free == "", "this provider does not know"
    bench.provider.traits = Traits(tells_capacity=True)
    bench.do(w.AskOffers())
    rate = f"${OFFER.usd_per_hour:,.2f}/h"
    assert bench.hands.sight.free == f"free now: gpu_8x ({rate}, east, north), gpu_1x ({rate}, west)"
    offered[True] = [OFFER]
    bench.do(w.AskOffers())
    assert bench.hands.sight.free == ""


def test_sight_becomes_the_world_of_decide(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Story().begun().launched())
    bench.do(w.Look("x"))
    world = bench.hands.sight.world(bench.provider, SiteView())  # type: ignore[arg-type]
    assert world.inventory is bench.hands.sight.inventory
    assert world.absent == {KEY: (at(50),)}
    assert world.looked_at == at(0)


def test_effects_as_plain_values() -> None:
    value = plain(w.BeginAttempt(1, OFFER, (KEY,), 0, 1))
    assert value["effect"] == "BeginAttempt"
    assert value["offer"]["instance_type"] == "big"
    assert value["keys"] == [KEY]
