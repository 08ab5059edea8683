"""What happened, as facts that never change. Two kinds of stream: `run:RUN` and `node:KEY`.

A record is a fold over these (`runs.fold`); dollars are computed from them and a tariff (`runs.charges`). Every event is
committed before what it announces (an intent) or after what it reports (an outcome), never in between.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from runs.facts import Marker, NodeStatus, Offer

VERSION = 1
"""Schema version that is written with each event; older ones are read by their own branch in `load`."""

Outcome = Literal["succeeded", "failed", "stopped", "lost"]
Phase = Literal["training", "redone", "evaluating", "preparing", "collecting", "booting", "releasing", "idle"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Where several overlap, the first has the time."""


class Event(BaseModel):
    """Base of all events: `at` is this machine's wall clock, UTC. A process uses few of them: each is built when it is."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)
    at: datetime


# ---------------------------------------------------------------- of a run, by any process


class RunCreated(Event):
    """A spec was accepted: nothing is rented yet."""

    kind: Literal["RunCreated"] = "RunCreated"
    run: str
    spec: dict[str, Any]
    steps: int
    max_micro_usd: int | None = None
    max_seconds: float | None = None
    wait_seconds: float = 0.0
    """How long to wait for capacity."""
    sweep: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    """What the sweep set in its base spec, by dotted key."""
    on: str | None = None
    """Key of the kept node that the first attempt claims."""
    on_or_rent: bool = False
    """Rent one where that node is not to be had any more."""


class StopRequested(Event):
    """The user, the budget or the deadline wants the run to end."""

    kind: Literal["StopRequested"] = "StopRequested"
    reason: str
    """user | budget | deadline | interrupted"""
    checkpoint: bool = True
    """Write a last checkpoint first."""


class ResumeRequested(Event):
    """The user wants a run that ended otherwise than by success to go on."""

    kind: Literal["ResumeRequested"] = "ResumeRequested"
    max_micro_usd: int | None = None
    wait_seconds: float = 0.0


class LimitsRaised(Event):
    """`extend`: new limits, which replace the old ones where given."""

    kind: Literal["LimitsRaised"] = "LimitsRaised"
    max_micro_usd: int | None = None
    max_seconds: float | None = None


class WaitCancelled(Event):
    """Ctrl-C before anything was rented."""

    kind: Literal["WaitCancelled"] = "WaitCancelled"


class ReleaseRequested(Event):
    """A kept node is to be released."""

    kind: Literal["ReleaseRequested"] = "ReleaseRequested"
    key: str


# ---------------------------------------------------------------- of a run, by its driver


class DriverStarted(Event):
    """A driver took the run over; events of an older epoch are refused from now on."""

    kind: Literal["DriverStarted"] = "DriverStarted"
    epoch: int
    pid: int
    start_time: float
    boot_id: str


class OfferChosen(Event):
    """What the next attempt will rent."""

    kind: Literal["OfferChosen"] = "OfferChosen"
    attempt: int
    offer: Offer


class AttemptStarted(Event):
    """One node group's service to this run begins: its nodes are intended next."""

    kind: Literal["AttemptStarted"] = "AttemptStarted"
    attempt: int
    keys: tuple[str, ...]
    from_step: int
    world_size: int
    microbatch_size: int | None = None


class LaneDone(Event):
    """A lane of the preparation is complete on a node."""

    kind: Literal["LaneDone"] = "LaneDone"
    key: str
    lane: str
    hash: str
    seconds: float = 0.0
    sent_bytes: int = 0
    detail: dict[str, Any] = Field(default_factory=dict)


class TrainerStarted(Event):
    """The supervisor runs under this token."""

    kind: Literal["TrainerStarted"] = "TrainerStarted"
    attempt: int
    token: str
    deadline: datetime | None = None


class TrainerRestarted(Event):
    """The supervisor started torchrun again."""

    kind: Literal["TrainerRestarted"] = "TrainerRestarted"
    restarts: int
    reason: str
    step: int


