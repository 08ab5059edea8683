"""The supervisor's loop: one trainer alive, heartbeats, restarts, and an end when there must be one. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import clock as steady
from trainer import processes
from trainer.interruption import Interruption
from trainer.utilisation import Utilisation
from trainer.watchdog import (
    REFUSALS,
    SCRATCH,
    Clock,
    Deadline,
    Job,
    JobError,
    Progress,
    describe,
    exit_code,
    read_json,
    write_json,
)

TICK_SECONDS = 0.1
BEAT_SECONDS = 0.75
TERM_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
INTERRUPTION_SECONDS = 100.0
"""What a spot notice's two minutes leave for the last checkpoint."""
STACK_SECONDS = 5.0
STACK_BYTES = 1024 * 1024
FULL_DISK_BYTES = 16 * 1024 * 1024
RESERVE, RESERVE_BYTES = ".reserve", 64 * 1024
"""A file that is given up for the last supervisor.json, so that a full disk cannot keep it from being written."""
FINAL_WRITES = 600
"""Seconds for which the last supervisor.json is tried again on a full disk."""


@dataclass
class Ending:
    """Why and by when the trainer is being ended; `term_at` is a time of the boot clock."""

    reason: str
    detail: str | None
    term_at: float
    termed: bool = False

    def because(self, more: str | None) -> str | None:
        """The detail with one more clause."""
        return "; ".join(part for part in (self.detail, more) if part) or None


