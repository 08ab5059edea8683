"""Dollars: what a node bills, from when to when, and for which phase."""

from __future__ import annotations

import copy
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs import charges
from runs import events as e
from runs.events import PHASES
from runs.facts import BillingEvidence, Tariff
from tests.simulation.builders import KEY, RUN, Story, at


@pytest.mark.parametrize(
    ("seconds", "granularity", "minimum", "expected"),
    [(0.0, 1, 0, 0.0), (61.5, 1, 0, 61.5), (0.1, 60, 0, 60.0), (60.0, 60, 0, 60.0), (60.001, 60, 0, 120.0), (5.0, 1, 60, 60.0),
     (3601.0, 3600, 0, 7200.0)],
)  # fmt: skip
def test_billed_seconds(seconds: float, granularity: int, minimum: int, expected: float) -> None:
    tariff = Tariff(micro_usd_per_hour=1, granularity_seconds=granularity, minimum_seconds=minimum)
    assert charges.billed(seconds, tariff) == expected


@given(st.floats(0, 1e6), st.integers(1, 3600), st.integers(0, 3600))
def test_billed_is_never_less_than_lived(seconds: float, granularity: int, minimum: int) -> None:
    tariff = Tariff(micro_usd_per_hour=1, granularity_seconds=granularity, minimum_seconds=minimum)
    billed = charges.billed(seconds, tariff)
    assert billed >= max(seconds, minimum) - 1e-6
    assert billed <= max(seconds, minimum) + granularity


def _bill(story: Story) -> charges.Bill:
    bill = charges.node_bill(story.nodes[KEY], story.now)
    assert bill is not None
    return bill


def test_nothing_is_billed_before_it_is_active_nor_for_what_was_refused_or_given_up() -> None:
    story = Story().begun().intended().after(500)
    assert charges.node_bill(story.nodes[KEY], story.now) is None
    story.tell(e.LaunchAbandoned(at=story.now))
    assert charges.node_bill(story.nodes[KEY], story.now) is None
    story = Story().begun().launched().observed("booting").after(500)
    assert charges.total(story.record, story.now) == 0


def test_a_bill_begins_when_the_node_was_last_known_not_to_be_active() -> None:
    story = Story().begun().launched().after(30).observed("active", not_before=at(20)).after(70)
    bill = _bill(story)
    assert (bill.start, bill.end, bill.final) == (at(20), at(100), False)
    assert bill.micro_usd == 120 * 10_000
    away = Story().begun().launched().after(5).observed("booting").after(900).observed("active")
    assert _bill(away).start == at(5)
    unseen = Story().begun().launched().after(900).observed("active")
    assert _bill(unseen).start == at(0)


def test_a_bill_ends_when_the_end_was_accepted_once_that_is_confirmed() -> None:
    story = Story().begun().launched().ready().after(100).terminated().after(50)
    assert (_bill(story).end, _bill(story).final) == (at(150), False)
    story.gone().after(1000)
    assert (_bill(story).end, _bill(story).final) == (at(100), True)


def test_an_acceptance_that_led_to_nothing_is_not_the_end_of_the_bill() -> None:
    story = Story().begun().launched().ready().after(100).terminated().after(60).terminated().after(10).gone()
    assert _bill(story).end == at(160)
    unanswered = Story().begun().launched().ready().after(100).terminated().after(60)
    unanswered.tell(e.TerminateIntended(at=unanswered.now, reason="again")).after(10).gone()
    assert _bill(unanswered).end == at(170)
    believed = (
        Story()
        .begun()
        .launched()
        .ready()
        .after(100)
        .terminated()
        .observed("terminating")
        .after(60)
        .terminated()
        .gone()
    )
    assert _bill(believed).end == at(100)


def test_a_node_that_runs_on_after_its_end_was_accepted_bills_on() -> None:
    story = Story().begun().launched().ready().after(100).terminated().after(30).observed("active")
    unseen = copy.deepcopy(story).after(20).gone()
    assert (_bill(unseen).end, _bill(unseen).final) == (at(150), True), "it may have run until then"
    again = copy.deepcopy(story).after(20).terminated().after(30).gone()
    assert (_bill(again).end, _bill(again).final) == (at(150), True), "the second acceptance was one"
    story.after(20).observed("terminating").after(10).gone()
    assert (_bill(story).end, _bill(story).final) == (at(150), True), "there it was seen to run no more"


