"""One pace for all processes, and one reading that they share."""

from __future__ import annotations

import itertools
import json
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provisioning.base import Unavailable
from provisioning.ratelimit import SLOWER, Limiter, Rates, SharedReading, Turns, take_turn

RATES = Rates()


class Clock:
    """Virtual time: sleeping is adding."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def simulate(kinds: list[tuple[float, bool, bool]]) -> list[tuple[float, bool, bool]]:
    """Callers (arrival, launch, urgent) that share one state; returns (sent, launch, urgent) in order of sending."""
    turns = Turns()
    waiting = sorted(
        (arrival, number, launch, urgent) for number, (arrival, launch, urgent) in enumerate(kinds)
    )
    sent = []
    while waiting:
        now, number, launch, urgent = waiting.pop(0)
        seconds, turns = take_turn(turns, now, RATES, launch=launch, urgent=urgent)
        if seconds <= 0:
            sent.append((now, launch, urgent))
        else:
            waiting = sorted([*waiting, (now + seconds, number, launch, urgent)])
    return sent


CALLERS = st.lists(st.tuples(st.floats(0, 30), st.booleans(), st.just(False)), max_size=12)


@settings(deadline=None)
@given(CALLERS)
def test_nobody_is_faster_than_the_limits_and_everybody_is_served(
    kinds: list[tuple[float, bool, bool]],
) -> None:
    sent = simulate(kinds)
    assert len(sent) == len(kinds)
    times = [at for at, _, _ in sent]
    launches = [at for at, launch, _ in sent if launch]
    for series, interval in ((times, RATES.request_seconds), (launches, RATES.launch_seconds)):
        assert all(later - earlier >= interval - 1e-6 for earlier, later in itertools.pairwise(series))


@settings(deadline=None)
@given(CALLERS, st.floats(0, 30))
def test_a_terminate_waits_for_one_turn_however_many_others_wait(
    kinds: list[tuple[float, bool, bool]], arrival: float
) -> None:
    sent = simulate([*kinds, (arrival, False, True)])
    assert len(sent) == len(kinds) + 1
    (at,) = [at for at, _, urgent in sent if urgent]
    assert at - arrival <= RATES.request_seconds + 1e-6


def test_the_default_rates_keep_the_documented_limits() -> None:
    assert RATES.request_seconds > 1
    assert RATES.launch_seconds > 12


def test_a_clock_that_was_set_back_costs_a_minute_at_most() -> None:
    year = 365 * 86400.0
    for turns in (
        Turns(request_at=year),
        Turns(launch_at=year),
        Turns(urgent_until=year),
        Turns(slow_until=year),
    ):
        seconds, left = take_turn(turns, 0.0, RATES, launch=True, urgent=False)
        assert seconds <= 60
        assert max(left.request_at, left.launch_at, left.urgent_until, left.slow_until) <= 120


def test_too_fast_means_slower_for_a_while(tmp_path: Path) -> None:
    clock = Clock()
    limiter = Limiter(tmp_path / "turns.json", now=clock.time, sleep=clock.sleep)

    def distance() -> float:
        limiter.wait()
        limiter.done()
        start = clock.now
        limiter.wait()
        return clock.now - start

    assert distance() == pytest.approx(RATES.request_seconds)
    limiter.back_off(0)
    assert distance() == pytest.approx(SLOWER * RATES.request_seconds)
    clock.now += 120
    assert distance() == pytest.approx(RATES.request_seconds)


def test_the_limiter_shares_its_state_through_a_private_file(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "turns.json"
    limiters = [Limiter(path, now=clock.time, sleep=clock.sleep) for _ in range(3)]
    start = clock.now
    for limiter in limiters:
        limiter.wait()
    assert clock.now - start == pytest.approx(2 * RATES.request_seconds)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    limiters[0].wait(launch=True)
    before = clock.now
    limiters[1].wait(launch=True)
    assert clock.now - before == pytest.approx(RATES.launch_seconds)


def test_distance_is_kept_from_the_end_of_a_slow_request(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (Limiter(tmp_path / "turns.json", now=clock.time, sleep=clock.sleep) for _ in range(2))
    first.wait(launch=True)
    clock.now += 0.9  # until then the provider may not have counted it
    first.done(launch=True)
    answered = clock.now
    second.wait()
    assert clock.now - answered == pytest.approx(RATES.request_seconds)
    second.wait(launch=True)
    assert clock.now - answered == pytest.approx(RATES.launch_seconds)


def test_retry_after_holds_for_everyone_but_not_for_ever(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (Limiter(tmp_path / "turns.json", now=clock.time, sleep=clock.sleep) for _ in range(2))
    first.back_off(7)
    start = clock.now
    second.wait()
    assert clock.now - start == pytest.approx(7)
    first.back_off(86400)
    start = clock.now
    second.wait(urgent=True)
    assert clock.now - start == pytest.approx(60)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"request_at": "soon"}', "\x00" * 100])
def test_a_torn_state_file_is_begun_anew(tmp_path: Path, text: str) -> None:
    clock = Clock()
    path = tmp_path / "turns.json"
    path.write_text(text)
    Limiter(path, now=clock.time, sleep=clock.sleep).wait()
    assert json.loads(path.read_text())["request_at"] > clock.now


def test_patience_ends(tmp_path: Path) -> None:
    clock = Clock()
    rates = Rates(patience_seconds=20)
    limiter = Limiter(tmp_path / "turns.json", rates, now=clock.time, sleep=clock.sleep)
    limiter.back_off(60)
    with pytest.raises(Unavailable, match="no turn"):
        limiter.wait()


def test_a_stopped_holder_of_the_lock_stops_nobody(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "turns.json"
    clock = Clock()
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        start = clock.now
        Limiter(path, now=clock.time, sleep=clock.sleep).wait()
        assert clock.now - start == pytest.approx(10)


def shared(tmp_path: Path, clock: Clock) -> SharedReading:
    return SharedReading(tmp_path / "instances.json", 5.0, now=clock.time, sleep=clock.sleep)


def test_a_young_reading_serves_all_and_an_old_one_nobody(tmp_path: Path) -> None:
    clock = Clock()
    read: list[float] = []

    def fetch() -> tuple[float, str]:
        read.append(clock.now)
        return clock.now, f"reading {len(read)}"

    one, two = shared(tmp_path, clock), shared(tmp_path, clock)
    assert one.read(fetch) == (clock.now, "reading 1")
    clock.now += 4
    assert two.read(fetch) == (clock.now - 4, "reading 1")
    clock.now += 2
    assert two.read(fetch)[1] == "reading 2"
    assert stat.S_IMODE((tmp_path / "instances.json").stat().st_mode) == 0o600


def test_a_caller_may_demand_one_that_was_asked_for_later(tmp_path: Path) -> None:
    clock = Clock()
    reading = shared(tmp_path, clock)
    reading.read(lambda: (clock.now, "before"))
    asked = clock.now
    clock.now += 1
    assert reading.read(lambda: (clock.now, "after"), newer_than=asked) == (clock.now, "after")
    assert reading.read(lambda: (clock.now, "never"), newer_than=asked)[1] == "after"


def test_what_was_forgotten_or_lies_in_the_future_is_read_again(tmp_path: Path) -> None:
    clock = Clock()
    reading = shared(tmp_path, clock)
    reading.read(lambda: (clock.now + 3600, "the clock was set back after this"))
    assert reading.read(lambda: (clock.now, "now"))[1] == "now"
    reading.forget()
    reading.forget()
    assert reading.read(lambda: (clock.now, "again"))[1] == "again"


def test_an_error_is_not_shared(tmp_path: Path) -> None:
    clock = Clock()
    reading = shared(tmp_path, clock)

    def fail() -> tuple[float, str]:
        raise Unavailable("down")

    with pytest.raises(Unavailable):
        reading.read(fail)
    assert reading.read(lambda: (clock.now, "up"))[1] == "up"


def test_readers_that_come_together_ask_once(tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()
    calls: list[int] = []

    def fetch() -> tuple[float, str]:
        import time

        calls.append(1)
        entered.set()
        release.wait(10)
        return time.time(), "once"

    answers: list[str] = []
    readers = [
        threading.Thread(target=lambda: answers.append(SharedReading(tmp_path / "r.json").read(fetch)[1]))
        for _ in range(4)
    ]
    readers[0].start()
    assert entered.wait(10)
    for reader in readers[1:]:
        reader.start()
    release.set()
    for reader in readers:
        reader.join()
    assert answers == ["once"] * 4
    assert len(calls) == 1
