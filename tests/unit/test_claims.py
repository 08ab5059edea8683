"""A kept node that another run takes over: one run answers for it at any moment, and the runs pay its bill together."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runs import charges
from runs import events as e
from runs.facts import Tariff
from runs.nodefold import FoldError, fold_node
from runs.rows import cost_now
from runs.store import NotYours, StaleEpoch, Store
from runs.summary import summarise
from tests.simulation.builders import KEY, OFFER, RUN, Story, at, spec

NEXT, THIRD = "next-0001", "third-0001"


def kept(*, until: float | None = None) -> Story:
    """A run that succeeded after 100 s of paid time, and keeps its node."""
    story = Story(on_finish="keep").begun().launched().ready().prepared()
    story.tell(e.TrainerStarted(at=story.now, attempt=1, token=f"{RUN}-a1")).after(100).ended("finished")
    story.tell(e.NodeKept(at=story.now, until=at(until) if until is not None else None), KEY)
    story.attempt_ended("succeeded")
    return story.tell(e.RunEnded(at=story.now, outcome="succeeded", reason="finished"))


def created(run: str, seconds: float) -> list[tuple[str, e.RunEvent | e.NodeEvent]]:
    """`launch --on`, and its driver."""
    stream = e.run_stream(run)
    made = e.RunCreated(at=at(seconds), run=run, spec=spec(), steps=100, on=KEY)
    return [
        (stream, made),
        (stream, e.DriverStarted(at=at(seconds), epoch=1, pid=1, start_time=0.0, boot_id="b")),
    ]


def claim(run: str, former: str, seconds: float) -> list[tuple[str, e.RunEvent | e.NodeEvent]]:
    """What the effect Claim commits."""
    stream = e.run_stream(run)
    return [
        (stream, e.OfferChosen(at=at(seconds), attempt=1, offer=OFFER)),
        (stream, e.AttemptStarted(at=at(seconds), attempt=1, keys=(KEY,), from_step=0, world_size=1)),
        (e.node_stream(KEY), e.NodeClaimed(at=at(seconds), run=run, attempt=1, former=former)),
    ]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run that keeps its node, and one that wants it."""
    store = Store(tmp_path, synchronous="OFF")
    store.commit(kept().changes)
    store.commit(created(NEXT, 200))
    return store


def test_a_claim_hands_the_node_over_with_its_bill(store: Store) -> None:
    before = store.record(NEXT)
    assert before is not None and before.on_node is not None and before.nodes == ()
    store.commit(claim(NEXT, RUN, 300), epoch=1, run=NEXT)
    first, second = store.record(RUN), store.record(NEXT)
    assert first is not None and second is not None
    assert (first.owned, len(first.nodes), [node.key for node in second.owned]) == ((), 1, [KEY])
    assert (second.on_node, second.state) == (None, "preparing")
    # 600 s in all, at 10,000 micro-dollars a second: the time for which it was kept is the first run's.
    assert (charges.total(first, at(600)), charges.total(second, at(600))) == (3_000_000, 3_000_000)
    assert (charges.rate(first), charges.rate(second)) == (0, 36_000_000)
    row, other = store.summary(RUN), store.summary(NEXT)
    assert row is not None and other is not None
    assert row["final"] and not row["nodes"][0]["unsettled"] and row["nodes"][0]["status"] == f"with {NEXT}"
    assert (cost_now(row, at(600).timestamp()), cost_now(other, at(600).timestamp())) == (
        3_000_000,
        3_000_000,
    )
    kinds = {run: [body["kind"] for _, _, body in store.history(run)] for run in (RUN, NEXT)}
    assert kinds[RUN][-1] == "NodeClaimed" and kinds[NEXT][-1] == "NodeClaimed"
    assert "LaunchIntended" in kinds[RUN] and "LaunchIntended" not in kinds[NEXT]
    assert [body["kind"] for _, _, body in store.since(NEXT, 0)] == kinds[NEXT]
    rows = [store.summary(run) for run in (RUN, NEXT)]
    store.rebuild()
    assert [store.summary(run)["micro_usd"] for run in (RUN, NEXT)] == [row["micro_usd"] for row in rows]  # type: ignore[index]


def test_the_former_run_and_whoever_judged_by_it_may_not_touch_it(store: Store) -> None:
    store.commit(claim(NEXT, RUN, 300), epoch=1, run=NEXT)
    for event in (
        e.TerminateIntended(at=at(301), reason="no longer kept"),
        e.NodeGone(at=at(301), evidence="x"),
    ):
        for epoch in (1, None):
            with pytest.raises(NotYours):
                store.commit([(e.node_stream(KEY), event)], epoch=epoch, run=RUN)
    with pytest.raises(StaleEpoch):
        store.commit([(e.node_stream(KEY), e.TerminateIntended(at=at(301), reason="x"))], epoch=0, run=NEXT)
    store.commit([(e.node_stream(KEY), e.TerminateIntended(at=at(301), reason="x"))], epoch=1, run=NEXT)