def _reconciled(launched: float, ended: float) -> Story:
    """A node that was seen gone an hour after it was seen alive, and what the provider's log says of it."""
    story = Story().begun().launched().after(100).ready().after(3600).gone()
    said = BillingEvidence(source="the log", launched=at(launched), ended=at(ended))
    why = charges.contradiction(story.nodes[KEY], said)
    return story.tell(e.BillingReconciled(at=story.now, contradiction=why, **said.model_dump()))


def test_what_the_providers_log_says_is_the_bill() -> None:
    story = _reconciled(20, 400)
    assert (_bill(story).start, _bill(story).end, _bill(story).final) == (at(20), at(400), True)
    assert story.nodes[KEY].audited == "ended at 2026-03-01 12:06:40 UTC by the log"


@pytest.mark.parametrize(
    ("launched", "ended", "why"),
    [(-4000, 400, "a launch before"), (20, 30, "seen alive after"), (20, 4000, "seen gone before")],
)
def test_a_log_that_what_was_seen_contradicts_changes_nothing(
    launched: float, ended: float, why: str
) -> None:
    story = _reconciled(launched, ended)
    assert (_bill(story).start, _bill(story).end) == (at(0), at(3700))
    assert why in str(story.nodes[KEY].audited)


def test_less_than_a_minute_of_doubt_is_free_and_more_is_not() -> None:
    story = Story().begun().launched().after(100).observed("booting").after(20).terminated().gone()
    assert charges.node_bill(story.nodes[KEY], story.now) is None
    story = Story().begun().launched().after(100).observed("booting").after(600).terminated().gone()
    assert (_bill(story).start, _bill(story).final) == (at(100), False)


def test_a_node_that_came_back_bills_on() -> None:
    story = Story().begun().launched().ready().after(100).gone().after(200)
    story.tell(e.LaunchFound(at=story.now, id="i-10")).after(100)
    assert (_bill(story).end, _bill(story).final) == (at(400), False)


def test_the_instances_own_price_counts() -> None:
    story = Story().begun().launched().observed("active", micro_usd_per_hour=72_000_000).after(60)
    assert charges.total(story.record, story.now) == 60 * 20_000
    assert charges.rate(story.record) == 72_000_000


def _phases(story: Story) -> dict[str, float]:
    return {item.phase: item.seconds for item in charges.charges(story.record, story.now)}


def test_phases_of_a_whole_life() -> None:
    story = Story().begun().launched().observed(not_before=at(0)).after(30).ready().after(40).prepared()
    story.tell(e.TrainerStarted(at=story.now, attempt=1, token=f"{RUN}-a1"))
    zero = at(0).timestamp()
    spans = (
        ("training", zero + 80, zero + 180),
        ("evaluating", zero + 180, zero + 190),
        ("redone", zero + 190, zero + 200),
    )
    story.tell(e.ProgressSeen(at=at(200), summary={}, intervals=spans)).after(130).ended("finished")
    story.after(20).terminated("succeeded").after(5).gone()
    expected = {
        "booting": 30,
        "preparing": 50,
        "training": 100,
        "evaluating": 10,
        "redone": 10,
        "collecting": 20,
    }
    assert _phases(story) == expected
    total = charges.totals(story.record, story.now)
    assert total.micro_usd == charges.total(story.record, story.now) == sum(total.by_phase.values())
    assert total.training_seconds == 100
    assert total.final
    assert total.overhead_fraction == pytest.approx(1 - 100 / total.billed_seconds)


