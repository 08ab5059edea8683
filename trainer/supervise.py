"""`python -m trainer supervise`: keeps one run's trainer alive on its node, and ends it when it must end.

    start   (default) supervise in the foreground until the run has ended; the driver starts it with setsid, so that it
            survives every connection. Idempotent by the token of job.json. Exits 0 when ended or already there, 1 when
            the run failed, 3 when job.json cannot be used, 9 while another token's supervisor lives.
    status  one JSON document: what the driver polls.
    stop    ask for an end: with a checkpoint, or with --now without.
    kill    end every process of this run directory, the supervisor first.

Works in the run directory (`--run`, default: here). There are two locks. `supervisor.lock` is held by the living
supervisor alone; `lock` is inherited by torchrun too, so a torchrun whose supervisor was killed still keeps a second one
out. A new supervisor ends such an orphan and resumes from the last whole checkpoint: a few steps are made
again, and there is one way to carry on. The same holds after a reboot. SIGTERM ends the supervisor and the trainer
without ending the run: the next start with the same token resumes. `restarts` counts every start of the trainer under a token after the
first. Only those after a crash or a stall (`crashes`) are held against `max_restarts`; steps made in between do not
set the count back. Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from trainer import processes
from trainer.supervisor import Supervisor, say
from trainer.watchdog import Job, JobError, read_json, write_json


def take_lock(path: Path, *, seconds: float = 0) -> int | None:
    """An flock on `path`, or None when someone holds it for longer than `seconds`. Not inherited unless passed on."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                return None
            time.sleep(0.05)


def start(run: Path) -> int:
    """Supervise the run of this directory until it has ended. Returns the exit code; see the module."""
    try:
        job = Job.load(run / "job.json")
    except JobError as error:
        say(str(error))
        return 3
    guard = take_lock(run / "supervisor.lock")
    if guard is None:
        return _already(run, job)
    os.ftruncate(guard, 0)
    me = {"token": job.token, "pid": os.getpid(), "start_time": processes.start_time(os.getpid())}
    os.pwrite(guard, json.dumps(me).encode(), 0)
    earlier = read_json(run / "supervisor.json")
    if earlier.get("token") == job.token and earlier.get("state") == "ended":
        say(f"token {job.token} has ended already: {earlier.get('reason')}")
        return 0
    if orphans := processes.marked(run):
        say(f"ending {len(orphans)} processes whose supervisor is gone")
    processes.end(run)
    lock = take_lock(run / "lock", seconds=10)
    if lock is None:
        say(
            f"{run / 'lock'} is still held after the run's processes were ended; find the holder with: fuser lock"
        )
        return 9
    return Supervisor(run, job, lock).supervise()


def _already(run: Path, job: Job) -> int:
    """Another supervisor holds the guard: is it this token's?"""
    holder: dict[str, Any] = {}
    for _ in range(50):
        holder = read_json(run / "supervisor.lock")
        if processes.same(holder.get("pid"), holder.get("start_time")):
            break
        time.sleep(0.1)  # it has the lock and is about to write its name
    if holder.get("token") == job.token:
        say(f"token {job.token} is supervised already, by pid {holder['pid']}")
        return 0
    say(f"another supervisor lives here: token {holder.get('token')}, pid {holder.get('pid')}; stop it first")
    return 9


def status(run: Path) -> dict[str, Any]:
    """What the driver polls: both status files, whether the supervisor lives, and how far the files have grown."""
    record = read_json(run / "supervisor.json")
    boot = processes.boot_id()
    checkpoints = run / "checkpoints"
    links = {name: _target(checkpoints / name) for name in ("latest", "best")}
    return {
        "supervisor": record or None,
        "status": read_json(run / "status.json") or None,
        "alive": record.get("boot_id") == boot
        and processes.same(record.get("pid"), record.get("start_time")),
        "boot_id": boot,
        "time": time.time(),
        "sizes": {name: _size(run / name) for name in ("train.log", "metrics.jsonl", "supervisor.log")},
        "disk_free_bytes": shutil.disk_usage(run).free,
        "checkpoints": {
            "steps": sorted(path.name for path in checkpoints.glob("step-*") if path.is_dir()),
            **links,
        },
    }


def stop(run: Path, *, checkpoint: bool) -> None:
    """Ask the living supervisor for an end; a later request without a checkpoint overrides one with."""
    write_json(run / "stop-request.json", {"checkpoint": checkpoint}, sync=True)


def kill(run: Path) -> int:
    """End the supervisor and every marked process. 0 when nothing is left, 1 when something does not die."""
    guard = take_lock(run / "supervisor.lock")
    if guard is None:
        holder = read_json(run / "supervisor.lock")
        if processes.same(holder.get("pid"), holder.get("start_time")):
            processes.send([holder["pid"]], signal.SIGKILL)
        guard = take_lock(run / "supervisor.lock", seconds=10)
    left = processes.end(run)
    record = read_json(run / "supervisor.json")
    if guard is not None and record and record.get("state") != "ended":
        record.update(state="ended", reason="stopped", detail="killed", pgid=None, ended_at=time.time())
        write_json(run / "supervisor.json", record, sync=True)
    if guard is None or left:
        say(f"these do not die: {', '.join(map(str, left)) or 'the supervisor'}")
        return 1
    return 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _target(link: Path) -> str | None:
    return str(link.readlink()) if link.is_symlink() else None


def main(argv: list[str]) -> int:
    """The command line: `[start|status|stop [--now]|kill] [--run DIR]`."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer supervise", description="Keep a run's trainer alive on its node."
    )
    parser.add_argument("command", nargs="?", default="start", choices=["start", "status", "stop", "kill"])
    parser.add_argument(
        "--run", type=Path, default=Path(), help="the run directory (default: the current one)"
    )
    parser.add_argument("--now", action="store_true", help="stop: without a checkpoint")
    options = parser.parse_args(argv)
    run = options.run.resolve()
    if not run.is_dir():
        say(f"{run}: no such directory")
        return 2
    if options.command == "start":
        return start(run)
    if options.command == "status":
        sys.stdout.write(json.dumps(status(run)) + "\n")
        return 0
    if options.command == "stop":
        stop(run, checkpoint=not options.now)
        return 0
    return kill(run)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
