"""Records: what a run and a node are now, as folded from their events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

from runs.events import Outcome
from runs.facts import Fact, Marker, NodeStatus, Offer
from runs.rows import LIVE

LATE = "late arrival"
"""Why a node was ended that appeared after its launch was given up, by whichever driver saw it."""

RunState = Literal["planned", "waiting", "booting", "preparing", "training", "collecting", "releasing",
                   "succeeded", "failed", "stopped", "lost"]  # fmt: skip


class ClaimRecord(Fact):
    """A kept node was taken over by a run."""

    run: str
    attempt: int
    at: datetime


class NodeRecord(Fact):
    """One intended machine: a life and a bill of its own."""

    key: str
    run: str
    """The one run that answers for it: the one that intended it, until another claims it."""
    claims: tuple[ClaimRecord, ...] = ()
    """By which runs it was taken over, in order."""
    provider: str
    marker: Marker
    offer: Offer
    unguarded: bool = False
    intended_at: datetime
    id: str | None = None
    answer: Literal["none", "ambiguous", "known", "refused", "abandoned"] = "none"
    """none: the intent has no outcome (yet, or for ever if the driver died): as good as ambiguous."""
    refusal: str | None = None
    capacity_refused: bool = False
    status: NodeStatus | None = None
    ip: str | None = None
    port: int = 22
    user: str = "ubuntu"
    private_ip: str | None = None
    micro_usd_per_hour: int | None = None
    """As the instance itself says; the offer's tariff where it says nothing."""
    active_at: datetime | None = None
    """First seen active; `active_not_before` is the last moment at which it was known not to be."""
    active_not_before: datetime | None = None
    observed_at: datetime | None = None
    """When `status` was noted, or that there was no such node (abandoned)."""
    ready_at: datetime | None = None
    host_key: str = ""
    boot_id: str = ""
    clock_offset_seconds: float = 0.0
    facts: Mapping[str, Any] = {}
    preflight_failed: str | None = None
    kept: bool = False
    kept_until: datetime | None = None
    terminate_reason: str | None = None
    terminate_intended_at: datetime | None = None
    terminate_tried_at: datetime | None = None
    terminate_tries: int = 0
    terminate_accepted_at: datetime | None = None
    running_at: datetime | None = None
    """When it was last shown running although its termination had been accepted."""
    running_until: datetime | None = None
    """When it was first shown not to run any more after that."""
    gone_at: datetime | None = None
    gone_evidence: str | None = None
    seen_at: datetime | None = None
    """Once it is gone: the last moment at which it was known to be there."""
    billing_ended_at: datetime | None = None
    audited: str | None = None
    """What the provider's log said of its life, in words, once that was asked."""

    @property
    def tenants(self) -> tuple[str, ...]:
        """The runs that it served, in order; the last one answers for it."""
        return self.marker.run, *(claim.run for claim in self.claims)

    @property
    def settled(self) -> bool:
        """Nothing more is to be done about it: refused, gone, or abandoned (which is still watched for)."""
        return self.answer in {"refused", "abandoned"} or self.gone_at is not None

    @property
    def unsettled_intent(self) -> bool:
        """An intent without an outcome."""
        return self.answer in {"none", "ambiguous"} and self.gone_at is None

    @property
    def alive(self) -> bool:
        """Known to exist and not yet asked to end."""
        return self.answer == "known" and self.gone_at is None and self.terminate_intended_at is None

    @property
    def may_bill(self) -> bool:
        """It may be costing money now."""
        return not self.settled


class LaneRecord(Fact):
    """A finished lane on a node."""

    hash: str
    seconds: float
    sent_bytes: int
    ended_at: datetime
    detail: Mapping[str, Any] = {}


class AttemptRecord(Fact):
    """One node group's service to a run."""

    number: int
    offer: Offer
    keys: tuple[str, ...]
    from_step: int
    world_size: int
    microbatch_size: int | None = None
    started_at: datetime
    ended_at: datetime | None = None
    end_reason: str | None = None
    lanes: Mapping[str, LaneRecord] = {}
    """Keyed `KEY/LANE`."""
    token: str | None = None
    trainer_started_at: datetime | None = None
    trainer_deadline: datetime | None = None
    last_start_at: datetime | None = None
    starts: int = 0
    """How often the supervisor was started, reboots included."""
    restarts: int = 0
    trainer_end: str | None = None
    trainer_end_detail: str = ""
    trainer_ended_at: datetime | None = None
    failures: Mapping[str, tuple[int, str]] = {}
    """job → (how often it failed, the last reason)."""
    fatal: str | None = None
    """A failure that no other try could mend."""


class CheckpointRecord(Fact):
    """A checkpoint that was announced, and whether it is here."""

    step: int
    sha256: str
    bytes: int
    validation_loss: float | None = None
    seen_at: datetime
    attempt: int = 0
    """The attempt on whose node it was last announced."""
    dropped: bool = False
    """Let go of by retention, here and on the node."""
    gone: bool = False
    """No longer on the node that announced it: what is here of it is all that there will be."""
    announced: str = ""
    """The sha256 of the last announcement: another one than `sha256` where it was made again after that one was here."""
    path: str | None = None
    """Where it is on this side, once verified."""
    weights_only: bool = False

    @property
    def fetched(self) -> bool:
        """Verified on this side, the optimizer's state included."""
        return self.path is not None and not self.weights_only


