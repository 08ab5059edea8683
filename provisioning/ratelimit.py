"""One pace for all llmctl processes of this user, and one reading of the world that they share.

Both are small files behind an flock, so that a driver, a `status --watch` and a `reap` in a third terminal together
stay below a provider's rate limit. Time is the wall clock, because processes share it; a clock that was set back
costs a minute at most.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from provisioning.base import Unavailable

LONGEST_BACK_OFF_SECONDS = 60.0
"""A provider that asks for more is asked again after this."""
SLOWER = 3.0
"""After a "too fast" every distance is this many times as long, for a while: a limit that is stricter than documented
would otherwise refuse the same second request of a pair for ever."""
LOCK_PATIENCE_SECONDS = 10.0
"""How long the holder of a lock is waited for: longer than one exchange takes."""
_LOCK_POLL_SECONDS = 0.05
SLOW_REQUESTS = 60
"""… as long as this many requests would take."""


@dataclass(frozen=True)
class Rates:
    """Seconds between requests, counted from the end of the one before: what the network delays cannot then bring two
    of them closer together. The defaults are Lambda's documented limits (1 request/s, 1 launch per 12 s) and a margin."""

    request_seconds: float = 1.05
    launch_seconds: float = 12.2
    patience_seconds: float = 300.0
    """Waiting longer than this for a turn is given up: nothing was sent."""

    def scaled(self, pace: float) -> Rates:
        """The same rates in a world whose seconds last `pace` real ones."""
        return Rates(self.request_seconds * pace, self.launch_seconds * pace, self.patience_seconds)

    def at(self, turns: Turns, now: float) -> Rates:
        """The distances to keep now."""
        return self.scaled(SLOWER) if now < turns.slow_until else self


@dataclass(frozen=True)
class Turns:
    """What the processes tell each other: POSIX times of the next request, of the next launch, until when someone who
    may not wait (a terminate) is waiting, and until when all go slowly."""

    request_at: float = 0.0
    launch_at: float = 0.0
    urgent_until: float = 0.0
    slow_until: float = 0.0


def take_turn(turns: Turns, now: float, rates: Rates, *, launch: bool, urgent: bool) -> tuple[float, Turns]:
    """Seconds to wait before asking again (0: it is this caller's turn now), and the state to leave behind."""
    longest = SLOWER * rates.request_seconds
    slow_until = _sane(turns.slow_until, now, SLOW_REQUESTS * rates.request_seconds)
    turns = Turns(
        request_at=_sane(turns.request_at, now, max(longest, LONGEST_BACK_OFF_SECONDS)),
        launch_at=_sane(turns.launch_at, now, SLOWER * rates.launch_seconds),
        urgent_until=_sane(turns.urgent_until, now, LONGEST_BACK_OFF_SECONDS + 2 * longest),
        slow_until=slow_until,
    )
    distance = rates.at(turns, now)
    ready = max(turns.request_at, turns.launch_at if launch else 0.0)
    if not urgent:
        ready = max(ready, turns.urgent_until)
    if ready > now:
        # The one who may not wait keeps others away until one interval after its turn: time enough to wake up.
        kept = ready + distance.request_seconds if urgent else turns.urgent_until
        return ready - now, replace(turns, urgent_until=kept)
    taken = replace(turns, request_at=now + distance.request_seconds)
    if launch:
        taken = replace(taken, launch_at=now + distance.launch_seconds)
    return 0.0, replace(taken, urgent_until=0.0) if urgent else taken


def _sane(at: float, now: float, furthest: float) -> float:
    """A time that lies further ahead than any rule allows was written before the clock was set back."""
    return at if at <= now + furthest else now + min(furthest, 1.0)


