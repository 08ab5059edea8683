"""The real Site: what happens on the nodes of one run, done in threads and seen as events.

`observe` compares what is known on the nodes and on disk with the record, and reports the difference: an event that was
lost with a driver is found again by the next one, because the difference is still there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock
from orchestrator.life.sight import SiteView
from orchestrator.life.world import Job, TrainerView
from orchestrator.remote import transfer
from orchestrator.remote.connection import Address, NodeUnreachable, RemoteError
from orchestrator.remote.mirror import Mirror
from orchestrator.remote.node import Remote
from orchestrator.site import collect, environment, findings, group, preflight, prepare, pushed, start
from orchestrator.site.journal import Journal
from orchestrator.site.reported import Reporting
from orchestrator.site.watch import Watch
from runs import events as e
from runs.record import CheckpointRecord, NodeRecord, RunRecord
from runs.store import run_dir

Change = tuple[str, e.RunEvent | e.NodeEvent]
PROGRESS_SECONDS = 2.0
_WORK_FAILS = (RemoteError, prepare.PrepareError, environment.EnvironmentFailed, collect.VerificationError,
               transfer.TransferError, OSError, TimeoutError)  # fmt: skip


def node_log(rank: int) -> str:
    """Where the log of a run's node beside the first is mirrored."""
    return f"train.n{rank}.log"