def test_a_stray_is_not_charged_as_training() -> None:
    story = (
        Story().begun().intended().after(70).tell(e.LaunchAbandoned(at=at(70))).attempt_ended("launch-lost")
    )
    key = f"llmctl-{RUN}-a2-n0"
    story.begun(2).launched(2).ready(key).tell(e.LaunchFound(at=story.now, id="i-10")).observed("active", KEY)
    zero = at(0).timestamp()
    story.tell(
        e.ProgressSeen(at=at(200), summary={}, intervals=(("training", zero + 80, zero + 200),))
    ).after(130)
    phases = {(item.node, item.phase) for item in charges.charges(story.record, story.now)}
    assert (key, "training") in phases
    assert (KEY, "training") not in phases


_claims = st.lists(st.tuples(st.sampled_from(PHASES), st.floats(-50, 250), st.floats(-50, 250)), max_size=12)


@given(st.floats(0, 200), _claims)
def test_partition_covers_each_moment_once_by_rank(
    length: float, claims: list[tuple[str, float, float]]
) -> None:
    start, end = at(0), at(length)
    spans = [(phase, at(a), at(b)) for phase, a, b in claims]
    pieces = charges.partition(start, end, spans)  # type: ignore[arg-type]
    assert pieces[0][1] == start
    assert pieces[-1][2] == end
    for (_, _, before), (_, after, _) in pairwise(pieces):
        assert before == after
    for phase, a, b in pieces:
        assert a < b or start == end
        middle = a + (b - a) / 2
        asking = [p for p, x, y in spans if x <= middle < y and x < y]
        if a < middle < b:
            assert phase == (min(asking, key=PHASES.index) if asking else "idle")


@given(st.floats(0.01, 90_000), st.lists(st.tuples(st.floats(0, 90_000), st.floats(0, 5000)), max_size=8),
       st.integers(1, 3600), st.integers(0, 600), st.integers(1, 10**8))  # fmt: skip
def test_charges_sum_to_the_bill_and_are_never_negative(
    lived: float, spans: list[tuple[float, float]], granularity: int, minimum: int, rate: int
) -> None:
    story = Story().begun().launched().ready()
    tariff = Tariff(micro_usd_per_hour=rate, granularity_seconds=granularity, minimum_seconds=minimum)
    node = story.nodes[KEY]
    story.nodes[KEY] = node.model_copy(update={"offer": node.offer.model_copy(update={"tariff": tariff})})
    zero, last, intervals = at(0).timestamp(), 0.0, []
    for start, seconds in sorted(spans):
        begin = max(start, last)
        last = begin + seconds
        intervals.append(("training", zero + begin, zero + last))
    story.tell(e.ProgressSeen(at=story.now, summary={}, intervals=tuple(intervals))).after(lived)
    items = charges.charges(story.record, story.now)
    assert sum(item.micro_usd for item in items) == charges.total(story.record, story.now)
    assert all(item.micro_usd >= 0 for item in items)


@given(st.lists(st.floats(0, 1e5), min_size=2, max_size=6))
def test_a_running_bill_never_shrinks(moments: list[float]) -> None:
    story = Story().begun().launched().ready()
    figures = [
        charges.total(story.record, story.now + timedelta(seconds=moment)) for moment in sorted(moments)
    ]
    assert figures == sorted(figures)


def test_a_node_that_ended_while_nobody_looked_has_an_upper_bound() -> None:
    """It is counted until it was found gone, and that is said to be the whole truth only where it was seen until about then."""
    watched, unseen = (Story().begun().launched().after(10).ready().after(3600) for _ in range(2))
    watched.tell(
        e.NodeGone(at=watched.now, evidence="not found", seen_at=watched.now - timedelta(minutes=4)), KEY
    )
    unseen.tell(e.NodeGone(at=unseen.now, evidence="not found"), KEY)
    assert _bill(watched).end == _bill(unseen).end == watched.now
    assert (_bill(watched).final, _bill(unseen).final) == (True, False)
    ended = e.BillingReconciled(at=unseen.now, source="the log", ended=at(600))
    assert (_bill(unseen.tell(ended, KEY)).end, _bill(unseen).final) == (at(600), True)
    asked = Story().begun().launched().after(10).ready().after(3600).terminated("no longer kept").gone()
    assert (_bill(asked).end, _bill(asked).final) == (asked.now, False), (
        "accepted of one that may have ended long before"
    )
