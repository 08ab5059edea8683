"""What must hold, whatever happens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from orchestrator.life import world as w
from runs import charges
from runs import events as e
from runs.fold import fold_run
from runs.nodefold import fold_node
from runs.record import LATE, NodeRecord, RunRecord
from runs.store import StaleEpoch, Store

if TYPE_CHECKING:
    from .cloud import Machine
    from .engine import Schedule

_RELEASES = {"succeeded", "trainer-stopped", "trainer-failed", "trainer-deadline", "trainer-interrupted"}


class Broken(AssertionError):
    """An invariant does not hold."""


def _hold(condition: bool, what: str) -> None:
    if not condition:
        raise Broken(what)


def kept(run: RunRecord, node: NodeRecord) -> bool:
    """Whether a node may outlive its run, as the user sees it: `stop` of the run or of the node means that it goes."""
    return node.kept and run.stop is None and node.key not in run.release_requested


class Rules:
    """The invariants of one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.s = schedule
        self.extended = False
        self._verified: dict[int, str] = {}
        self._last: RunRecord | None = None
        self.everything_shown = schedule.plan.seed % 8 == 0
        """Whether the rows that `status` reads are made and compared too."""

    # ------------------------------------------------------------ at each call that costs

    def before_call(self, method: str, key: str) -> None:
        """The intent is on disk, as a second connection reads it, and has no outcome; a launch is called once."""
        rows = self.s.ground.disk.execute(
            "SELECT kind FROM events WHERE stream = ? ORDER BY seq", (f"node:{key}",)
        )
        kinds = [row[0] for row in rows]
        owner, reason = self.s.ground.disk.execute(
            "SELECT run, json_extract(record, '$.terminate_reason') FROM nodes WHERE key = ?", (key,)
        ).fetchone()
        mine = owner == self.s.run or (method == "terminate" and reason == LATE)
        _hold(mine, f"{self.s.run} calls {method} for {key}, which is {owner}'s")
        if method == "launch":
            _hold(kinds == ["LaunchIntended"], f"launch of {key} is called after {kinds}")
            _hold(not self.s.cloud.launches.get(key), f"launch of {key} is called twice")
        else:
            _hold(kinds[-1:] == ["TerminateIntended"], f"terminate of {key} is called after {kinds}")
            self._nothing_left_behind(key)

    def _nothing_left_behind(self, key: str) -> None:
        """A node that could be collected from is released only when what was wanted is here, or nothing is left to pay with."""
        run = self.s.record()
        node = run.node(key)
        if node is None:
            return  # a late arrival that another run had given up: nothing was ever done on it
        box = self.s.boxes.get(node.id or "")
        attempt = next((item for item in run.attempts if key in item.keys), None)
        if box is None or attempt is None or attempt.keys[0] != key or not box.checkpoints:
            return
        if node.terminate_reason not in _RELEASES or not box.reachable(self.s.t, self.s.plan):
            return
        if node.terminate_reason == "succeeded" and self.s.plan.fetch == "none":
            return
        newest = max(box.checkpoints)
        _hold(
            newest in self.s.here,
            f"{key} is released ({node.terminate_reason}) and step {newest} is not here",
        )

    def refused(self, store: Store, epoch: int) -> None:
        """The old driver wakes up and wants to write."""
        late = e.StopRequested(at=self.s.now(), reason="late")
        try:
            Store.commit(store, [(e.run_stream(self.s.run), late)], epoch=epoch)
        except StaleEpoch:
            return
        raise Broken("a driver that was superseded could write")

    def _others(self, run: RunRecord) -> set[str]:
        """Keys of the nodes of the schedule's other run."""
        return {
            node.key for other in self.s.runs if other != run.run for node in self.s.ground.eye(other).nodes
        }

    # ------------------------------------------------------------ after each step

    def after_step(self, answer: w.Effect | w.Wait | w.Done, run: RunRecord) -> None:
        """What can be told from one record."""
        _hold(not (run.live and isinstance(answer, w.Done)), "done, and the run has not ended")
        if isinstance(answer, w.Launch | w.BeginAttempt | w.Prepare | w.StartTrainer):
            fresh = run.attempt is None or run.attempt.starts <= 1
            stopping = run.stop is not None and run.stop.at < self.s.now() and self._older(run, answer)
            _hold(not (stopping and fresh), f"{type(answer).__name__} though the run is to stop")
        if isinstance(answer, w.Abandon):
            given_up = run.node(answer.key)
            assert given_up is not None
            patience = (self.s.now() - given_up.intended_at).total_seconds()
            _hold(
                patience >= self.s.cloud.traits.look_seconds, f"{answer.key} is given up after {patience} s"
            )
        living = [machine.key for machine in self.s.cloud.machines.values() if machine.alive(self.s.t)]
        if len(set(living)) != len(living):
            raise Broken(f"doubled instances: {living}")
        unknown = set(living) - {node.key for node in run.nodes}
        if unknown and not unknown <= self._others(run):
            raise Broken(f"instances without an intent: {unknown}")
        for step, sha in self._verified.items():
            item = run.checkpoints.get(step)
            if item is None or not item.fetched or item.sha256 != sha:
                raise Broken(f"the verified step {step} was forgotten")
        self._verified = {step: item.sha256 for step, item in run.checkpoints.items() if item.fetched}
        if run is not self._last and isinstance(answer, w.Wait | w.Done):
            self._last = run
            self.bill(run, self.s.now())

    def _older(self, run: RunRecord, answer: object) -> bool:
        """The stop was in the record that the step began with."""
        stop = run.stop
        return stop is not None and (self.s.now() - stop.at).total_seconds() > 60.0

    def bill(self, run: RunRecord, now: datetime) -> None:
        """Charges sum to the bill to the micro-dollar, are never negative, and never overlap."""
        items = charges.charges(run, now)
        _hold(
            sum(item.micro_usd for item in items) == charges.total(run, now),
            "the phases do not sum to the bill",
        )
        last: dict[str, datetime] = {}
        for item in items:
            if item.micro_usd < 0 or item.start > item.end:
                raise Broken(f"a negative charge: {item}")
            if item.start < last.get(item.node, item.start):
                raise Broken(f"charges overlap: {item}")
            last[item.node] = item.end

    # ------------------------------------------------------------ at the end

    def at_end(self, *, everything: bool = False) -> None:
        """Nothing lives that is not kept; nothing is unsettled; the bill is right; rows are what events make of them."""
        run, t = self.s.record(), self.s.t
        _hold(run.outcome is not None, "a driver is done and the run is not")
        for node in run.owned:
            stays = kept(run, node)
            if not node.settled and not stays:
                raise Broken(f"{node.key} is not settled: {node}")
            _hold(not stays or self.s.plan.on_finish != "terminate", f"{node.key} is kept for no reason")
        abandoned = {node.key for node in run.nodes if node.answer == "abandoned"}
        for machine, node in self._machines(run):
            late = machine.key in abandoned and not everything
            _hold(
                kept(run, node) or late or not machine.alive(t),
                f"{machine.key} lives on ({node.gone_evidence}, {node.answer})",
            )
        self._outcome(run)
        if not everything:
            self._budget(run)
        else:
            self.bill(run, self.s.now())
            self._ledger(run)
            if self.everything_shown:
                self._shown(run)
            if self.s.plan.seed % 3 == 0:
                self._folded(run)

    def _machines(self, run: RunRecord) -> Iterator[tuple[Machine, NodeRecord]]:
        """What is there in truth, with its record; without what another run of the schedule answers for."""
        others = self._others(run)
        for machine in self.s.cloud.machines.values():
            node = run.node(machine.key)
            _hold(node is not None or machine.key in others, f"{machine.key} has no record")
            if node is not None and node.run == run.run:
                yield machine, node

    def shared(self) -> None:
        """The runs of a node pay its bill together, to the micro-dollar, one after the other."""
        now = self.s.now()
        nodes = {node.key: node for run in self.s.runs for node in self.s.ground.eye(run).nodes}
        for node in nodes.values():
            bill = charges.node_bill(node, now)
            parts = [part for run in node.tenants if (part := charges.node_share(node, run, now))]
            if bill is None:
                _hold(not parts, f"{node.key} has no bill, and is paid for")
                continue
            _hold(
                sum(part.micro_usd for part in parts) == bill.micro_usd,
                f"the shares of {node.key} are not its bill",
            )
            _hold(all(a.end == b.start for a, b in pairwise(parts)), f"the shares of {node.key} do not join")
            _hold(
                parts[0].start == bill.start and parts[-1].end == bill.end,
                f"{node.key} is not paid for in whole",
            )

    def _outcome(self, run: RunRecord) -> None:
        if run.outcome == "succeeded":
            last = run.checkpoints.get(run.steps)
            _hold(last is not None, "succeeded without a last checkpoint")
            _hold(
                self.s.plan.fetch == "none" or run.steps in self.s.here,
                "succeeded, and the model is not here",
            )
        if run.outcome != "succeeded" and run.cancelled and run.stop is None and not run.resumes:
            _hold(run.outcome in {"stopped", "failed", "lost"}, f"cancelled became {run.outcome}")

    def _slack(self) -> float:
        """Seconds that faults of this schedule may have cost beyond what the driver can help: it was away, or nobody answered."""
        plan = self.s.plan
        slow = sum(2 * f.seconds + 30.0 for f in plan.faults if f.kind == "blackout")
        slow += 150.0 * sum(
            f.kind == "call" and f.what.split(":")[0] in {"terminate", "inventory", "find"}
            for f in plan.faults
        )
        slow += 60.0 * sum(f.what == "launch:late" for f in plan.faults)
        slow += plan.granularity_seconds if self.s.away else 0.0
        return self.s.away + slow + plan.lag_seconds + (plan.boot_seconds if self.s.away else 0.0)

    def _ledger(self, run: RunRecord) -> None:
        """The bill of each node against what the provider really counted."""
        for machine, node in self._machines(run):
            self._logged(node, machine)
            seconds = max(0.0, min(machine.billed_until, self.s.t) - machine.active)
            bill = charges.node_bill(node, self.s.now())
            billed = bill.seconds if bill is not None else 0.0
            truth = charges.billed(seconds, node.offer.tariff) if seconds > 0 else 0.0
            # A minute in which it was never seen active, or not under its name, is in doubt (charges.DOUBT).
            doubt = 60.0 if node.active_at is None or "late-echo" in machine.faults else 2.0
            lived = (bill.end - bill.start).total_seconds() if bill is not None else 0.0
            if node.answer == "abandoned" and not machine.alive(self.s.t):
                continue  # it came late or was called by a driver that died, and ended unseen: only an audit could tell
            low = seconds - doubt - self.s.plan.lag_seconds
            _hold(lived >= low, f"{node.key}: billed for {lived:.0f} s, it lived for {seconds:.0f} s")
            high = truth + 60.0 + self.s.plan.minimum_seconds + self._slack() + self._blind(machine)
            if machine.late and node.billing_ended_at is None:
                high += (
                    self.s.plan.late_seconds
                )  # it appeared while nobody looked: only the log could tell when
            # A node that ended while nobody looked has a bill that says it is an upper bound, and nothing more is asked of it.
            _hold(
                billed <= high or bill is None or not bill.final,
                f"{node.key}: {billed:.0f} s on the bill, {truth:.0f} s in truth",
            )

    def _logged(self, node: NodeRecord, machine: Machine) -> None:
        """A log that is believed ends the bill to the second; one whose clock is wrong is not believed."""
        if node.billing_ended_at is None:
            return
        _hold(self.s.plan.audit == "honest", f"{node.key}: a log that is wrong is believed: {node.audited}")
        truth = self.s.date(machine.billed_until - self.s.t)
        _hold(node.billing_ended_at == truth, f"{node.key}: the bill does not end as the log says")

    def _blind(self, machine: Machine) -> float:
        """How long it may take to learn of an end that nobody announced."""
        unseen = {"vanished", "terminated", "preempted"} & set(machine.faults)
        return 240.0 if unseen else 5.0 + (150.0 if "late-echo" in machine.faults else 0.0)

    def _budget(self, run: RunRecord) -> None:
        if run.max_micro_usd is None or self.extended or self.s.plan.on_finish != "terminate":
            return
        seconds = 60.0 + 30.0 + 2 * self._slack() + 60.0 * len(run.attempts) * run.attempts_before
        allowed = run.max_micro_usd + self.s.plan.nodes * seconds * self.s.plan.micro_usd_per_hour / 3600
        spent = 0.0
        for machine, node in self._machines(run):
            if not machine.late:  # nothing of ours lives while it bills unseen; `reap` is for that
                ago = (self.s.now() - node.claims[-1].at).total_seconds() if node.claims else math.inf
                begun = max(machine.active, self.s.t - ago)
                seconds = min(machine.billed_until, self.s.t) - begun
                if seconds > 0:  # a tariff's minimum is for what was active at all
                    billed = charges.billed(seconds, node.offer.tariff)
                    spent += charges.price(billed, self.s.plan.micro_usd_per_hour)
        _hold(
            spent <= allowed, f"{spent / 1e6:.2f} dollars were spent, {run.max_micro_usd / 1e6:.2f} allowed"
        )

    def _shown(self, run: RunRecord) -> None:
        """What `status` and `compare` show is what the record says."""
        row = self.s.eye.summary(run.run)
        assert row is not None
        told = (row["state"], row["outcome"], row["step"], len(row["nodes"]), row["checkpoints"])
        truth = (run.state, run.outcome, run.summary.get("step", 0), len(run.nodes), len(run.checkpoints))
        _hold(told == truth, f"the row shows {told}, the record has {truth}")
        at = datetime.fromtimestamp(row["projected"], UTC)
        _hold(row["micro_usd"] == charges.total(run, at), "the row shows other dollars than the bill")

    def _folded(self, run: RunRecord) -> None:
        """Rows are the fold of the events, also after a round trip through the disk."""
        eye = self.s.ground.reader
        folded: RunRecord | None = None
        for event in eye.events(e.run_stream(run.run)):
            folded = fold_run(folded, event)  # type: ignore[arg-type]
        stored = eye.record(run.run)
        assert stored is not None
        nodes: list[NodeRecord] = []
        for node in stored.nodes:
            made: NodeRecord | None = None
            for event in eye.events(e.node_stream(node.key)):
                made = fold_node(made, event)  # type: ignore[arg-type]
            _hold(made == node, f"the row of {node.key} is not the fold of its events")
            assert made is not None
            nodes.append(made)
        bare = stored.model_copy(
            update={"nodes": (), "on_node": None, "state": folded.state if folded else "planned"}
        )
        _hold(folded == bare, "the run's row is not the fold of its events")
        _hold(stored == run, "what a process remembers is not what is on disk")
