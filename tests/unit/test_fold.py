"""Records are what events make of them."""

from __future__ import annotations

import pytest

from runs import events as e
from runs.fold import fold_run, join_intervals
from runs.nodefold import FoldError, fold_node
from runs.record import RunRecord
from tests.simulation.builders import KEY, RUN, Story, at, spec


def test_a_stream_begins_with_its_first_event_and_only_once() -> None:
    with pytest.raises(FoldError, match="before any RunCreated"):
        fold_run(None, e.StopRequested(at=at(0), reason="user"))
    with pytest.raises(FoldError, match="before any LaunchIntended"):
        fold_node(None, e.LaunchAbandoned(at=at(0)))
    story = Story().begun().intended()
    with pytest.raises(FoldError, match="created twice"):
        story.tell(e.RunCreated(at=at(0), run=RUN, spec=spec(), steps=1))
    with pytest.raises(FoldError, match="intended twice"):
        story.intended()


def test_every_event_has_a_fold() -> None:
    from runs.fold import _RUN
    from runs.nodefold import _NODE

    runs = set(e.RunEvent.__args__[0].__args__) - {e.RunCreated}  # type: ignore[attr-defined]
    nodes = set(e.NodeEvent.__args__[0].__args__) - {e.LaunchIntended}  # type: ignore[attr-defined]
    assert set(_RUN) == runs
    assert set(_NODE) == nodes


def test_events_and_records_survive_the_disk() -> None:
    story = (
        Story(max_micro_usd=5).training().seen(50, here=True).after(3).ended("finished").terminated().gone()
    )
    for stream, event in story.changes:
        assert e.load(stream, e.dump(event)) == event
    for record in (story.run, story.nodes[KEY]):
        assert record is not None
        assert type(record).model_validate_json(record.model_dump_json()) == record


def test_an_unknown_field_of_a_newer_version_is_not_an_error() -> None:
    body = e.dump(e.WaitCancelled(at=at(0))).replace("{", '{"surprise": 1, ', 1)
    assert e.load("run:x", body) == e.WaitCancelled(at=at(0))


def test_states() -> None:
    story = Story()
    seen = [story.record.state]
    for step in (story.begun, story.launched, story.ready):
        step()
        seen.append(story.record.state)
    story.prepared().tell(e.TrainerStarted(at=story.now, attempt=1, token="t"))
    seen.append(story.record.state)
    story.tell(e.ProgressSeen(at=story.now, summary={"step": 1}, intervals=(("training", 1.0, 2.0),)))
    seen.append(story.record.state)
    for step in (
        lambda: story.ended("finished"),
        lambda: story.terminated("succeeded"),
        lambda: story.gone().attempt_ended("succeeded"),
    ):
        step()
        seen.append(story.record.state)
    story.tell(e.RunEnded(at=story.now, outcome="succeeded", reason="finished"))
    seen.append(story.record.state)
    assert seen == ["waiting", "booting", "booting", "preparing", "preparing", "training", "collecting", "releasing",
                    "waiting", "succeeded"]  # fmt: skip


def test_a_second_stop_can_only_make_it_harder() -> None:
    story = Story().stop(checkpoint=False).stop(checkpoint=True)
    assert story.record.stop is not None
    assert not story.record.stop.checkpoint
    story.tell(e.StopRequested(at=story.now, reason="budget"))
    assert story.record.stop.reason == "user"


def _ended(outcome: str) -> Story:
    story = Story().begun().attempt_ended("x").stop()
    return story.tell(e.RunEnded(at=story.now, outcome=outcome, reason="r"))  # type: ignore[arg-type]


@pytest.mark.parametrize("outcome", ["failed", "stopped", "lost"])
def test_a_resume_reopens_and_starts_counting_anew(outcome: str) -> None:
    story = _ended(outcome).after(5)
    record = story.tell(e.ResumeRequested(at=story.now, max_micro_usd=7)).record
    assert record.live
    assert record.stop is None
    assert record.recent_attempts == ()
    assert (record.max_micro_usd, record.resumes, record.state) == (7, 1, "waiting")


def test_a_resume_of_what_lives_or_has_succeeded_only_raises_the_budget() -> None:
    story = _ended("succeeded").tell(e.ResumeRequested(at=at(1), max_micro_usd=7))
    assert story.record.outcome == "succeeded"
    living = Story().begun().stop().tell(e.ResumeRequested(at=at(1), max_micro_usd=7)).record
    assert living.stop is not None
    assert living.attempt is not None
    assert living.max_micro_usd == 7


def test_a_stop_after_the_end_means_nothing() -> None:
    story = Story().begun().attempt_ended("x").tell(e.RunEnded(at=at(0), outcome="failed", reason="r")).stop()
    assert story.record.stop is None


def test_checkpoints_are_not_forgotten() -> None:
    story = Story().training().seen(50, here=True)
    again = e.CheckpointSeen(at=story.now, step=50, sha256="other", bytes=10)
    item = story.tell(again).record.checkpoints[50]
    assert (item.fetched, item.sha256, item.announced) == (True, "s50", "other")
    assert story.verified(50, weights_only=True).record.checkpoints[50].fetched
    story.tell(e.CheckpointVerified(at=story.now, step=50, path="new", sha256="other", bytes=10))
    assert story.record.checkpoints[50].sha256 == "other"


def test_what_was_on_a_lost_node_is_not_available() -> None:
    story = Story().training().seen(50, here=True).seen(60)
    assert [item.step for item in story.record.available] == [50, 60]
    story.gone().attempt_ended("node-lost")
    assert [item.step for item in story.record.available] == [50]
    assert story.record.resume_step == 50


def test_what_its_node_has_let_go_is_not_waited_for() -> None:
    story = Story(fetch="all").training().seen(50).seen(60)
    story.verified(60, weights_only=True)
    gone = [e.CheckpointGone(at=story.now, step=step, sha256=f"s{step}") for step in (50, 60)]
    story.tell(gone[0]).tell(gone[1])
    assert [item.step for item in story.record.available] == [60], "its weights are here, and stay"
    story.tell(e.CheckpointSeen(at=story.now, step=50, sha256="other", bytes=10))
    assert [item.step for item in story.record.available] == [50, 60], "made again"
    story.tell(gone[0])
    assert not story.record.checkpoints[50].gone, "that was said of the other bytes"


def test_weights_alone_cannot_be_resumed_from() -> None:
    story = Story().training().seen(50).verified(50, weights_only=True)
    assert story.record.resume_step == 0


def test_intervals_that_touch_become_one() -> None:
    joined = join_intervals(
        (("training", 0.0, 1.0),), [("training", 1.005, 2.0), ("redone", 2.0, 3.0), ("training", 4.0, 5.0)]
    )
    assert joined == (("training", 0.0, 2.0), ("redone", 2.0, 3.0), ("training", 4.0, 5.0))


def test_replacements_count_those_without_progress() -> None:
    story, counts = Story(), []
    for number, step in ((1, None), (2, None), (3, 40), (4, None)):
        story.begun(number)
        if step:
            story.seen(step, here=True)
        story.attempt_ended("node-lost", number)
        counts.append(story.record.replacements)
    assert counts == [1, 2, 1, 2]


def test_a_driver_event_keeps_what_is_needed_to_end_it() -> None:
    story = Story().tell(e.DriverStarted(at=at(1), epoch=2, pid=77, start_time=1.5, boot_id="boot"))
    record: RunRecord = story.record
    assert (record.epoch, record.driver_pid, record.driver_start_time, record.driver_boot_id) == (
        2,
        77,
        1.5,
        "boot",
    )