class NodeSite:
    """Site over SSH. Made by the driver of one run; nothing in it outlives the driver."""

    def __init__(
        self,
        home: Path,
        run: str,
        clock: Clock,
        wake: Callable[[], None],
        *,
        address: Callable[[NodeRecord], Address],
        plan: prepare.Plan,
    ) -> None:
        self.home, self.run, self.directory = home, run, run_dir(home, run)
        self._clock, self._wake, self._address, self._plan = clock, wake, address, plan
        self._watches: dict[str, Watch] = {}
        self._jobs: dict[str, Job] = {}
        self._lanes: dict[str, prepare.Lane] = {}
        self._news: list[Change] = []
        self._lock = threading.Lock()
        self._journal = Journal(self.directory / "metrics.raw.jsonl", self.directory / "metrics.jsonl")
        self._progress_at = 0.0
        self._group: group.Group | None = None
        self._odd_since: float | None = None
        """Since when some supervisors of the attempt have ended and others have not."""
        self._puller = collect.Puller(self.directory, clock, wake, self._gone)
        self._findings = findings.Keeper(home, clock)
        self._renewer = pushed.Renewer(plan.objects, clock, lambda reason: self._failed("push", reason))
        self._reporting = Reporting(clock, lambda reason: self._failed("wandb", reason))

    # ------------------------------------------------------------ Site

    def observe(self, run: RunRecord) -> SiteView:
        """Keep a watch on each node of the open attempt; report what is new."""
        self._attend(run)
        first = self._first(run)
        self._renewer.renew(run, first)
        self._reporting.look(run, first)
        changes = list(self._difference(run))
        with self._lock:
            changes += self._news
            self._news = []
            jobs = dict(self._jobs)
        contacts = {key: watch.seen.contact for key, watch in self._watches.items() if watch.seen.contact}
        return SiteView(contacts, self._trainer(run), jobs, changes)

    def _trainer(self, run: RunRecord) -> TrainerView | None:
        """What all supervisors of the attempt say together."""
        first, others = self._first(run), self._others(run)
        return group.view(first.seen.trainer if first else None, [other.seen.trainer for other in others])

    def prepare(self, run: RunRecord, key: str) -> None:
        """Begin the lanes of a node."""
        node, watch = run.node(key), self._watches.get(key)
        assert node is not None
        if watch is None:
            return

        together = self._gather(run)

        def done(name: str, lane: prepare.Lane) -> None:
            with self._lock:
                self._lanes[f"{key}/{name}"] = lane
            if together is not None:
                together.know([f"{key}/{name}"])
            self._wake()

        def work() -> None:
            found = findings.folder(self.home, run)
            prepare.prepare(watch.remote, run, node, self._plan, done, group=together, found=found)

        self._start_job(f"{key}/prepare", work, key)

    def _gather(self, run: RunRecord) -> group.Group | None:
        """The meeting place of the attempt's nodes; None where there is one node only."""
        attempt, first = run.attempt, self._first(run)
        if attempt is None or len(attempt.keys) == 1 or first is None:
            return None
        token = f"{run.run}-a{attempt.number}"
        if self._group is None or self._group.token != token:
            self._disperse()
            self._group = group.Group(token, run, first.remote)
        self._group.know(list(attempt.lanes))
        return self._group

    def _disperse(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def start(self, run: RunRecord, token: str, deadline: datetime | None) -> None:
        """Start the supervisors under `token`."""
        assert run.attempt is not None
        attempt, watches = (
            run.attempt,
            [self._watches[key] for key in run.attempt.keys if key in self._watches],
        )
        nodes = list(run.attempt_nodes())
        spot = any(node.offer.options.get("market") == "spot" for node in nodes)
        networks = [
            lane.detail if (lane := attempt.lanes.get(f"{key}/network")) else {} for key in attempt.keys
        ]
        addresses = [str(network.get("address", "")) for network in networks]

        def one(rank: int, watch: Watch) -> None:
            found = {**attempt.lanes[f"{attempt.keys[rank]}/environment"].detail, "spot": spot}
            how = start.Start(
                token,
                deadline,
                rank,
                found,
                cpus=int(nodes[rank].facts.get("cpus") or 1),
                addresses=addresses,
                interface=str(networks[rank].get("interface", "")),
            )
            start.start(watch.remote, run, self._plan.secrets, how)
            watch.asked()

        def work() -> None:
            with ThreadPoolExecutor(len(watches)) as pool:
                for done in [pool.submit(one, rank, watch) for rank, watch in enumerate(watches)]:
                    done.result()

        for watch in watches:
            watch.asked()
        self._start_job("start", work)

    def stop(self, run: RunRecord, *, checkpoint: bool) -> None:
        """Ask the supervisors to end."""
        watches = [watch for node in run.attempt_nodes() if (watch := self._watches.get(node.key))]

        def work() -> None:
            request = json.dumps({"checkpoint": checkpoint}).encode()
            for watch in watches:
                watch.remote.write(f"{watch.directory}/stop-request.json", request)
                watch.asked()

        for watch in watches:
            watch.asked()
        self._start_job("stop", work)

    def collect(self, run: RunRecord, steps: Sequence[int], *, weights_only: bool) -> None:
        """Begin to bring home checkpoints, the rest of log and metrics, and the evaluations."""
        watch = self._first(run)
        if watch is None:
            return
        mirrors = self._mirrors(run)
        everywhere = [watch.remote, *(other.remote for other in self._others(run))]
        unfinished = run.attempt is not None and run.attempt.trainer_end not in {"finished", "stopped"}

        def fetch() -> None:
            items = [item for step in steps if not (item := run.checkpoints[step]).gone]
            self._puller.fetch(watch.remote, watch.directory, items, weights_only)

        def work() -> None:
            if (
                len(everywhere) > 1 and unfinished
            ):  # the nodes did not end together: what is left on any of them ends now
                group.kill(everywhere, run.run)
            collect.bring(watch.remote, watch.directory, mirrors, self._clock, fetch)
            if self._plan.secrets:  # nothing trains there any more, and the node may be kept
                for remote in everywhere:
                    start.forget_secrets(remote, run)
            found = collect.evaluations(watch.remote, watch.directory, run, self._clock, self._plan.decode)
            with self._lock:
                self._news += found
            if self._plan.objects is not None and not pushed.settle(watch.remote, run, self._clock):
                self._failed("push", "the last checkpoint did not reach S3")
            self._reporting.bring(watch.remote, run, self.directory / "wandb")

        self._start_job("collect", work)

    def close(self) -> None:
        """Stop looking. Jobs on the nodes go on."""
        self._disperse()
        for watch in self._watches.values():
            self._leave(watch)
        self._puller.close()

    def _leave(self, watch: Watch) -> None:
        """Close the connections to a node, the one that carries files too."""
        watch.close()
        transfer.close(watch.remote)

    # ------------------------------------------------------------ watching

    def _attend(self, run: RunRecord) -> None:
        """A watch for each living node of the open attempt that has an address; none for the others."""
        nodes = {node.key: node for node in run.attempt_nodes() if node.alive and node.ip} if run.live else {}
        if run.attempt is None or (self._group and self._group.token != f"{run.run}-a{run.attempt.number}"):
            self._disperse()
        addresses = {key: self._address(node) for key, node in nodes.items()}
        for key, watch in list(self._watches.items()):
            if addresses.get(key) != watch.remote.address:  # gone, or it answers elsewhere now
                self._leave(self._watches.pop(key))
        for key, address in addresses.items():
            if key not in self._watches:
                assert run.attempt is not None
                rank = run.attempt.keys.index(key)
                mirrors = self._log_of(run, rank) if rank else self._mirrors(run)
                self._watches[key] = Watch(Remote(address), run.run, self._clock, self._wake, mirrors)

    def _mirrors(self, run: RunRecord) -> dict[str, Mirror]:
        assert run.attempt is not None
        number = run.attempt.number
        return {
            "train.log": Mirror(self.directory / "train.log", number),
            "metrics.jsonl": Mirror(self._journal.raw, number),
        }

    def _log_of(self, run: RunRecord, rank: int) -> dict[str, Mirror]:
        """Of a node beside the first: its log in a file of its own."""
        assert run.attempt is not None
        return {"train.log": Mirror(self.directory / node_log(rank), run.attempt.number)}

    def _others(self, run: RunRecord) -> list[Watch]:
        keys = run.attempt.keys[1:] if run.attempt is not None else ()
        return [self._watches[key] for key in keys if key in self._watches]

    def _first(self, run: RunRecord) -> Watch | None:
        return (
            self._watches.get(run.attempt.keys[0]) if run.attempt is not None and run.attempt.keys else None
        )

    # ------------------------------------------------------------ what is new

    def _difference(self, run: RunRecord) -> Iterator[Change]:
        now, stream = self._clock.now(), e.run_stream(run.run)
        for node in run.attempt_nodes():
            watch = self._watches.get(node.key)
            if watch is not None and watch.seen.ready is not None and node.ready_at is None:
                facts = dict(watch.seen.ready)
                boot, offset = facts.pop("boot_id"), facts.pop("clock_offset_seconds")
                yield (
                    e.node_stream(node.key),
                    e.NodeReady(at=now, boot_id=boot, clock_offset_seconds=offset, facts=facts),
                )
        if run.attempt is None:
            return
        for name, lane in list(self._lanes.items()):
            key, _, word = name.rpartition("/")
            known = run.attempt.lanes.get(name)
            if key not in run.attempt.keys or (known is not None and known.hash == lane.hash):
                continue
            yield stream, e.LaneDone(at=now, key=key, lane=word, hash=lane.hash, seconds=lane.seconds,
                                     sent_bytes=lane.sent_bytes, detail=lane.detail)  # fmt: skip
        yield from self._training(run, now)

    def _training(self, run: RunRecord, now: datetime) -> Iterator[Change]:
        """Checkpoints, progress, restarts and the end, as files and supervisor tell them."""
        assert run.attempt is not None
        stream, first = e.run_stream(run.run), self._first(run)
        self._journal.read(run)
        announced = list(self._journal.checkpoints(run))
        yield from ((stream, self._seen(item, now)) for item in announced)
        supervisor = self._supervisor(run, first)
        ended = self._verdict(run, supervisor)
        ending = ended is not None and run.attempt.trainer_end is None
        monotonic = self._clock.monotonic()
        if ending or run.attempt.trainer_end or monotonic - self._progress_at >= PROGRESS_SECONDS:
            self._progress_at = monotonic
            progress = self._journal.progress(run, now, supervisor.get("gpu"))
            if progress is not None:
                yield stream, progress
        if supervisor.get("restarts", 0) > run.attempt.restarts:
            yield stream, e.TrainerRestarted(at=now, restarts=supervisor["restarts"], reason=str(supervisor.get("detail") or ""),
                                             step=int(supervisor.get("step") or 0))  # fmt: skip
        if ended is not None and ending:
            yield stream, e.TrainerEnded(at=now, attempt=run.attempt.number, reason=ended[0],
                                         step=int(supervisor.get("step") or 0), detail=ended[1])  # fmt: skip
        yield from self._checkpoints(run, now)

    def _supervisor(self, run: RunRecord, watch: Watch | None) -> dict[str, Any]:
        """What a node's supervisor wrote under the attempt's token; {} before that."""
        assert run.attempt is not None
        seen = watch.seen if watch is not None else None
        if seen is None or seen.trainer is None or run.attempt.token is None:
            return {}
        return seen.supervisor if seen.trainer.token == run.attempt.token else {}

    def _verdict(self, run: RunRecord, first: dict[str, Any]) -> tuple[str, str] | None:
        """Why the trainer has ended, as the supervisors of all nodes say together."""
        others, now = [self._supervisor(run, other) for other in self._others(run)], self._clock.monotonic()
        self._odd_since = (self._odd_since or now) if group.odd(first, others) else None
        odd_seconds = now - self._odd_since if self._odd_since is not None else 0.0
        return group.verdict(first, others, asked=run.stop is not None, odd_seconds=odd_seconds)

    def _checkpoints(self, run: RunRecord, now: datetime) -> Iterator[Change]:
        """Pull what was announced while training goes on, report what is whole here, and let go of old ones."""
        stream, first = e.run_stream(run.run), self._first(run)
        for item in self._puller.whole():
            known = run.checkpoints.get(item.step)
            if (
                known is None
                or known.dropped
                or known.sha256 != item.sha256
                or (known.path and (item.weights_only or known.fetched))
            ):
                continue
            yield stream, e.CheckpointVerified(at=now, step=item.step, path=str(item.path), sha256=item.sha256,
                                               bytes=item.bytes, weights_only=item.weights_only)  # fmt: skip
        for step in collect.superfluous(run):
            yield stream, e.CheckpointDropped(at=now, step=step)
        self._puller.clean(run)
        attempt = run.attempt
        if (
            first is not None
            and attempt is not None
            and attempt.trainer_end is None
            and first.seen.ready is not None
        ):
            self._findings.background(first.remote, run)
            self._puller.background(first.remote, first.directory, run)

    def _seen(self, line: dict[str, Any], now: datetime) -> e.CheckpointSeen:
        return e.CheckpointSeen(at=now, step=line["step"], sha256=line["sha256"], bytes=line["bytes"],
                                validation_loss=line.get("validation_loss"), best=bool(line.get("best")))  # fmt: skip

    # ------------------------------------------------------------ jobs

    def _start_job(self, name: str, work: Callable[[], None], key: str | None = None) -> None:
        """Do `work` in a thread; its end, whatever it is, becomes the job's state, a failure an event too."""
        with self._lock:
            old = self._jobs.get(name)
            if old is not None and old.state == "running":
                return
            failures = old.failures if old else 0
            self._jobs[name] = Job("running", self._clock.now(), failures)

        def run() -> None:
            reason: str | None = "an unexpected error, whose traceback is in driver.log"
            noted, fatal = False, False
            try:
                work()
                reason = None
            except preflight.PreflightError as error:
                reason, noted = str(error), True
                assert key is not None
                self._add(e.node_stream(key), e.PreflightFailed(at=self._clock.now(), reason=reason))
            except NodeUnreachable as error:
                # The link is at fault, not the node's work: tried again for as long as the node is not given up.
                reason, noted = str(error), True
            except _WORK_FAILS as error:
                reason, fatal = str(error), isinstance(error, prepare.PrepareError) and error.fatal
            finally:
                now = self._clock.now()
                if reason is not None and not noted:
                    word = name.rpartition("/")[2]
                    failed = e.JobFailed(at=now, job=word, reason=reason, key=key, fatal=fatal)
                    self._add(e.run_stream(self.run), failed)
                with self._lock:
                    self._jobs[name] = (
                        Job("done", now) if reason is None else Job("failed", now, failures + 1, reason)
                    )
                self._wake()

        threading.Thread(target=run, name=name, daemon=True).start()

    def _gone(self, item: CheckpointRecord) -> None:
        gone = e.CheckpointGone(at=self._clock.now(), step=item.step, sha256=item.sha256)
        self._add(e.run_stream(self.run), gone)

    def _failed(self, job: str, reason: str) -> None:
        """What goes on beside the training has failed."""
        self._add(e.run_stream(self.run), e.JobFailed(at=self._clock.now(), job=job, reason=reason))

    def _add(self, stream: str, event: e.RunEvent | e.NodeEvent) -> None:
        with self._lock:
            self._news.append((stream, event))