class StopRecord(Fact):
    """Why the run is to end."""

    reason: str
    checkpoint: bool
    at: datetime


class RefusalRecord(Fact):
    """An offer that was sold out when it was asked for."""

    instance_type: str
    region: str
    code: str
    at: datetime


class RunRecord(Fact):
    """The whole of a run. `nodes` are attached by the store: they have streams of their own."""

    run: str
    name: str
    provider: str
    spec: Mapping[str, Any]
    steps: int
    created_at: datetime
    sweep: str | None = None
    overrides: Mapping[str, Any] = {}
    on: str | None = None
    """Key of the kept node that the first attempt claims."""
    on_or_rent: bool = False
    max_micro_usd: int | None = None
    max_seconds: float | None = None
    wait_seconds: float = 0.0
    wait_from: datetime
    """When the present wait for capacity began: creation, or the last resume."""
    epoch: int = 0
    driver_pid: int | None = None
    driver_start_time: float = 0.0
    driver_boot_id: str = ""
    attempts: tuple[AttemptRecord, ...] = ()
    refusals: tuple[RefusalRecord, ...] = ()
    preflight_failures: int = 0
    stop: StopRecord | None = None
    cancelled: bool = False
    release_requested: frozenset[str] = frozenset()
    checkpoints: Mapping[int, CheckpointRecord] = {}
    summary: Mapping[str, Any] = {}
    """The metrics' summary: step, tokens, train_loss, validation_loss, tokens_per_second, mfu, …"""
    intervals: tuple[tuple[str, float, float], ...] = ()
    evaluations: tuple[Mapping[str, Any], ...] = ()
    replaced_at_step: int = 0
    replacements: int = 0
    """Attempts lost in a row without a newer checkpoint."""
    resumes: int = 0
    attempts_before: int = 0
    """How many attempts there were at the last resume."""
    outcome: Outcome | None = None
    reason: str | None = None
    ended_at: datetime | None = None
    state: RunState = "planned"
    nodes: tuple[NodeRecord, ...] = ()
    """Those that serve it, and those that did before another run claimed them."""
    on_node: NodeRecord | None = None
    """The node of `on`, as long as this run has not claimed it."""

    @property
    def owned(self) -> tuple[NodeRecord, ...]:
        """The nodes that this run answers for: nobody else may end them."""
        return tuple(node for node in self.nodes if node.run == self.run)

    @property
    def attempt(self) -> AttemptRecord | None:
        """The attempt that is open, or None between attempts."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].ended_at is None else None

    @property
    def recent_attempts(self) -> tuple[AttemptRecord, ...]:
        """The attempts since the run was created or last resumed."""
        return self.attempts[self.attempts_before :]

    @property
    def live(self) -> bool:
        """The run has not ended."""
        return self.outcome is None

    def node(self, key: str) -> NodeRecord | None:
        """The node of that key, None while its intent is not written."""
        return next((node for node in self.nodes if node.key == key), None)

    def keeps(self, node: NodeRecord) -> bool:
        """The node is kept beyond the run, and nobody has asked for its end: neither of the node nor of the run itself."""
        return node.kept and self.stop is None and node.key not in self.release_requested

    def attempt_nodes(self) -> Iterator[NodeRecord]:
        """The nodes of the open attempt that were intended so far."""
        keys = self.attempt.keys if self.attempt else ()
        return (node for node in self.nodes if node.key in keys)

    @property
    def available(self) -> list[CheckpointRecord]:
        """Checkpoints that are here, or on a node of the open attempt; by step."""
        number = self.attempt.number if self.attempt else None
        return [
            item
            for _, item in sorted(self.checkpoints.items())
            if item.path or (item.attempt == number and not item.dropped and not item.gone)
        ]

    @property
    def latest(self) -> CheckpointRecord | None:
        """The newest available checkpoint."""
        return self.available[-1] if self.available else None

    @property
    def best(self) -> CheckpointRecord | None:
        """The available checkpoint of lowest validation loss; the newest where none was validated."""
        judged = [
            (item.validation_loss, item.step) for item in self.available if item.validation_loss is not None
        ]
        return self.checkpoints[min(judged)[1]] if judged else self.latest

    @property
    def resume_step(self) -> int:
        """The newest step from which a new node could go on: that of the newest whole checkpoint on this side."""
        return max((item.step for item in self.checkpoints.values() if item.fetched), default=0)


def view(run: RunRecord, nodes: tuple[NodeRecord, ...]) -> RunRecord:
    """The run with its nodes, and the state that both together mean."""
    state = run.state
    on_node = next((node for node in nodes if node.key == run.on and run.run not in node.tenants), None)
    nodes = tuple(node for node in nodes if node is not on_node)
    mine = [node for node in nodes if run.attempt and node.key in run.attempt.keys]
    if state == "booting" and mine and all(node.ready_at for node in mine):
        state = "preparing"
    elif state in LIVE and mine and all(node.terminate_intended_at or node.settled for node in mine):
        state = "releasing"
    return run.model_copy(update={"nodes": nodes, "on_node": on_node, "state": state})