class Supervisor:
    """One token's life on this node. The caller holds both locks; `lock` is the one that the trainer inherits."""

    def __init__(self, run: Path, job: Job, lock: int, clock: Clock | None = None) -> None:
        self.run, self.job, self.clock = run, job, clock or Clock()
        self._lock = lock
        self._child: subprocess.Popen[bytes] | None = None
        self._ending: Ending | None = None
        self._launch_at = self._launched_at = 0.0
        self._log_offset = 0
        self._old_status: dict[str, Any] = {}
        self._beat_at = 0.0
        self._deadline_seen: tuple[int, ...] | None = None
        self._trouble: str | None = None
        self._secrets: dict[str, str] | None = None
        self._told_to_end = False
        self._alone_since: float | None = None
        """Since when torchrun has not brought a trainer to life here, because other nodes are missing."""
        self._deadline = Deadline(self.clock, job.deadline)
        self._progress = Progress(self.clock.boot(), {})
        self._interruption = Interruption() if job.watch_interruption else None
        self._utilisation = Utilisation(job.env.get("CUDA_VISIBLE_DEVICES"))
        earlier = read_json(run / "supervisor.json")
        self._offset = fixed_offset(earlier, self.clock)
        if earlier.get("token") != job.token:
            earlier = {}
            for name in ("stop-request.json", "deadline"):  # they were made to another start
                (run / name).unlink(missing_ok=True)
        self.record: dict[str, Any] = {
            "token": job.token, "state": "starting", "pid": os.getpid(), "start_time": processes.start_time(os.getpid()),
            "boot_id": processes.boot_id(), "pgid": None, "heartbeat": 0.0, "started_at": self._now(), "clock_offset_seconds": self._offset,
            "starts": int(earlier.get("starts", 0)), "restarts": int(earlier.get("restarts", 0)),
            "crashes": int(earlier.get("crashes", 0)), "max_restarts": job.max_restarts,
            "reason": None, "detail": None, "exit_code": None, "step": None, "deadline": job.deadline,
            "clock_jump_seconds": 0.0, "ended_at": None, "stacks": earlier.get("stacks"), "gpu": {},
        }  # fmt: skip

    def _now(self) -> float:
        """POSIX seconds that never jump (`trainer.clock`)."""
        return self._offset + self.clock.boot()

    def supervise(self) -> int:
        """Run until the run has ended. Returns the exit code of `start`."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if self._interruption is not None:
            self._interruption.start()
        self._utilisation.start()
        with contextlib.suppress(OSError):
            (self.run / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))
        while self.record["state"] != "ended":
            self.tick()
            if self._told_to_end:
                processes.end(self.run, beat=self._beat)
                say(f"told to end; a start with token {self.job.token} resumes")
                return 0
            self.clock.sleep(TICK_SECONDS)
        self._utilisation.close()
        if self._interruption is not None:
            self._interruption.close()
        return 1 if self.record["reason"] == "failed" else 0

    def tick(self) -> None:
        """Look once at everything, and do the one thing that is due."""
        now = self.clock.boot()
        taken = self.job.take_secrets(self.run)
        self._secrets = self._secrets if taken is None else taken
        self._read_requests(now)
        if self._child is None:
            if self._ending is not None:
                self._finish(self._ending.reason, self._ending.detail)
            elif now >= self._launch_at:
                self._launch(now)
        elif (returned := self._child.poll()) is not None:
            self._exited(returned)
        elif self._ending is not None:
            self._enforce(now, self._ending)
        else:
            self._check_stall(now)
        self._beat()

    def _told(self, *_: object) -> None:
        self._told_to_end = True

    def _launch(self, now: float) -> None:
        """Start torchrun in a session of its own, with the lock and the mark."""
        again = self.record["starts"] > 0 or os.path.lexists(self.run / "checkpoints" / "latest")
        argv = [*self.job.argv, "--resume"] if again and "--resume" not in self.job.argv else self.job.argv
        try:
            (self.run / "stop").unlink(missing_ok=True)
            shutil.rmtree(self.run / SCRATCH, ignore_errors=True)
            self._old_status = self._status()
            environment = self.job.environment(self.run, processes.MARK, self._secrets)
            environment[steady.OFFSET] = repr(self._offset)
            with (self.run / "train.log").open("ab") as log:
                self._log_offset = log.tell()
                self._child = subprocess.Popen(argv, cwd=self.run, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                               stderr=log, pass_fds=(self._lock,), start_new_session=True)  # fmt: skip
        except (OSError, JobError) as error:
            self._finish("failed", f"cannot start {argv[0]}: {error}", 127)
            return
        # When memory runs out it is the trainer that goes, not its supervisor.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._child.pid}/oom_score_adj").write_text("500", encoding="ascii")
        self._launched_at = now
        self._progress = Progress(now, self._old_status)
        self.record.update(state="running", pgid=self._child.pid, restarts=self.record["starts"],
                           starts=self.record["starts"] + 1)  # fmt: skip
        self._save(sync=True)
        say(f"trainer started, pid {self._child.pid}" + (", resuming" if again else ""))

    def _exited(self, returned: int) -> None:
        """torchrun has ended: with the work done, on request, or by accident."""
        self._child = None
        status = self._status()
        news = {} if status == self._old_status else status
        code = exit_code(returned, self.run / "train.log", self._log_offset, news)
        if left := processes.end(self.run, beat=self._beat):
            self._finish("failed", undead(left), code)
        elif code == 0 and status.get("state") == "finished":
            self._finish("finished", None, 0)
        elif self._ending is not None:
            failed = f"the trainer ended with {describe(code)}" if code else None
            self._finish(self._ending.reason, self._ending.because(failed), code)
        elif code == 0 and status.get("state") == "stopped":
            self._finish("stopped", "the trainer stopped by itself", 0)
        elif code in REFUSALS:
            self._finish("failed", news.get("message") or REFUSALS[code], code)
        elif self.job.nodes > 1 and not news:
            self._gather_again()
        else:
            self._restart(describe(code) if code else "exit code 0 before the last step", code)

    def _gather_again(self) -> None:
        """torchrun ended before a trainer lived, as it does when another node is dead or out of reach. That is no crash of
        this node's trainer: it is tried again for a while, and then left to the driver, which can replace nodes."""
        now = self.clock.boot()
        since = self._alone_since = self._alone_since if self._alone_since is not None else self._launched_at
        if now - since >= self.job.gather_seconds:
            self._finish(
                "lost", f"the {self.job.nodes} nodes did not find each other for {now - since:.0f} s", 1
            )
            return
        self.record.update(state="restarting", pgid=None)
        self._launch_at = now + self.job.restart_pause_seconds
        self._note(
            f"the other nodes did not come; waiting for them for {self.job.gather_seconds - (now - since):.0f} s more"
        )
        self._save(sync=True)

    def _restart(self, cause: str, code: int | None) -> None:
        """Another start after a pause, unless they are spent."""
        if (free := shutil.disk_usage(self.run).free) < FULL_DISK_BYTES:
            cause += f"; the disk is full ({free} bytes free)"
        self.record.update(detail=cause, exit_code=code, pgid=None)
        if self.record["crashes"] >= self.job.max_restarts:
            self._finish("failed", f"{cause}; all {self.job.max_restarts} restarts are spent", code)
            return
        self.record.update(state="restarting", crashes=self.record["crashes"] + 1)
        pause = self.job.restart_pause_seconds * min(self.record["crashes"], 10)
        self._launch_at = self.clock.boot() + pause
        self._note(f"{cause}; restart {self.record['crashes']} of {self.job.max_restarts} in {pause:g} s")
        self._save(sync=True)

    def _finish(self, reason: str, detail: str | None, code: int | None = None) -> None:
        """The run has ended on this node, for good under this token."""
        self.record.update(state="ended", reason=reason, detail=detail, pgid=None, ended_at=self._now(),
                           exit_code=self.record["exit_code"] if code is None else code)  # fmt: skip
        with contextlib.suppress(OSError):
            (self.run / RESERVE).unlink()
        self._note(f"ended: {reason}" + (f" ({detail})" if detail else ""))
        shutil.rmtree(self.run / SCRATCH, ignore_errors=True)
        for _ in range(FINAL_WRITES):  # a full disk may be cleared
            if self._save(sync=True) or self._told_to_end:
                return
            self.clock.sleep(1)

    def _read_requests(self, now: float) -> None:
        """Deadline, stop requests and interruption notice. The first one names the reason; a later one may only hasten."""
        self._read_deadline()
        request = read_json(self.run / "stop-request.json")
        if request.get("checkpoint") is False:
            if self._ending is None or not self._ending.termed:
                self._stop_trainer("stopped", "without a checkpoint, as asked", now - TERM_SECONDS)
        elif request and self._ending is None:
            self._stop_trainer("stopped", None, now + self.job.stop_grace_seconds)
        if self._ending is None and self._interruption is not None and self._interruption.notice is not None:
            self._stop_trainer("interrupted", self._interruption.notice, now + INTERRUPTION_SECONDS)
        left = self._deadline.remaining()
        if self._ending is None and left <= self.job.grace_seconds:
            self._stop_trainer("deadline", None, now + max(left, 0))
        elif self._ending is not None:
            self._ending.term_at = min(self._ending.term_at, now + max(left, 0))

    def _read_deadline(self) -> None:
        """The file `deadline` replaces the job's. An end that has begun is not taken back: the next start carries on."""
        path = self.run / "deadline"
        try:
            info = path.stat()
            if (seen := (info.st_mtime_ns, info.st_ino, info.st_size)) == self._deadline_seen:
                return
            self._deadline_seen = seen
            self._deadline.arm(float(path.read_text(encoding="ascii")))
            say(f"the deadline is {self._deadline.at}")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            say(f"deadline: {error}; the old one holds")

    def _stop_trainer(self, reason: str, detail: str | None, term_at: float) -> None:
        """Ask the trainer to checkpoint and stop; from `term_at` on it is ended."""
        self._ending = Ending(reason, detail, term_at)
        self.record["state"] = "stopping"
        say(f"stopping: {reason}")
        try:
            (self.run / "stop").touch()
        except OSError as error:
            say(f"cannot ask the trainer to stop ({error}): ending it")
            self._ending.term_at = min(term_at, self.clock.boot())

    def _enforce(self, now: float, ending: Ending) -> None:
        """The trainer was asked; when it does not listen it is told, and then ended."""
        if now >= ending.term_at + TERM_SECONDS:
            ending.termed = True
            if left := processes.end(self.run, beat=self._beat):
                self._finish(ending.reason, ending.because(undead(left)))
        elif now >= ending.term_at and not ending.termed:
            ending.termed = True
            ending.detail = ending.because("the trainer did not stop in time")
            processes.send(processes.marked(self.run), signal.SIGTERM)

    def _check_stall(self, now: float) -> None:
        """No step for many medians: dump the stacks of all threads, then restart."""
        self._progress.observe(now, self._status())
        if self._progress.stepped:
            self._alone_since = None
        idle, limit = now - self._progress.since, self._progress.limit(self.job)
        if idle <= limit:
            return
        cause = f"no progress for {idle:.0f} s (limit {limit:.0f} s)"
        self._note(f"{cause}; dumping stacks")
        self._dump_stacks()
        left = processes.end(self.run, beat=self._beat)
        if left:
            self._finish("failed", f"{cause}; {undead(left)}")
            return
        if self._child is not None:
            self._child.wait()
        self._child = None
        self._restart(cause, None)

    def _dump_stacks(self) -> None:
        """SIGUSR1 to every process that handles it (faulthandler writes stacks to train.log); keep a copy of what came."""
        log, kept = self.run / "train.log", self.run / "stacks.txt"
        asked = [pid for pid in processes.marked(self.run) if processes.catches(pid, signal.SIGUSR1)]
        try:
            start = before = log.stat().st_size
            processes.send(asked, signal.SIGUSR1)
            until = self.clock.boot() + STACK_SECONDS
            while asked and self.clock.boot() < until:
                self._beat()
                self.clock.sleep(0.3)
                size = log.stat().st_size
                if size == before > start:  # it has come, and no more follows
                    break
                before = size
            with log.open("rb") as file:
                file.seek(start)
                kept.write_bytes(file.read(STACK_BYTES))
            self.record["stacks"] = kept.name
        except OSError as error:
            say(f"cannot keep the stacks: {error}")

    def _status(self) -> dict[str, Any]:
        return read_json(self.run / "status.json")

    def _beat(self) -> None:
        """Heartbeat and figures, at least every second."""
        now = self.clock.boot()
        if now >= self._beat_at and self.record["state"] != "ended":
            self._beat_at = now + BEAT_SECONDS
            self._save()

    def _save(self, *, sync: bool = False) -> bool:
        """Write supervisor.json. A full disk is said once, and tried again at the next beat."""
        self.record.update(heartbeat=self._now(), step=self._status().get("step"), deadline=self._deadline.at,
                           gpu=self._utilisation.figures, clock_jump_seconds=round(self._deadline.jump(), 1))  # fmt: skip
        try:
            write_json(self.run / "supervisor.json", self.record, sync=sync)
        except OSError as error:
            if self._trouble != error.strerror:
                self._trouble = error.strerror
                say(f"cannot write supervisor.json: {error}; trying on")
            return False
        self._trouble = None
        return True

    def _note(self, text: str) -> None:
        """A line in train.log, where whoever follows the run will see it, and one in the supervisor's own log."""
        say(text)
        with contextlib.suppress(OSError), (self.run / "train.log").open("ab") as log:
            log.write(f"[supervisor] {text}\n".encode())


def fixed_offset(earlier: dict[str, Any], clock: Clock) -> float:
    """The offset of this boot's clock: as an earlier supervisor fixed it, else by the wall clock of now."""
    kept = earlier.get("clock_offset_seconds")
    if isinstance(kept, float) and earlier.get("boot_id") == processes.boot_id():
        return kept
    return clock.wall() - clock.boot()


def undead(pids: list[int]) -> str:
    """The clause that says which processes cannot be killed."""
    return f"processes {', '.join(map(str, pids))} do not die; this node needs a reboot or a replacement"


def say(text: str) -> None:
    """A line with the time on stderr (supervisor.log); a full disk or a closed pipe is no reason to die."""
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n".encode())
