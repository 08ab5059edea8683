"""The site: machines that are prepared and train in virtual time, as a driver sees them over a connection that may break."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from orchestrator.life.sight import SiteView
from orchestrator.life.world import Contact, Job, TrainerView
from runs import events as e
from runs.record import NodeRecord, RunRecord

from .cloud import FOREVER, Cloud, Machine
from .plan import Plan

Change = tuple[str, e.RunEvent | e.NodeEvent]
BYTES = 1000


@dataclass
class Process:
    """A supervised trainer on a machine."""

    token: str
    begin: float
    from_step: int
    deadline: float
    fails: tuple[float, str] = (FOREVER, "")
    stop: tuple[float, bool] | None = None
    """When it ends because it was asked to, and whether with a checkpoint."""
    killed: float = FOREVER
    end: tuple[float, str, int] | None = None
    """When, why and at which step it ended, once it has."""


@dataclass
class Box:
    """The disk and the processes of one machine; they outlive every driver."""

    machine: Machine
    prepared: bool = False
    checkpoints: dict[int, str] = field(default_factory=dict)
    announced: dict[int, str] = field(default_factory=dict)
    """Those that were let go, which the metrics still tell of."""
    process: Process | None = None

    def boots(self, t: float) -> int:
        return int("reboot" in self.machine.faults and t >= self.machine.faults["reboot"][0])

    def reachable(self, t: float, plan: Plan) -> bool:
        """A login works now."""
        machine = self.machine
        if t < machine.active + plan.ssh_seconds or t >= machine.death[0]:
            return False
        away = [(machine.faults["cut"])] if "cut" in machine.faults else []
        if "reboot" in machine.faults:
            away.append((machine.faults["reboot"][0], 45.0))
        return not any(start <= t < start + seconds for start, seconds in away)

    def advance(self, t: float, plan: Plan) -> None:
        """Let the trainer run until `t`."""
        process = self.process
        if process is None or process.end is not None:
            return
        if (
            "supervisor-dies" in self.machine.faults
            and self.machine.faults["supervisor-dies"][0] > process.begin
        ):
            process.killed = min(process.killed, self.machine.faults["supervisor-dies"][0])
        if "reboot" in self.machine.faults and self.machine.faults["reboot"][0] > process.begin:
            process.killed = min(process.killed, self.machine.faults["reboot"][0])
        horizon = min(t, process.killed, self.machine.death[0])
        finish = process.begin + (plan.steps - process.from_step) * plan.step_seconds
        ends = [(finish, "finished"), (process.deadline, "deadline"), process.fails]
        if process.stop is not None:
            ends.append((process.stop[0], "stopped"))
        at, reason = min(ends)
        last = self.step(min(horizon, at), plan)
        first = (process.from_step // plan.every + 1) * plan.every
        for step in range(first, last + 1, plan.every):
            self.checkpoints.setdefault(step, f"{self.machine.id}-{step}")
        self.let_go(plan)
        if at > horizon:
            return
        graceful = reason in {"finished", "deadline"} or (
            reason == "stopped" and process.stop and process.stop[1]
        )
        if graceful and last > 0:
            self.checkpoints.setdefault(last, f"{self.machine.id}-{last}")
            self.let_go(plan)
        process.end = (at, reason, last)

    def let_go(self, plan: Plan) -> None:
        """Retention: the newest stay."""
        for step in sorted(self.checkpoints)[: -plan.keep]:
            self.announced[step] = self.checkpoints.pop(step)

    def step(self, t: float, plan: Plan) -> int:
        """The step at `t`."""
        process = self.process
        assert process is not None
        done = math.floor(max(0.0, t - process.begin) / plan.step_seconds + 1e-9)
        return min(plan.steps, process.from_step + done)

    def next_time(self, t: float, plan: Plan) -> float:
        """When something is to be heard next."""
        process = self.process
        if process is None or process.end is not None or t >= process.killed:
            return FOREVER
        step = (self.step(t, plan) // plan.every + 1) * plan.every
        times = [process.begin + (min(step, plan.steps) - process.from_step) * plan.step_seconds,
                 process.deadline, process.fails[0], process.stop[0] if process.stop else FOREVER]  # fmt: skip
        return min((time for time in times if time > t), default=FOREVER)


@dataclass
class Running:
    """A job of this driver."""

    end: float
    job: Job
    steps: tuple[int, ...] = ()


class Nodes:
    """The Site of one driver. `here` is the disk on this side: step → sha256, written before it is told."""

    def __init__(
        self,
        plan: Plan,
        cloud: Cloud,
        boxes: dict[str, Box],
        here: dict[int, str],
        *,
        time: Callable[[float], float],
        date: Callable[[float], datetime],
        passage: Callable[[str], None],
        fault: Callable[[str], str | None],
    ) -> None:
        self.plan, self.cloud, self.boxes, self.here = plan, cloud, boxes, here
        self._time, self._date, self._passage, self._fault = time, date, passage, fault
        self._jobs: dict[str, Running] = {}
        self._contacts: dict[str, Contact] = {}
        self._pulls: dict[int, float] = {}
        self._asked = -1.0
        self._told = 0.0
        self._news: list[Change] = []

    def box(self, node: NodeRecord) -> Box | None:
        if node.id is None or not node.alive or node.status not in {"active", "unhealthy"}:
            return None
        machine = self.cloud.machines[node.id]
        return self.boxes.setdefault(node.id, Box(machine))

    # ------------------------------------------------------------ Site

    def observe(self, run: RunRecord) -> SiteView:
        self._passage("observe<")
        t = self._time(0.05)
        changes: list[Change] = []
        trainer: TrainerView | None = None
        for index, node in enumerate(run.attempt_nodes()):
            box = self.box(node)
            if box is None:
                self._contacts.pop(node.key, None)
                continue
            box.advance(t, self.plan)
            reachable = box.reachable(t, self.plan)
            self._contact(node.key, reachable, "host-key" in box.machine.faults and reachable)
            if reachable and "host-key" not in box.machine.faults:
                changes += self._ready(node, box, t)
                if index == 0:
                    trainer = self._trainer(run, box, t)
                    changes += self._training(run, box, t)
        changes += self._work(run, t)
        changes += self._arrived(run)
        changes += self._news
        self._news = []
        jobs = {name: running.job for name, running in self._jobs.items()}
        self._passage("observe>")
        return SiteView(dict(self._contacts), trainer, jobs, changes)

    def prepare(self, run: RunRecord, key: str) -> None:
        self._passage("prepare<")
        self._begin(f"{key}/prepare", self.plan.prepare_seconds)
        self._passage("prepare>")

    def start(self, run: RunRecord, token: str, deadline: datetime | None) -> None:
        self._passage("start<")
        t = self._time(0.2)
        self._asked = t
        until = FOREVER if deadline is None else t + (deadline - self._date(0.0)).total_seconds()
        for node in run.attempt_nodes():
            box = self.box(node)
            if box is None or not box.reachable(t, self.plan):
                continue
            box.advance(t, self.plan)
            old = box.process
            if old is not None and old.token == token and (old.end or t < old.killed):
                old.deadline = until if old.end is None else old.deadline
                continue
            have = [step for step in box.checkpoints if step <= self.plan.steps]
            from_step = max([run.resume_step, *have])
            box.process = Process(token, t + 3.0, from_step, until, self._trouble(box, t))
        self._passage("start>")

    def _trouble(self, box: Box, t: float) -> tuple[float, str]:
        for fault in ("trainer-failed", "trainer-interrupted"):
            if fault in box.machine.faults:
                return t + 3.0 + box.machine.faults[fault][1] / 10, fault.removeprefix("trainer-")
        return FOREVER, ""

    def stop(self, run: RunRecord, *, checkpoint: bool) -> None:
        self._passage("stop<")
        t = self._time(0.2)
        self._asked = t
        for node in run.attempt_nodes():
            box = self.box(node)
            if box is None or not box.reachable(t, self.plan) or box.process is None:
                continue
            box.advance(t, self.plan)
            if box.process.stop is None or not checkpoint:
                box.process.stop = (t + (6.0 if checkpoint else 1.0), checkpoint)
        self._passage("stop>")

    def collect(self, run: RunRecord, steps: Sequence[int], *, weights_only: bool) -> None:
        self._passage("collect<")
        self._begin("collect", self.plan.collect_seconds, tuple(steps))
        self._passage("collect>")

    def committed(self, events: Sequence[Change]) -> None:
        self._passage("committed<")

    def next_time(self, run: RunRecord, t: float) -> float:
        """When `observe` will have something new to say."""
        times = [running.end for running in self._jobs.values() if running.job.state == "running"]
        times += self._pulls.values()
        for node in run.attempt_nodes():
            box = self.box(node)
            if box is not None:
                times += [box.machine.active + self.plan.ssh_seconds, box.next_time(t, self.plan)]
                times += [
                    a + b for name in ("cut", "reboot") for a, b in [box.machine.faults.get(name, (0.0, 0.0))]
                ]
        return min((time for time in times if time > t), default=FOREVER)

    # ------------------------------------------------------------ what is heard

    def _contact(self, key: str, reachable: bool, mismatch: bool) -> None:
        old = self._contacts.get(key)
        if old is None or old.reachable != reachable:
            self._contacts[key] = Contact(reachable, self._date(0.0), mismatch)

    def _ready(self, node: NodeRecord, box: Box, t: float) -> Iterator[Change]:
        boot_id = f"boot-{box.boots(t)}"
        if node.ready_at is None or node.boot_id != boot_id:
            yield e.node_stream(node.key), e.NodeReady(at=self._date(0.0), boot_id=boot_id)

    def _trainer(self, run: RunRecord, box: Box, t: float) -> TrainerView | None:
        """The supervisor's word; nothing that was seen before it was last told something."""
        if t < self._asked + 0.5:
            return None
        now, process = self._date(0.0), box.process
        token = run.attempt.token if run.attempt else None
        if process is None or process.token != token:
            return TrainerView("absent", None, now)
        deadline = self._date(process.deadline - t) if process.deadline < FOREVER else None
        if process.end is not None:
            return TrainerView("ended", token, now, deadline=deadline)
        if t >= process.killed:
            return TrainerView("dead", token, now, deadline=deadline)
        if process.stop is not None:
            return TrainerView("stopping", token, now, process.stop[1], deadline)
        return TrainerView("starting" if t < process.begin else "running", token, now, deadline=deadline)

    def _training(self, run: RunRecord, box: Box, t: float) -> Iterator[Change]:
        attempt, process, stream = run.attempt, box.process, e.run_stream(run.run)
        now = self._date(0.0)
        if attempt is None:
            return
        for step, sha in sorted((box.announced | box.checkpoints).items()):
            known = run.checkpoints.get(step)
            if known is None or known.announced != sha:
                yield stream, e.CheckpointSeen(at=now, step=step, sha256=sha, bytes=BYTES)
            elif (
                not known.fetched
                and not known.gone
                and step not in self._pulls
                and attempt.trainer_end is None
            ):
                slow = 60.0 if self._fault("pull") else 0.0
                self._pulls[step] = t + self.plan.pull_seconds + slow
        if process is None or process.token != attempt.token:
            return
        ended = process.end is not None and attempt.trainer_end is None
        if ended or t - self._told >= 20.0:
            self._told = t
            yield from self._progress(run, box, process, t)
        if ended:
            assert process.end is not None
            yield (
                stream,
                e.TrainerEnded(at=now, attempt=attempt.number, reason=process.end[1], step=process.end[2]),
            )

    def _progress(self, run: RunRecord, box: Box, process: Process, t: float) -> Iterator[Change]:
        step = box.step(min(t, process.end[0] if process.end else t, process.killed), self.plan)
        until = process.begin + (step - process.from_step) * self.plan.step_seconds
        zero = self._date(-t).timestamp()
        start = max(process.begin + zero, run.intervals[-1][2] if run.intervals else 0.0)
        if until + zero > start + 0.01:
            phase = "redone" if step <= int(run.summary.get("step", 0)) else "training"
            event = e.ProgressSeen(
                at=self._date(0.0), summary={"step": step}, intervals=((phase, start, until + zero),)
            )
            yield e.run_stream(run.run), event

    # ------------------------------------------------------------ jobs

    def _begin(self, name: str, seconds: float, steps: tuple[int, ...] = ()) -> None:
        t, old = self._time(0.05), self._jobs.get(name)
        failures = old.job.failures if old else 0
        self._jobs[name] = Running(t + seconds, Job("running", self._date(0.0), failures), steps)

    def _work(self, run: RunRecord, t: float) -> Iterator[Change]:
        for name, running in self._jobs.items():
            if running.job.state != "running" or t < running.end:
                continue
            key, _, word = name.rpartition("/")
            keys = [node.key for node in run.attempt_nodes()]
            node = run.node(key or keys[0]) if keys else None
            box = self.box(node) if node is not None else None
            fault = self._fault(word)
            if box is None or not box.reachable(t, self.plan) or fault:
                running.job = Job("failed", self._date(0.0), running.job.failures + 1, "it failed")
                if box is not None and run.attempt is not None:
                    failed = e.JobFailed(at=self._date(0.0), job=word, reason="it failed", key=key or None,
                                         fatal=fault == "fatal")  # fmt: skip
                    yield e.run_stream(run.run), failed
                continue
            running.job = Job("done", self._date(0.0))
            if word == "collect":
                for step in running.steps:
                    yield from self._pull(run, box, step)
            elif "preflight" in box.machine.faults:
                yield e.node_stream(key), e.PreflightFailed(at=self._date(0.0), reason="a GPU is missing")
            else:
                box.prepared = True
                for lane in ("ready", "data"):
                    yield e.run_stream(run.run), e.LaneDone(at=self._date(0.0), key=key, lane=lane, hash="h")
        yield from self._pulled(run, t)

    def _pulled(self, run: RunRecord, t: float) -> Iterator[Change]:
        first = next(run.attempt_nodes(), None)
        box = self.box(first) if first is not None else None
        for step, due in list(self._pulls.items()):
            if t < due:
                continue
            if box is None:
                del self._pulls[step]
            elif box.reachable(t, self.plan):
                del self._pulls[step]
                yield from self._pull(run, box, step)
            else:
                self._pulls[step] = t + 10.0

    def _pull(self, run: RunRecord, box: Box, step: int) -> Iterator[Change]:
        """Bring one home, or learn that the node has let it go."""
        known = run.checkpoints.get(step)
        if step in box.checkpoints:
            self.here[step] = box.checkpoints[step]
        elif known is not None and box.announced.get(step) == known.sha256:
            gone = e.CheckpointGone(at=self._date(0.0), step=step, sha256=known.sha256)
            yield e.run_stream(run.run), gone

    def _arrived(self, run: RunRecord) -> Iterator[Change]:
        for step, sha in self.here.items():
            known = run.checkpoints.get(step)
            if known is not None and not known.fetched and known.sha256 == sha:
                verified = e.CheckpointVerified(
                    at=self._date(0.0), step=step, path=f"step-{step}", sha256=sha, bytes=BYTES
                )
                yield e.run_stream(run.run), verified