class TrainerEnded(Event):
    """The supervisor is done: finished | stopped | deadline | interrupted | failed."""

    kind: Literal["TrainerEnded"] = "TrainerEnded"
    attempt: int
    reason: str
    step: int
    detail: str = ""


class CheckpointSeen(Event):
    """The trainer announced a whole checkpoint on the node."""

    kind: Literal["CheckpointSeen"] = "CheckpointSeen"
    step: int
    sha256: str
    bytes: int
    validation_loss: float | None = None
    best: bool = False


class CheckpointVerified(Event):
    """A checkpoint is on this side, and its manifest holds."""

    kind: Literal["CheckpointVerified"] = "CheckpointVerified"
    step: int
    path: str
    sha256: str
    bytes: int
    weights_only: bool = False


class CheckpointDropped(Event):
    """Neither here nor on a node any more, as retention says; committed before the copy here is deleted."""

    kind: Literal["CheckpointDropped"] = "CheckpointDropped"
    step: int


class CheckpointGone(Event):
    """The node that announced it has it no more: its retention let it go before it was pulled."""

    kind: Literal["CheckpointGone"] = "CheckpointGone"
    step: int
    sha256: str


class ProgressSeen(Event):
    """What the mirrored metrics say, and the new phase intervals they add (POSIX seconds of this machine's clock)."""

    kind: Literal["ProgressSeen"] = "ProgressSeen"
    summary: dict[str, Any]
    intervals: tuple[tuple[str, float, float], ...] = ()
    """(phase, start, end), each later than those of earlier events."""


class EvaluationRecorded(Event):
    """A loss on a named test set, samples of text, or another judgement."""

    kind: Literal["EvaluationRecorded"] = "EvaluationRecorded"
    name: str
    step: int | None = None
    result: dict[str, Any]


class JobFailed(Event):
    """A lane, a start or a transfer failed on a node; counted, so that it is not tried for ever."""

    kind: Literal["JobFailed"] = "JobFailed"
    job: str
    reason: str
    key: str | None = None
    fatal: bool = False
    """Another try, here or elsewhere, would fail again: the spec or the data is at fault."""


class AttemptEnded(Event):
    """Each node of the attempt is settled, or is kept on purpose."""

    kind: Literal["AttemptEnded"] = "AttemptEnded"
    attempt: int
    reason: str


class RunEnded(Event):
    """The run is over."""

    kind: Literal["RunEnded"] = "RunEnded"
    outcome: Outcome
    reason: str


# ---------------------------------------------------------------- of a node, by the driver (or `reap`)


class LaunchIntended(Event):
    """Durable before the call: from now on this node may exist and bill."""

    kind: Literal["LaunchIntended"] = "LaunchIntended"
    key: str
    run: str
    provider: str
    marker: Marker
    offer: Offer
    unguarded: bool = False
    """It bills, and does not end itself when its lease is over."""


class LaunchAnswered(Event):
    """The provider named the node."""

    kind: Literal["LaunchAnswered"] = "LaunchAnswered"
    id: str


class LaunchRefused(Event):
    """The provider said no: there is no such node."""

    kind: Literal["LaunchRefused"] = "LaunchRefused"
    code: str
    message: str
    capacity: bool = False
    """Sold out: another offer may do."""


class LaunchAmbiguous(Event):
    """No answer that can be believed."""

    kind: Literal["LaunchAmbiguous"] = "LaunchAmbiguous"
    message: str


class LaunchFound(Event):
    """The inventory shows the node of an intent whose answer was lost."""

    kind: Literal["LaunchFound"] = "LaunchFound"
    id: str


class LaunchAbandoned(Event):
    """Enough looks over enough time showed nothing. If it arrives late after all it is terminated on sight."""

    kind: Literal["LaunchAbandoned"] = "LaunchAbandoned"


class NodeObserved(Event):
    """The provider's view of the node changed."""

    kind: Literal["NodeObserved"] = "NodeObserved"
    status: NodeStatus
    ip: str | None = None
    port: int = 22
    user: str = "ubuntu"
    private_ip: str | None = None
    micro_usd_per_hour: int | None = None
    not_before: datetime | None = None
    """The last moment at which it was known not to be in this status."""


