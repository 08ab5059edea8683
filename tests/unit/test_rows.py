"""What is printed from stored rows agrees with what charges say."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from runs import charges, rows
from runs import events as e
from runs.facts import Tariff
from runs.summary import summarise
from tests.simulation.builders import KEY, Story


@given(st.floats(0, 1e5), st.integers(1, 3600), st.integers(0, 3600), st.integers(1, 10**9))
def test_a_meter_that_runs_is_read_as_charges_read_it(
    later: float, granularity: int, minimum: int, rate: int
) -> None:
    story = Story().begun().launched().ready()
    tariff = Tariff(micro_usd_per_hour=rate, granularity_seconds=granularity, minimum_seconds=minimum)
    node = story.nodes[KEY]
    story.nodes[KEY] = node.model_copy(update={"offer": node.offer.model_copy(update={"tariff": tariff})})
    row = summarise(story.record, story.now)
    now = story.now + timedelta(seconds=later)
    # POSIX seconds are floats: a quarter of a microsecond of rate is all that they may lose, save at a grain's edge.
    exact = charges.total(story.record, now)
    edge = (
        charges.price(float(granularity), rate)
        if granularity > 1 and abs(later / granularity - round(later / granularity)) < 1e-6
        else 0
    )
    assert abs(rows.cost_now(row, now.timestamp()) - exact) <= 1 + rate / 3600e6 + edge


def test_a_settled_bill_does_not_grow() -> None:
    story = Story().begun().launched().ready().after(100).terminated().gone()
    row = summarise(story.record, story.now)
    assert (
        rows.cost_now(row, story.now.timestamp() + 9999)
        == charges.total(story.record, story.now)
        == row["micro_usd"]
    )


def test_status_documents() -> None:
    story = Story().training().after(50)
    zero = story.now.timestamp()
    story.tell(
        e.ProgressSeen(
            at=story.now,
            summary={"step": 40, "step_seconds": 2.0, "loss": 3.5},
            intervals=(("training", zero, zero + 1),),
        )
    )
    document = rows.status_document(
        summarise(story.record, story.now), driver_alive=True, now=story.now.timestamp()
    )
    assert document["state"] == "training"
    assert (document["step"], document["steps"], document["eta_seconds"], document["loss"]) == (
        40,
        100,
        120,
        3.5,
    )
    assert document["usd_per_hour"] == 36.0
    assert document["cost_usd"] == charges.total(story.record, story.now) / 1e6
    assert document["driver"] is True
    assert [node["billing"] for node in document["nodes"]] == [True]
    story.ended("failed").terminated().gone().attempt_ended("trainer-failed")
    story.tell(e.RunEnded(at=story.now, outcome="failed", reason="the trainer failed"))
    document = rows.status_document(
        summarise(story.record, story.now), driver_alive=False, now=story.now.timestamp() + 500
    )
    assert (document["state"], document["usd_per_hour"], document["eta_seconds"]) == ("failed", 0, None)
    assert document["nodes"][0]["billing"] is False
    assert document["cost_usd"] == charges.total(story.record, story.now) / 1e6


def test_dollars_are_rounded_once() -> None:
    assert rows.usd(1) == 0.000001
    assert rows.usd(1_234_567) == 1.234567