class Limiter:
    """Hands out turns. `path` is the state file, shared by every process that uses the same account."""

    def __init__(
        self,
        path: Path,
        rates: Rates | None = None,
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = path
        self._rates = rates or Rates()
        self._now = now
        self._sleep = sleep

    def wait(self, *, launch: bool = False, urgent: bool = False) -> None:
        """Return when a request may be sent. Raises Unavailable after `patience_seconds`: nothing was sent."""
        waited = 0.0
        while True:
            with _locked(self._path, self._sleep) as descriptor:
                seconds, turns = take_turn(
                    _load(descriptor), self._now(), self._rates, launch=launch, urgent=urgent
                )
                _save(descriptor, turns)
            if seconds <= 0:
                return
            waited += seconds
            if waited > self._rates.patience_seconds:
                raise Unavailable(
                    f"no turn to send a request within {self._rates.patience_seconds:.0f} s",
                    code="rate-limit",
                    hint=f"other llmctl processes use the same account; if there are none, delete {self._path}",
                )
            self._sleep(seconds)

    def done(self, *, launch: bool = False) -> None:
        """The request has been answered, or given up: the next one keeps its distance from now."""
        with _locked(self._path, self._sleep) as descriptor:
            turns, now = _load(descriptor), self._now()
            distance = self._rates.at(turns, now)
            request_at = max(turns.request_at, now + distance.request_seconds)
            launch_at = max(turns.launch_at, now + distance.launch_seconds) if launch else turns.launch_at
            _save(descriptor, replace(turns, request_at=request_at, launch_at=launch_at))

    def back_off(self, seconds: float) -> None:
        """The provider said: too fast, and not before `seconds` from now. Holds for every process."""
        seconds = min(max(seconds, 0.0), LONGEST_BACK_OFF_SECONDS)
        with _locked(self._path, self._sleep) as descriptor:
            turns, now = _load(descriptor), self._now()
            slow_until = now + SLOW_REQUESTS * self._rates.request_seconds
            _save(
                descriptor,
                replace(turns, request_at=max(turns.request_at, now + seconds), slow_until=slow_until),
            )


class SharedReading:
    """A text that one process reads and all use while it is young. The file is readable by its owner only."""

    def __init__(
        self,
        path: Path,
        max_age_seconds: float = 5.0,
        *,
        patience_seconds: float = LOCK_PATIENCE_SECONDS,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = path
        self._max_age_seconds = max_age_seconds
        self._patience_seconds = patience_seconds
        self._now = now
        self._sleep = sleep

    def read(
        self, fetch: Callable[[], tuple[float, str]], *, newer_than: float | None = None
    ) -> tuple[float, str]:
        """(POSIX time at which it was asked for, text): the shared one where it is young enough and was asked for
        after `newer_than`, else what `fetch` brings. Errors of `fetch` pass through and are not shared."""
        known = self._fresh(newer_than)
        if known is not None:
            return known
        with _locked(self._path.with_suffix(".lock"), self._sleep, self._patience_seconds):
            known = self._fresh(newer_than)
            if known is not None:
                return known
            at, text = fetch()
            self._store(at, text)
            return at, text

    def forget(self) -> None:
        """What was read is no longer true."""
        with suppress(FileNotFoundError):
            self._path.unlink()

    def _fresh(self, newer_than: float | None) -> tuple[float, str] | None:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            at, text = float(stored["at"]), str(stored["text"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        young = 0 <= self._now() - at <= self._max_age_seconds
        return (at, text) if young and (newer_than is None or at > newer_than) else None

    def _store(self, at: float, text: str) -> None:
        temporary = self._path.with_suffix(f".{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"at": at, "text": text}, file)
        temporary.replace(self._path)


@contextmanager
def _locked(
    path: Path, sleep: Callable[[float], None], patience_seconds: float = LOCK_PATIENCE_SECONDS
) -> Iterator[int]:
    """The open, locked file. A holder that was stopped (Ctrl-Z) must not stop the others for ever: after `patience_seconds`
    the lock is ignored, which at worst costs a 429."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(round(patience_seconds / _LOCK_POLL_SECONDS)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                sleep(_LOCK_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _load(descriptor: int) -> Turns:
    text = os.pread(descriptor, 4096, 0)
    try:
        stored = json.loads(text)
        return Turns(**{name: float(stored[name]) for name in asdict(Turns())})
    except (ValueError, KeyError, TypeError):
        return Turns()


def _save(descriptor: int, turns: Turns) -> None:
    text = json.dumps(asdict(turns)).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)