def test_of_two_that_claim_one_has_it(store: Store) -> None:
    other = Store(store.home, synchronous="OFF")
    other.commit(created(THIRD, 200))
    other.commit(claim(THIRD, RUN, 300), epoch=1, run=THIRD)
    with pytest.raises(NotYours, match="not kept"):
        store.commit(claim(NEXT, RUN, 300), epoch=1, run=NEXT)
    record = store.record(NEXT)
    assert record is not None and record.attempts == (), "nothing of a refused claim is written"


@pytest.mark.parametrize(
    ("stream", "event", "why"),
    [
        (e.node_stream(KEY), e.TerminateIntended(at=at(250), reason="no longer kept"), "not kept"),
        (e.node_stream(KEY), e.NodeGone(at=at(250), evidence="not found"), "not kept"),
        (e.run_stream(RUN), e.ReleaseRequested(at=at(250), key=KEY), "not kept"),
    ],
)
def test_who_is_late_is_refused(store: Store, stream: str, event: e.RunEvent | e.NodeEvent, why: str) -> None:
    store.commit([(stream, event)])
    with pytest.raises(NotYours, match=why):
        store.commit(claim(NEXT, RUN, 300), epoch=1, run=NEXT)


def test_a_run_that_has_not_ended_gives_nothing_away(tmp_path: Path) -> None:
    store = Store(tmp_path, synchronous="OFF")
    story = kept()
    store.commit([change for change in story.changes if change[1].kind != "RunEnded"])
    store.commit(created(NEXT, 200))
    with pytest.raises(NotYours, match="busy"):
        store.commit(claim(NEXT, RUN, 300), epoch=1, run=NEXT)


def test_only_what_is_kept_can_be_claimed() -> None:
    story = Story().begun().launched().ready()
    with pytest.raises(FoldError):
        fold_node(story.nodes[KEY], e.NodeClaimed(at=at(1), run=NEXT, attempt=1, former=RUN))


@given(
    tariff=st.builds(
        Tariff,
        micro_usd_per_hour=st.integers(1, 99_999_999),
        granularity_seconds=st.sampled_from([1, 7, 60, 3600]),
        minimum_seconds=st.sampled_from([0, 60, 7200]),
    ),
    gaps=st.lists(st.floats(0, 5000), min_size=1, max_size=5),
    after=st.floats(0, 5000),
    ended=st.booleans(),
)
@example(tariff=Tariff(micro_usd_per_hour=623106), gaps=[0.0], after=0.0, ended=False)
def test_the_shares_sum_to_the_bill(tariff: Tariff, gaps: list[float], after: float, ended: bool) -> None:
    """To the micro-dollar and the second, whatever the tariff, with the phases of each run summing to its share."""
    story = kept()
    node = story.nodes[KEY].model_copy(update={"offer": OFFER.model_copy(update={"tariff": tariff})})
    for index, gap in enumerate(gaps):
        story.after(gap)
        node = fold_node(node, e.NodeClaimed(at=story.now, run=f"r-{index:04}", attempt=1, former=node.run))
        story.after(gap / 3)
        if index < len(gaps) - 1:
            node = fold_node(node, e.NodeKept(at=story.now))
    story.after(after)
    if ended:
        node = fold_node(node, e.TerminateIntended(at=story.now, reason="x"))
        node = fold_node(node, e.TerminateAnswered(at=story.now, accepted=True))
        gone = e.NodeGone(at=story.now + timedelta(seconds=9), evidence="x", seen_at=story.now)
        node = fold_node(node, gone)
    bill = charges.node_bill(node, story.now)
    assert bill is not None
    shares = [charges.node_share(node, run, story.now) for run in node.tenants]
    known = [share for share in shares if share is not None]
    assert len(known) == len(gaps) + 1 and all(share.micro_usd >= 0 for share in known)
    assert sum(share.micro_usd for share in known) == bill.micro_usd
    assert sum(share.seconds for share in known) == pytest.approx(bill.seconds, abs=1e-3)
    assert [share.final for share in known] == [True] * len(gaps) + [ended]
    assert story.run is not None
    total = 0
    for run in node.tenants:
        record = story.record.model_copy(update={"run": run, "nodes": (node,)})
        items = charges.charges(record, story.now)
        assert all(item.micro_usd >= 0 for item in items)
        assert sum(item.micro_usd for item in items) == charges.total(record, story.now)
        total += cost_now(summarise(record, story.now), story.now.timestamp())
    assert total == bill.micro_usd
