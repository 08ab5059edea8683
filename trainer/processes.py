"""Which processes belong to a run, whether they are still the same ones, and how to end them.

torchrun gives each worker a session of its own, so killing torchrun's process group leaves the workers alive, and
once torchrun is dead nothing ties them to it. What every descendant does carry is its environment: the supervisor
marks the trainer with `LLMCTL_RUN_DIR`, and a run's processes are all those with that mark. Standard library only;
Linux reads /proc, elsewhere (a laptop as its own node) `ps` answers.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

MARK = "LLMCTL_RUN_DIR"
_PROC = Path("/proc")


def boot_id() -> str:
    """What stays the same until this machine reboots."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        answer = _output(["sysctl", "-n", "kern.boottime"])
        found = re.search(r"sec = (\d+)", answer)
        return found[1] if found else "unknown"


def start_time(pid: int) -> str | None:
    """When the process started, in the system's own words: with the pid and the boot id it names one process for
    ever. None where there is no such process, or where it has ended and only waits for its parent."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        if _PROC.joinpath("self").exists():
            return None
        return _output(["ps", "-o", "lstart=", "-p", str(pid)]).strip() or None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if fields[0] in "ZX" else fields[19]


def same(pid: object, started: object) -> bool:
    """Whether process `pid` lives and is the one that started at `started`."""
    return isinstance(pid, int) and pid > 0 and started is not None and start_time(pid) == started


def marked(run: Path) -> list[int]:
    """The living processes that carry the mark of the run directory `run`."""
    mark = f"{MARK}={run.resolve()}"
    if not _PROC.joinpath("self").exists():
        return parse_ps(_output(["ps", "-axwwE", "-o", "pid=,command="]), mark)
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # someone else's, or gone
        if os.fsencode(mark) in environment.split(b"\0") and start_time(int(entry.name)) is not None:
            found.append(int(entry.name))
    return sorted(found)


def parse_ps(listing: str, mark: str) -> list[int]:
    """The pids whose line of `ps -E -o pid=,command=` holds `mark` as a word."""
    found = []
    for line in listing.splitlines():
        pid, _, words = line.strip().partition(" ")
        if pid.isdigit() and int(pid) != os.getpid() and f" {mark} " in f" {words} ":
            found.append(int(pid))
    return sorted(found)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal; one without would die of it. False where nobody can tell."""
    try:
        status = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(found and int(found[1], 16) >> (number - 1) & 1)


def send(pids: list[int], number: signal.Signals) -> None:
    """Signal each of them; those that are gone are no error."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise


def end(run: Path, *, seconds: float = 30, beat: Callable[[], None] = lambda: None) -> list[int]:
    """Kill every marked process of `run` and wait until none is left; `beat` is called while waiting. Returns those
    that did not die within `seconds`: a process that waits for a dead device cannot be killed."""
    until = time.monotonic() + seconds
    while left := marked(run):
        send(left, signal.SIGKILL)
        if time.monotonic() >= until:
            break
        beat()
        time.sleep(0.05)
    return left


def _output(argv: list[str]) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
