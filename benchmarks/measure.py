"""Wall and processor seconds of commands, taken in turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Took:
    """Medians over the rounds, in seconds. On a busy machine wall time is mostly waiting for a core; processor time is not."""

    wall: float
    cpu: float
    best: float
    """The least wall time of a round."""


def once(argv: Sequence[str], env: Mapping[str, str]) -> tuple[float, float]:
    """Wall and processor (user and system) seconds of one command. Raises SystemExit where it fails."""
    started = time.monotonic()
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise SystemExit(
            f"{' '.join(argv)} ended with {process.returncode}: {said.decode(errors='replace')[-500:]}"
        )
    return wall, used.ru_utime + used.ru_stime


def in_turns(commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]], rounds: int) -> dict[str, Took]:
    """Each command once a round, so that whatever else the machine does hits all; a first round warms the files."""
    walls: dict[str, list[float]] = {name: [] for name in commands}
    cpus: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (argv, env) in commands.items():
            wall, cpu = once(argv, env)
            if number:
                walls[name].append(wall)
                cpus[name].append(cpu)
    return {
        name: Took(statistics.median(walls[name]), statistics.median(cpus[name]), min(walls[name]))
        for name in commands
    }


def load() -> str:
    """The machine's cores and how many processes want them: what absolute figures must be read beside."""
    one, five, _ = os.getloadavg()
    return f"{len(os.sched_getaffinity(0))} cores, load {one:.1f} (1 min) {five:.1f} (5 min)"
