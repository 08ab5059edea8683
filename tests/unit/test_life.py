"""Every rule of `decide`, one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta

import pytest

from orchestrator.life import rules as life
from orchestrator.life import terms
from orchestrator.life import world as w
from orchestrator.life.stake import at_stake
from provisioning.base import Traits
from runs import events as e
from runs.facts import Inventory
from runs.record import LATE
from tests.simulation.builders import KEY, OFFER, OTHER, RUN, Story, absences, at, offers

KEY2 = f"llmctl-{RUN}-a1-n1"
DONE = w.Job("done", at(10_000))


def _job(story: Story, state: str, failures: int = 0, ago: float = 0.0) -> w.Job:
    return w.Job(state, story.now - timedelta(seconds=ago), failures, "why")  # type: ignore[arg-type]


# ---------------------------------------------------------------- before anything is rented


def test_asks_for_offers_then_begins_then_launches() -> None:
    story = Story()
    assert story.decide() == w.AskOffers()
    begin = story.decide(offers(story, OFFER))
    assert begin == w.BeginAttempt(1, OFFER, (KEY,), 0, 1)
    assert story.begun().decide() == w.Launch(1, 0, OFFER, terms.lease_end(story.record, story.now))


def test_the_wait_for_capacity() -> None:
    sold_out = OFFER.model_copy(update={"available": False})
    assert Story().decide(offers(Story(), sold_out)) == w.EndRun("failed", "no-capacity")
    story = Story(wait=600.0)
    assert isinstance(story.decide(offers(story, sold_out)), w.Wait)
    world = offers(story, sold_out)
    assert story.after(60).decide(world) == w.AskOffers()
    assert story.after(600).decide(offers(story, sold_out)) == w.EndRun("failed", "no-capacity")


def test_a_provider_that_says_nothing_is_not_sold_out() -> None:
    story = Story()
    silent = w.World(offers=None, offers_at=story.now)
    assert isinstance(story.decide(silent), w.Wait)
    story.after(301)
    assert story.decide(w.World(offers=None, offers_at=story.now)) == w.EndRun(
        "failed", "the provider does not say what it has"
    )


def test_refused_credentials_end_the_run() -> None:
    assert Story().decide(w.World(offers_error="invalid key")) == w.EndRun("failed", "invalid key")


def test_an_offer_that_was_sold_out_gives_way_to_the_next() -> None:
    story = Story().begun().intended()
    story.tell(e.LaunchRefused(at=story.now, code="sold", message="out", capacity=True))
    assert story.decide() == w.EndAttempt("no-capacity")
    story.attempt_ended("no-capacity")
    answer = story.decide(offers(story, OFFER, OTHER))
    assert isinstance(answer, w.BeginAttempt)
    assert (answer.attempt, answer.offer) == (2, OTHER)


def test_another_refusal_is_final() -> None:
    story = Story().begun().intended()
    story.tell(e.LaunchRefused(at=story.now, code="quota", message="too much"))
    assert story.decide() == w.EndAttempt("refused")
    assert story.attempt_ended("refused").decide() == w.EndRun("failed", "refused: quota: too much")


def test_cancelled_before_and_during_the_launch() -> None:
    story = Story()
    story.tell(e.WaitCancelled(at=story.now))
    assert story.decide() == w.EndRun("stopped", "cancelled")
    story = Story().begun().launched()
    story.tell(e.WaitCancelled(at=story.now))
    assert story.decide(story.looks(story.facts())) == w.Terminate(KEY, "stopped")


# ---------------------------------------------------------------- an intent without an outcome


def test_an_unsettled_intent_is_looked_for_and_nothing_is_sent_again() -> None:
    for story in (
        Story().begun().intended(),
        Story().begun().intended().tell(e.LaunchAmbiguous(at=at(0), message="?")),
    ):
        assert isinstance(story.decide(), w.Look)
        answer = story.decide(story.looks())
        assert isinstance(answer, w.Wait)
        assert answer.seconds == 30.0


@pytest.mark.parametrize("status", ["booting", "active", "terminating", "terminated", "preempted"])
def test_a_found_intent_is_adopted_whatever_became_of_it(status: str) -> None:
    story = Story().begun().intended()
    assert story.decide(story.looks(story.facts(status))) == w.Adopt(KEY, "i-10")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ago", "given_up"),
    [((60, 30, 0), True), ((61,), False), ((10, 5, 0), False), ((60, 30), False), ((100, 90, 80), False)],
)
def test_an_intent_is_given_up_after_three_looks_over_a_minute(
    ago: tuple[float, ...], given_up: bool
) -> None:
    story = Story().begun().intended().after({10: 40}.get(ago[0], ago[0]))
    world = absences(story, KEY, *ago)
    assert (story.decide(world) == w.Abandon(KEY)) is given_up


def test_looks_before_the_intent_do_not_count() -> None:
    story = Story().after(300).begun().intended().after(70)
    assert story.decide(absences(story, KEY, 300, 200, 100, 0)) != w.Abandon(KEY)


def test_three_lost_launches_end_the_run() -> None:
    story = Story()
    for number in (1, 2, 3):
        assert isinstance(story.decide(offers(story, OFFER)), w.BeginAttempt)
        key = f"llmctl-{RUN}-a{number}-n0"
        story.begun(number).intended(number).after(70).tell(e.LaunchAbandoned(at=story.now), key)
        assert story.decide() == w.EndAttempt("launch-lost")
        story.attempt_ended("launch-lost", number)
    assert story.decide(offers(story, OFFER)) == w.EndRun("failed", "launch-lost")


def test_a_late_arrival_is_adopted_and_ended() -> None:
    story = (
        Story().begun().intended().after(70).tell(e.LaunchAbandoned(at=at(70))).attempt_ended("launch-lost")
    )
    world = story.looks(story.facts("booting"))
    assert story.decide(world) == w.Adopt(KEY, "i-10")
    story.tell(e.LaunchFound(at=story.now, id="i-10"))
    assert story.decide(world) == w.Terminate(KEY, "unwanted")


def _given_up() -> tuple[Story, w.World]:
    """A run that waits for capacity, and a launch of another run that was given up and is there."""
    other = Story().begun().intended().after(70).tell(e.LaunchAbandoned(at=at(70)))
    story = Story(wait=600.0)
    story.t = 100.0
    key = KEY.replace("demo", "next")
    late = other.nodes[KEY].model_copy(update={"key": key, "run": "next-0001"})
    world = offers(story, OFFER.model_copy(update={"available": False}))
    return story, dataclasses.replace(world, given_up=(late,))


def test_a_late_arrival_of_another_run_is_ended_on_sight() -> None:
    story, world = _given_up()
    key = world.given_up[0].key
    assert isinstance(story.decide(world), w.Wait)
    assert story.decide(dataclasses.replace(world, looked_at=at(30))) == w.Look("watching for late arrivals")
    seen = Inventory(at=story.now, nodes=[story.facts("booting", key, "i-77")])
    assert story.decide(dataclasses.replace(world, inventory=seen)) == w.EndLate(key, "i-77")
    over = Inventory(at=story.now, nodes=[story.facts("terminated", key, "i-77")])
    assert isinstance(story.decide(dataclasses.replace(world, inventory=over)), w.Wait)
    ending = world.given_up[0].model_copy(
        update={"answer": "known", "id": "i-77", "terminate_intended_at": at(99), "terminate_reason": LATE}
    )
    assert story.decide(dataclasses.replace(world, given_up=(ending,))) == w.Confirm(key)


def test_the_providers_log_is_asked_a_few_times_and_holds_nothing_up() -> None:
    story = Story().begun().launched().ready().after(100).terminated("stopped").gone().attempt_ended("failed")
    world = dataclasses.replace(offers(story, OFFER), traits=Traits(audited=True))
    assert story.decide(world) == w.EndRun("failed", "failed")
    story.tell(e.RunEnded(at=story.now, outcome="failed", reason="failed"))
    assert story.decide(world) == w.Reconcile(KEY)
    assert story.decide(offers(story, OFFER)) == w.Done()
    asked = dataclasses.replace(world, audits={KEY: (story.now, 1)})
    answer = story.decide(asked)
    assert isinstance(answer, w.Wait)
    assert answer.seconds == world.traits.retry_seconds
    assert story.decide(dataclasses.replace(world, audits={KEY: (story.now, 4)})) == w.Done()
    told = e.BillingReconciled(at=story.now, source="the log", ended=story.now)
    assert story.tell(told).decide(world) == w.Done()


def test_a_node_that_was_believed_gone_and_is_back_is_ended_again() -> None:
    story = Story().training().ended("failed").terminated().gone().attempt_ended("trainer-failed")
    story.tell(e.RunEnded(at=story.now, outcome="failed", reason="x")).after(100)
    assert story.decide(story.looks()) == w.Done()
    assert story.decide(story.looks(story.facts("terminating"))) == w.Done()
    world = story.looks(story.facts("active"))
    assert story.decide(world) == w.Adopt(KEY, "i-10")
    story.tell(e.LaunchFound(at=story.now, id="i-10"))
    assert story.decide(world) == w.Terminate(KEY, "trainer-failed")


# ---------------------------------------------------------------- letting go


def test_a_termination_is_not_believed_but_looked_at_and_repeated() -> None:
    story = Story().training().ended("failed").terminated()
    assert story.decide() == w.Confirm(KEY)
    asked = w.World(confirmed_at={KEY: story.now})
    answer = story.decide(asked)
    assert isinstance(answer, w.Wait)
    assert answer.seconds == 5.0
    story.after(61)
    assert story.decide(asked) == w.Terminate(KEY, "trainer-failed")


def test_a_termination_that_was_not_accepted_is_repeated_sooner() -> None:
    story = Story().training().ended("failed").terminated(accepted=False).after(5)
    assert story.decide(w.World(confirmed_at={KEY: story.now})) == w.Terminate(KEY, "trainer-failed")


def test_only_a_list_taken_after_the_request_shows_the_end() -> None:
    story = Story().training().ended("failed")
    before = story.looks(story.facts("terminated"))
    story.after(1).terminated().after(1)
    assert story.decide(before) == w.Confirm(KEY)
    assert story.decide(story.looks(story.facts("terminated"))) == w.DeclareGone(KEY, "listed as terminated")


def test_an_empty_list_is_no_proof_of_the_end() -> None:
    story = Story().training().ended("failed").terminated().after(1)
    assert story.decide(story.looks()) == w.Confirm(KEY)


def test_a_living_node_without_an_attempt_is_ended() -> None:
    story = Story().begun().launched().attempt_ended("node-lost")
    assert story.decide() == w.Terminate(KEY, "unwanted")


def test_a_kept_node_stays_until_its_time_or_a_request() -> None:
    story = Story(on_finish="1h").training().seen(100, here=True).after(60).ended("finished").after(1)
    kept = story.decide(story.trains("ended", job=_job(story, "done")))
    assert kept == w.Keep(KEY, story.now + timedelta(hours=1))
    story.tell(e.NodeKept(at=story.now, until=story.now + timedelta(hours=1))).attempt_ended("succeeded")
    story.tell(e.RunEnded(at=story.now, outcome="succeeded", reason="finished"))
    assert isinstance(story.decide(story.looks(story.facts())), w.Wait)
    assert isinstance(story.after(61).decide(w.World(looked_at=story.now - timedelta(seconds=61))), w.Look)
    assert story.after(3600).decide(story.looks(story.facts())) == w.Terminate(KEY, "no longer kept")
    forever = Story(on_finish="keep").training().seen(100, here=True).after(60).ended("finished").after(1)
    assert forever.decide(forever.trains("ended", job=_job(forever, "done"))) == w.Keep(KEY, None)
    forever.tell(e.NodeKept(at=forever.now)).attempt_ended("succeeded")
    forever.tell(e.RunEnded(at=forever.now, outcome="succeeded", reason="finished"))
    assert forever.decide() == w.Done()
    forever.tell(e.ReleaseRequested(at=forever.now, key=KEY))
    assert isinstance(forever.decide(), w.Look), "nobody has looked for long: is it there at all?"
    assert forever.decide(forever.looks()) == w.Terminate(KEY, "no longer kept")


def test_a_run_that_is_asked_to_stop_keeps_nothing_even_if_it_succeeds_first() -> None:
    """`stop` means that the nodes go, whenever it comes: before the node is kept, or between that and the verdict."""
    story = Story(on_finish="keep").training().seen(100, here=True).after(60).ended("finished").after(1)
    world = story.trains("ended", job=_job(story, "done"))
    assert story.decide(world) == w.Keep(KEY, None)
    late = Story(on_finish="keep").training().seen(100, here=True).after(60).ended("finished").after(1)
    late.tell(e.NodeKept(at=late.now))
    for item in (story, late):
        item.tell(e.StopRequested(at=item.now, reason="user"))
    assert story.decide(world) == w.Terminate(KEY, "succeeded")
    late.attempt_ended("succeeded")
    assert late.decide(late.looks()) == w.Terminate(KEY, "no longer kept")
    late.terminated().after(1)
    assert late.decide(late.looks()) == w.Confirm(KEY), "no verdict before its end is confirmed"


def test_a_kept_node_that_died_is_declared_gone() -> None:
    story = (
        Story()
        .training()
        .ended("finished")
        .tell(e.NodeKept(at=at(30), until=at(9000)))
        .attempt_ended("succeeded")
    )
    story.tell(e.RunEnded(at=story.now, outcome="succeeded", reason="finished")).after(5)
    assert story.decide(story.looks(story.facts("preempted"))) == w.DeclareGone(KEY, "listed as preempted")


# ---------------------------------------------------------------- stop, budget, deadline


def test_budget_and_deadline_ask_for_the_end_with_a_reserve() -> None:
    story = Story(max_micro_usd=6_000_000).training()  # ten minutes at 36 $/h; a tenth of them is kept back
    answer = story.decide(story.trains())
    assert isinstance(answer, w.Wait)
    assert story.after(540).decide(story.trains()) == w.RequestStop("budget")
    story = Story(max_seconds=600.0).training()
    assert isinstance(story.decide(story.trains()), w.Wait)
    assert story.after(530).decide(story.trains()) == w.RequestStop("deadline")


def test_the_wait_ends_when_the_budget_does() -> None:
    story = Story(max_micro_usd=6_000_000).training().after(430)
    answer = story.decide(story.trains())
    assert isinstance(answer, w.Wait)
    assert answer.seconds <= 60.0


def test_a_run_without_limits_has_a_minute_of_grace() -> None:
    assert terms.grace_seconds(Story().training().record) == 60


def test_collecting_ends_with_the_money() -> None:
    story = Story(max_micro_usd=6_000_000).training().seen(50).after(300)
    story.tell(e.StopRequested(at=story.now, reason="budget")).ended("stopped").after(5)
    busy = story.trains("ended", job=_job(story, "running"))
    assert isinstance(story.decide(busy), w.Wait)
    story.after(300)
    assert story.decide(story.trains("ended", job=_job(story, "running"))) == w.Terminate(KEY, "out-of-time")
    story.terminated("out-of-time").gone().attempt_ended("out-of-time")
    assert story.decide() == w.EndRun("stopped", "budget")


def test_a_run_that_was_extended_extends_the_lease_and_the_nodes_deadline() -> None:
    story = Story(max_seconds=3600.0).training()
    assert isinstance(story.decide(story.trains(deadline=at(3600))), w.Wait)
    story.tell(e.LimitsRaised(at=story.now, max_seconds=100 * 3600.0)).after(10)
    assert story.decide(story.trains(deadline=at(3600))) == w.ExtendLease(KEY, at(360_000))
    marker = story.nodes[KEY].marker.model_copy(update={"lease_end": at(360_000)})
    story.tell(e.LeaseExtended(at=story.now, marker=marker))
    assert story.decide(story.trains(deadline=at(3600))) == w.StartTrainer(f"{RUN}-a1", at(360_000))
    starts = story.record.attempts[0].starts
    story.tell(e.TrainerStarted(at=story.now, attempt=1, token=f"{RUN}-a1", deadline=at(360_000)))
    assert story.record.attempts[0].starts == starts
    assert isinstance(story.decide(story.trains(deadline=at(360_000))), w.Wait)


def test_lease_and_the_nodes_own_deadline_end_with_the_money_where_that_comes_before_the_time() -> None:
    story = Story(max_micro_usd=36_000_000, max_seconds=100 * 3600.0).begun()  # an hour at 36 $/h
    assert story.decide() == w.Launch(1, 0, OFFER, at(3600))

    def leased(seconds: float) -> None:
        marker = story.nodes[KEY].marker.model_copy(update={"lease_end": at(seconds)})
        story.tell(e.LeaseExtended(at=story.now, marker=marker))

    story.launched()
    leased(3600)
    assert isinstance(story.after(200).decide(story.looks(story.facts("booting"))), w.Wait)
    assert story.after(200).decide(story.looks(story.facts("booting"))) == w.ExtendLease(KEY, at(4000))
    leased(4000)
    story.after(200).observed(not_before=story.now)
    story.tell(e.NodeReady(at=story.now, boot_id="1"))
    assert story.decide(story.looks(story.facts())) == w.ExtendLease(KEY, at(4200))
    leased(4200)
    story.after(30).prepared()
    assert story.decide(story.looks(story.facts())) == w.StartTrainer(f"{RUN}-a1", at(4200))
    assert terms.grace_seconds(story.record) == 60.0
    story.tell(e.TrainerStarted(at=story.now, attempt=1, token=f"{RUN}-a1", deadline=at(4200)))
    assert isinstance(story.after(601.00007).decide(story.trains(deadline=at(4200))), w.Wait)
    gone = w.World(**{**vars(story.looks(story.facts())), "trainer": story.trains("absent").trainer})
    again = story.decide(gone)
    assert again == w.StartTrainer(f"{RUN}-a1", at(4200)), (
        "the same deadline, to the microsecond: a new start is counted"
    )
    story.after(0.99993).tell(e.LimitsRaised(at=story.now, max_micro_usd=72_000_000))
    assert story.decide(story.trains(deadline=at(4200))) == w.ExtendLease(KEY, at(7800))
    leased(7800)
    assert story.decide(story.trains(deadline=at(4200))) == w.StartTrainer(f"{RUN}-a1", at(7800))


def test_a_node_that_stopped_by_itself_says_which_limit_it_was() -> None:
    for limits, reason in (((36_000_000, 100 * 3600.0), "budget"), ((None, 3600.0), "deadline")):
        story = Story(max_micro_usd=limits[0], max_seconds=limits[1]).training()
        story.tell(e.TrainerStarted(at=story.now, attempt=1, token=f"{RUN}-a1", deadline=at(3600)))
        story.ended("deadline").terminated().gone().attempt_ended("trainer-deadline")
        assert story.decide() == w.EndRun("stopped", reason)


def test_the_deadline_of_a_resumed_run_counts_anew() -> None:
    story = Story(max_seconds=3600.0).training().seen(50, here=True).after(60).stop().ended("stopped")
    story.terminated().gone().attempt_ended("trainer-stopped").tell(
        e.RunEnded(at=story.now, outcome="stopped", reason="user")
    )
    story.after(86_400).tell(e.ResumeRequested(at=at(86_500)))
    answer = story.decide(offers(story, OFFER))
    assert isinstance(answer, w.BeginAttempt)
    assert (answer.attempt, answer.from_step) == (2, 50)


STOPS: dict[str, tuple[Callable[[], Story], object]] = {
    "planned": (lambda: Story().stop(), w.EndRun("stopped", "user")),
    "attempt open": (lambda: Story().begun().stop(), w.EndAttempt("stopped")),
    "booting": (lambda: Story().begun().launched().stop(), w.Terminate(KEY, "stopped")),
    "preparing": (lambda: Story().begun().launched().ready().stop(), w.Terminate(KEY, "stopped")),
}


@pytest.mark.parametrize("state", STOPS)
def test_a_stop_before_training_begins_nothing_new(state: str) -> None:
    make, expected = STOPS[state]
    story = make()
    assert story.decide(story.looks(story.facts())) == expected


def test_a_stop_while_the_launch_is_in_doubt_waits_for_the_truth() -> None:
    story = Story().begun().intended().stop()
    assert isinstance(story.decide(story.looks()), w.Wait)
    assert story.decide(story.looks(story.facts())) == w.Adopt(KEY, "i-10")


def test_stopping_a_trainer() -> None:
    story = Story().training().after(10).stop()
    assert story.decide(story.trains()) == w.StopTrainer(True)
    assert isinstance(story.decide(story.trains("stopping")), w.Wait)
    asked = w.World(**{**vars(story.trains()), "stop_asked": (story.now, True)})
    assert isinstance(story.decide(asked), w.Wait)
    story.stop(checkpoint=False)
    assert story.decide(story.trains("stopping")) == w.StopTrainer(False)
    assert isinstance(story.decide(story.trains("stopping", graceful=False)), w.Wait)


def test_a_stop_does_not_start_a_dead_trainer_again() -> None:
    story = Story().training().seen(50).after(100).stop()
    assert story.decide(story.trains("dead")) == w.Collect((50,))
    story.verified(50)
    assert story.decide(story.trains("dead", job=_job(story, "done"))) == w.Terminate(KEY, "stopped")


# ---------------------------------------------------------------- dead nodes


@pytest.mark.parametrize("status", ["terminated", "preempted"])
def test_a_node_that_is_listed_as_ended_is_gone(status: str) -> None:
    story = Story().training().after(60)
    assert story.decide(story.looks(story.facts(status))) == w.DeclareGone(KEY, f"listed as {status}")  # type: ignore[arg-type]


def test_a_node_that_is_missing_once_is_not_gone() -> None:
    story = Story().training().after(120)
    world = absences(story, KEY, 0, world=story.trains())
    assert isinstance(story.decide(w.World(**{**vars(world), "inventory": story.looks().inventory})), w.Wait)


def test_a_node_that_is_missing_often_is_asked_for_by_its_id() -> None:
    story = Story().training().after(200)
    world = absences(story, KEY, 100, 50, 0)
    assert story.decide(world) == w.Confirm(KEY)
    assert story.decide(w.World(**{**vars(world), "confirmed_at": {KEY: story.now}})) != w.Confirm(KEY)


def test_a_lost_node_is_replaced_from_the_newest_checkpoint_here() -> None:
    story = Story().training().seen(50, here=True).seen(60).after(60).gone()
    assert story.decide() == w.EndAttempt("node-lost")
    answer = story.attempt_ended("node-lost").decide(offers(story, OFFER))
    assert isinstance(answer, w.BeginAttempt)
    assert answer.from_step == 50


@pytest.mark.parametrize(("here", "outcome"), [(True, "failed"), (False, "lost")])
def test_a_lost_node_without_replacement(here: bool, outcome: str) -> None:
    story = Story(replace=False).training().seen(50, here=here).gone().attempt_ended("node-lost")
    assert story.decide(offers(story, OFFER)) == w.EndRun(outcome, "node-lost")  # type: ignore[arg-type]


def test_replacements_without_progress_are_bounded() -> None:
    story = Story(max_restarts=1)
    for number in (1, 2):
        assert isinstance(story.decide(offers(story, OFFER)), w.BeginAttempt)
        story.begun(number).launched(number).gone(f"llmctl-{RUN}-a{number}-n0").attempt_ended(
            "node-lost", number
        )
    assert story.decide(offers(story, OFFER)) == w.EndRun("lost", "node-lost")


def test_illnesses_end_a_node() -> None:
    story = Story().begun().launched()
    assert story.decide(story.looks(story.facts("unhealthy"))) == w.Terminate(KEY, "unhealthy")
    bad = w.Contact(reachable=True, since=story.now, host_key_mismatch=True)
    assert story.decide(story.looks(story.facts(), contacts={KEY: bad})) == w.Terminate(KEY, "host-key")
    story.after(1801)
    assert story.decide(story.looks(story.facts("booting"))) == w.Terminate(KEY, "boot-timeout")
    story = Story().begun().launched().ready().tell(e.PreflightFailed(at=at(0), reason="hot"))
    assert story.decide(story.looks(story.facts())) == w.Terminate(KEY, "preflight")


def test_a_silent_node_is_dead_after_twenty_minutes_if_its_provider_calls_it_active_now() -> None:
    story = Story().training()
    silent = w.Contact(reachable=False, since=story.now)
    before = story.looks(story.facts(), contacts={KEY: silent})
    story.after(1201)
    assert story.decide(before) != w.Terminate(KEY, "unreachable")  # that list is twenty minutes old
    assert story.decide(story.looks(story.facts(), contacts={KEY: silent})) == w.Terminate(KEY, "unreachable")
    assert story.terminated("unreachable").gone().decide() == w.EndAttempt("node-lost")


def test_a_silent_node_is_looked_for() -> None:
    story = Story().training().after(30)
    silent = {KEY: w.Contact(reachable=False, since=story.now)}
    world = w.World(
        **{
            **vars(story.looks(story.facts(), contacts=silent)),
            "looked_at": story.now - timedelta(seconds=21),
        }
    )
    assert isinstance(story.decide(world), w.Look)


@pytest.mark.parametrize("reason", ["preflight", "boot-timeout", "prepare-failed"])
def test_three_bad_nodes_end_a_launch(reason: str) -> None:
    story = Story()
    for number in (1, 2, 3):
        assert isinstance(story.decide(offers(story, OFFER)), w.BeginAttempt)
        story.begun(number).attempt_ended(reason, number)
    answer = story.decide(offers(story, OFFER))
    assert isinstance(answer, w.EndRun)
    assert (answer.outcome, answer.reason) == ("failed", reason)


@pytest.mark.parametrize("reason", ["preflight", "boot-timeout", "prepare-failed", "trainer-interrupted"])
def test_after_a_bad_node_the_next_offer_is_tried_and_the_first_again_where_there_is_no_other(
    reason: str,
) -> None:
    story, chosen = Story(), []
    for number in (1, 2, 3):
        answer = story.decide(offers(story, OFFER, OTHER))
        assert isinstance(answer, w.BeginAttempt)
        chosen.append(answer.offer)
        story.begun(number, offer=answer.offer).attempt_ended(reason, number)
        if number == 2:
            assert isinstance(again := story.decide(offers(story, OFFER)), w.BeginAttempt)
            assert again.offer == OFFER
    assert chosen == [OFFER, OTHER, OFFER]


# ---------------------------------------------------------------- the stages


def test_boot_prepare_start_train() -> None:
    story = Story().begun().launched()
    assert isinstance(story.decide(w.World()), w.Look)
    booting = story.decide(story.looks(story.facts("booting")))
    assert isinstance(booting, w.Wait)
    assert booting.seconds == 10.0
    story.after(10).ready()
    world = story.looks(story.facts())
    assert story.decide(world) == w.Prepare(KEY)
    busy = w.World(**{**vars(world), "jobs": {f"{KEY}/prepare": _job(story, "running")}})
    assert isinstance(story.decide(busy), w.Wait)
    story.prepared()
    assert story.decide(world) == w.StartTrainer(f"{RUN}-a1", None)
    story.tell(e.TrainerStarted(at=story.now, attempt=1, token=f"{RUN}-a1"))
    assert isinstance(story.decide(world), w.Wait)  # nothing was heard yet
    assert isinstance(story.decide(story.trains()), w.Wait)


def test_two_nodes_are_launched_one_after_the_other_and_wait_for_each_other() -> None:
    story = Story(nodes=2).begun(nodes=2).launched()
    answer = story.decide(story.looks(story.facts()))
    assert isinstance(answer, w.Launch)
    assert answer.index == 1
    story.launched(index=1).ready()
    world = story.looks(story.facts(), story.facts("booting", KEY2, "i-11"))
    assert isinstance(story.decide(world), w.Wait)
    story.ready(KEY2).prepared()
    world = story.looks(story.facts(), story.facts("active", KEY2, "i-11"))
    assert story.decide(world) == w.Prepare(KEY2)


def test_a_refused_second_node_releases_the_first() -> None:
    story = Story(nodes=2).begun(nodes=2).launched().intended(index=1)
    story.tell(e.LaunchRefused(at=story.now, code="sold", message="out", capacity=True), KEY2)
    assert story.decide(story.looks(story.facts())) == w.Terminate(KEY, "no-capacity")
    assert story.terminated("no-capacity").gone().decide() == w.EndAttempt("no-capacity")


@pytest.mark.parametrize(("failures", "wait"), [(1, 5), (2, 10), (3, 20), (9, 60)])
def test_a_failed_preparation_is_tried_again_after_a_while(failures: int, wait: int) -> None:
    story = Story().begun().launched().ready()
    for ago, expected in ((wait - 1, w.Wait), (wait, w.Prepare)):
        job = {f"{KEY}/prepare": _job(story, "failed", failures, ago)}
        assert isinstance(story.decide(story.looks(story.facts(), jobs=job)), expected)


def test_a_lane_that_fails_too_often_costs_the_node_and_a_fatal_one_the_run() -> None:
    story = Story().begun().launched().ready()
    for _ in range(life.MAX_JOB_FAILURES):
        story.tell(e.JobFailed(at=story.now, job="prepare", reason="slow", key=KEY))
    assert story.decide(story.looks(story.facts())) == w.Terminate(KEY, "prepare-failed")
    story = Story().begun().launched().ready()
    story.tell(e.JobFailed(at=story.now, job="prepare", reason="no such file", key=KEY, fatal=True))
    assert story.decide(story.looks(story.facts())) == w.Terminate(KEY, "failed")
    story.terminated("failed").gone().attempt_ended("failed")
    assert story.decide() == w.EndRun("failed", "no such file")


def test_what_fails_beside_a_trainer_is_collected_first() -> None:
    story = Story().training().seen(50)
    story.tell(e.JobFailed(at=story.now, job="prepare", reason="shard 9 is broken", key=KEY, fatal=True))
    assert story.decide(story.trains()) == w.StopTrainer(True)
    story.ended("stopped").after(1)
    assert story.decide(story.trains("ended")) == w.Collect((50,))
    story.verified(50)
    assert story.decide(story.trains("ended", job=_job(story, "done"))) == w.Terminate(KEY, "trainer-stopped")
    story.terminated("trainer-stopped").gone().attempt_ended("trainer-stopped")
    assert story.decide() == w.EndRun("failed", "shard 9 is broken")


def test_a_dead_trainer_is_started_again_a_bounded_number_of_times() -> None:
    story = Story().training().seen(50)
    assert isinstance(story.decide(story.trains("dead")), w.Wait)  # it was started just now
    for _ in range(life.MAX_STARTS):
        story.after(61)
        assert isinstance(story.decide(story.trains("dead")), w.StartTrainer)
        story.tell(e.TrainerStarted(at=story.now, attempt=1, token=f"{RUN}-a1"))
    story.after(61)
    assert story.decide(story.trains("dead")) == w.Collect((50,))
    story.verified(50)
    assert story.decide(story.trains("dead", job=_job(story, "done"))) == w.Terminate(KEY, "trainer-lost")


def test_a_start_under_way_is_not_repeated() -> None:
    story = Story().training().after(100)
    world = story.trains("absent")
    busy = w.World(**{**vars(world), "jobs": {"start": _job(story, "running")}})
    assert isinstance(story.decide(busy), w.Wait)


# ---------------------------------------------------------------- collecting


@pytest.mark.parametrize(
    ("fetch", "end", "steps"),
    [
        ("none", "finished", ()),
        ("latest", "finished", (100,)),
        ("all", "finished", (50, 100)),
        ("none", "failed", (100,)),
    ],
)
def test_what_is_collected(fetch: str, end: str, steps: tuple[int, ...]) -> None:
    story = Story(fetch=fetch).training().seen(50).seen(100).after(9).ended(end).after(1)
    assert story.decide(story.trains("ended")) == w.Collect(steps)


def test_best_is_the_lowest_validation_loss() -> None:
    story = Story(fetch="best").training()
    for step, loss in ((50, 2.0), (100, 2.5)):
        story.tell(
            e.CheckpointSeen(at=story.now, step=step, sha256=f"s{step}", bytes=1, validation_loss=loss)
        )
    assert story.ended("finished").after(1).decide(story.trains("ended")) == w.Collect((50,))


def test_the_node_waits_for_verified_bytes_and_for_nothing_else() -> None:
    story = Story().training().seen(100).after(5).ended("finished").after(5)
    assert story.decide(story.trains("ended")) == w.Collect((100,))
    busy = story.trains("ended", job=_job(story, "running"))
    assert isinstance(story.decide(busy), w.Wait)
    done = story.trains("ended", job=_job(story, "done"))
    assert not isinstance(story.decide(done), w.Terminate)  # the job says so, the bytes do not
    story.verified(100)
    assert isinstance(story.decide(busy), w.Wait)  # log and metrics are still on their way
    assert story.decide(done) == w.Terminate(KEY, "succeeded")


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_what_the_node_has_let_go_holds_nothing_up(end: str) -> None:
    """Only what can still be had is waited for: step 50 is gone, and of step 100 the weights are all that there will be."""
    story = Story(fetch="all").training().seen(50).seen(100).verified(100, weights_only=True)
    story.after(9).ended(end).after(1)
    for step in (50, 100):
        story.tell(e.CheckpointGone(at=story.now, step=step, sha256=f"s{step}"))
    done = w.Job("done", story.now)
    assert isinstance(story.decide(story.trains("ended", job=done)), w.Terminate)


def test_what_is_at_stake_is_said_with_its_price() -> None:
    """While the newest checkpoint cannot be had: which one, why, what a minute costs, and what ends the wait."""
    story = (
        Story(max_seconds=3600).training().seen(50, here=True).seen(100).after(9).ended("failed").after(600)
    )
    failed = w.Job("failed", story.now, 3, "the link is down")
    said = at_stake(story.record, story.trains("ended", job=failed), story.now)
    assert said is not None
    for part in (
        "step 100 ",
        "the link is down",
        "each minute of waiting costs $0.60",
        "the deadline ends the wait in 49m",
    ):
        assert part in said
    assert "step 50" not in said, "that one is here"
    assert at_stake(story.record, story.trains("ended", job=w.Job("running", story.now)), story.now) is None
    silent = w.Contact(reachable=False, since=story.now, error="no route")
    world = w.World(**{**vars(story.trains("ended")), "contacts": {KEY: silent}})
    assert "no route" in (at_stake(story.verified(100).record, world, story.now) or "")


def test_a_collection_of_an_earlier_attempt_says_nothing() -> None:
    story = Story().training().seen(100, here=True).after(5).ended("finished").after(5)
    assert story.decide(story.trains("ended", job=_job(story, "done", ago=100))) == w.Collect((100,))


def test_weights_alone_are_enough_for_a_success_only() -> None:
    for end, expected in (("finished", w.Terminate(KEY, "succeeded")), ("failed", w.Collect((100,)))):
        story = Story().training().seen(100).verified(100, weights_only=True).after(5).ended(end).after(10)
        assert story.decide(story.trains("ended", job=_job(story, "done", ago=6))) == expected


def test_a_failed_collection_is_repeated_for_as_long_as_there_is_money() -> None:
    story = Story().training().seen(100).ended("failed").after(500)
    assert isinstance(story.decide(story.trains("ended", job=_job(story, "failed", 9, ago=59))), w.Wait)
    assert story.decide(story.trains("ended", job=_job(story, "failed", 9, ago=60))) == w.Collect((100,))


@pytest.mark.parametrize(("here", "reason"), [(True, "succeeded"), (False, "node-lost")])
def test_a_node_that_dies_while_collecting(here: bool, reason: str) -> None:
    story = Story().training().seen(100, here=here).ended("finished").gone()
    assert story.decide() == w.EndAttempt(reason)


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [
        ("succeeded", w.EndRun("succeeded", "finished")),
        ("trainer-stopped", w.EndRun("stopped", "stopped on the node")),
        ("trainer-deadline", w.EndRun("stopped", "deadline")),
        ("trainer-failed", w.EndRun("failed", "the trainer failed")),
        ("host-key", w.EndRun("failed", "host-key")),
        ("out-of-time", w.EndRun("stopped", "budget")),
        ("something new", w.EndRun("failed", "something new")),
    ],
)
def test_verdicts(reason: str, verdict: w.EndRun) -> None:
    story = Story().begun().attempt_ended(reason)
    assert story.decide(offers(story, OFFER)) == verdict
    story.tell(e.RunEnded(at=story.now, outcome=verdict.outcome, reason=verdict.reason))
    assert story.decide() == w.Done()


def test_a_success_outranks_a_stop_that_came_too_late() -> None:
    story = Story().begun().stop().attempt_ended("succeeded")
    assert story.decide() == w.EndRun("succeeded", "finished")


def test_nothing_is_rented_while_an_old_node_is_not_settled() -> None:
    story = Story().training().after(10).terminated("node-lost").attempt_ended("node-lost")
    world = w.World(offers=(OFFER,), offers_at=story.now, confirmed_at={KEY: story.now})
    assert isinstance(story.decide(world), w.Wait)