class NodeReady(Event):
    """A verified login worked."""

    kind: Literal["NodeReady"] = "NodeReady"
    host_key: str = ""
    boot_id: str = ""
    clock_offset_seconds: float = 0.0
    """This machine's clock minus the node's."""
    facts: dict[str, Any] = Field(default_factory=dict)


class PreflightFailed(Event):
    """The node is not what was rented; it is ended, and another is tried."""

    kind: Literal["PreflightFailed"] = "PreflightFailed"
    reason: str


class LeaseExtended(Event):
    """`extend`: the node's marker carries a later end."""

    kind: Literal["LeaseExtended"] = "LeaseExtended"
    marker: Marker


class NodeKept(Event):
    """The run is over and the node stays, as the spec says; it bills on."""

    kind: Literal["NodeKept"] = "NodeKept"
    until: datetime | None = None


class NodeClaimed(Event):
    """Another run takes a kept node over, with its bill from now on: the former run answers for it no more. In one commit
    with the claiming run's AttemptStarted, and refused unless the node is kept by a run that has ended."""

    kind: Literal["NodeClaimed"] = "NodeClaimed"
    run: str
    attempt: int
    former: str


class TerminateIntended(Event):
    """Durable before the call."""

    kind: Literal["TerminateIntended"] = "TerminateIntended"
    reason: str


class TerminateAnswered(Event):
    """The provider accepted the request (or did not: `accepted` is false, and it is sent again)."""

    kind: Literal["TerminateAnswered"] = "TerminateAnswered"
    accepted: bool
    message: str = ""


class NodeGone(Event):
    """The provider no longer has it: terminated, preempted, not found, or absent from enough inventories."""

    kind: Literal["NodeGone"] = "NodeGone"
    evidence: str
    seen_at: datetime | None = None
    """The last moment at which it was known to be there."""


class BillingReconciled(Event):
    """The provider's own log was asked about a node that is gone; where it is believed, the bill follows it."""

    kind: Literal["BillingReconciled"] = "BillingReconciled"
    source: str
    launched: datetime | None = None
    ended: datetime | None = None
    contradiction: str | None = None
    """Why it is not believed: what was seen here cannot be true beside it."""


RunEvent = Annotated[
    RunCreated | StopRequested | ResumeRequested | LimitsRaised | WaitCancelled | ReleaseRequested
    | DriverStarted | OfferChosen | AttemptStarted | LaneDone | TrainerStarted | TrainerRestarted | TrainerEnded
    | CheckpointSeen | CheckpointVerified | CheckpointDropped | CheckpointGone | ProgressSeen | EvaluationRecorded | JobFailed | AttemptEnded | RunEnded,
    Field(discriminator="kind"),
]  # fmt: skip
NodeEvent = Annotated[
    LaunchIntended | LaunchAnswered | LaunchRefused | LaunchAmbiguous | LaunchFound | LaunchAbandoned | NodeObserved
    | NodeReady | PreflightFailed | LeaseExtended | NodeKept | NodeClaimed | TerminateIntended | TerminateAnswered | NodeGone
    | BillingReconciled,
    Field(discriminator="kind"),
]  # fmt: skip
AnyEvent = RunEvent | NodeEvent

_DEFERRED = ConfigDict(defer_build=True)
_run_event: TypeAdapter[RunEvent] = TypeAdapter(RunEvent, config=_DEFERRED)
_node_event: TypeAdapter[NodeEvent] = TypeAdapter(NodeEvent, config=_DEFERRED)


def run_stream(run: str) -> str:
    """Name of a run's stream."""
    return f"run:{run}"


def node_stream(key: str) -> str:
    """Name of a node's stream."""
    return f"node:{key}"


def dump(event: Event) -> str:
    """The stored form of an event: JSON."""
    return event.model_dump_json()


def load(stream: str, body: str) -> RunEvent | NodeEvent:
    """The event of a stored form. Raises pydantic.ValidationError on a broken one."""
    if stream.startswith("run:"):
        return _run_event.validate_json(body)
    return _node_event.validate_json(body)
