"""What a driver sees at one moment, and what it can do about it: the vocabulary of `life.decide`. Plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from provisioning.base import Traits
from runs.facts import Inventory, NodeFacts, Offer
from runs.record import NodeRecord

# ---------------------------------------------------------------- what is seen


@dataclass(frozen=True)
class Contact:
    """How our connection to a node is."""

    reachable: bool
    since: datetime
    """Since when it is so, without a break."""
    host_key_mismatch: bool = False
    error: str = ""


@dataclass(frozen=True)
class TrainerView:
    """What the supervisor on the first node said last."""

    state: Literal["absent", "starting", "running", "restarting", "stopping", "ended", "dead"]
    """absent: none with the attempt's token; dead: it left a state behind and lives no more."""
    token: str | None
    seen_at: datetime
    graceful: bool = True
    """stopping: whether a last checkpoint is being written."""
    deadline: datetime | None = None
    """The one that the supervisor has armed, where it says so."""


@dataclass(frozen=True)
class Job:
    """Work in the background of this driver: a lane, a collection."""

    state: Literal["running", "done", "failed"]
    at: datetime
    """When it entered this state."""
    failures: int = 0
    """In a row."""
    reason: str = ""


@dataclass(frozen=True)
class World:
    """Everything outside the record that a decision may depend on. What was not looked at is None or absent."""

    traits: Traits = field(default_factory=Traits)
    offers: tuple[Offer, ...] | None = None
    offers_at: datetime | None = None
    offers_error: str | None = None
    """Why the last question for offers failed for good (credentials, an impossible hardware section)."""
    inventory: Inventory | None = None
    absent: Mapping[str, tuple[datetime, ...]] = field(default_factory=dict)
    """key → the times of the inventories in a row that did not show it."""
    looked_at: datetime | None = None
    """When an inventory was last asked for, whether or not it was had."""
    confirmed_at: Mapping[str, datetime] = field(default_factory=dict)
    """key → when its node was last asked for by id."""
    contacts: Mapping[str, Contact] = field(default_factory=dict)
    trainer: TrainerView | None = None
    jobs: Mapping[str, Job] = field(default_factory=dict)
    """`KEY/prepare`, `start`, `stop`, `collect`."""
    stop_asked: tuple[datetime, bool] | None = None
    """When the supervisors were last asked to end, and whether with a checkpoint."""
    lease_tried_at: Mapping[str, datetime] = field(default_factory=dict)
    """key → when its provider was last told of a later lease."""
    claim_refused: str | None = None
    """Why a kept node could not be claimed: somebody was faster."""
    given_up: tuple[NodeRecord, ...] = ()
    """Launches that other runs of this home gave up within a day, and those of them that came late and are being ended."""
    audits: Mapping[str, tuple[datetime, int]] = field(default_factory=dict)
    """key → when its provider's log was last asked about it in vain, and how often."""

    def shown(self, node: NodeRecord, since: datetime) -> NodeFacts | None:
        """What an inventory taken after `since` shows of that node."""
        if self.inventory is None or self.inventory.at < since:
            return None
        return self.inventory.find(node.key, node.id)

    def absent_enough(self, key: str, since: datetime) -> bool:
        """Enough inventories in a row, over enough time since then, did not show it."""
        times = [at for at in self.absent.get(key, ()) if at >= since]
        enough = timedelta(seconds=self.traits.look_seconds)
        return len(times) >= max(1, self.traits.looks) and times[-1] - since >= enough

    def look(self, now: datetime, every: float, why: str) -> Look | Wait:
        """An inventory now if the last is older than `every` seconds, else the wait until then."""
        age = (now - self.looked_at).total_seconds() if self.looked_at is not None else None
        if age is None or age >= every:
            return Look(why)
        return Wait(every - age, why)


# ---------------------------------------------------------------- what can be done


@dataclass(frozen=True)
class AskOffers:
    """Read what can be rented now."""


@dataclass(frozen=True)
class Look:
    """Read the provider's inventory."""

    why: str


@dataclass(frozen=True)
class BeginAttempt:
    """Commit to an offer and to the names of its nodes; nothing is rented yet."""

    attempt: int
    offer: Offer
    keys: tuple[str, ...]
    from_step: int
    world_size: int


@dataclass(frozen=True)
class Claim:
    """Take over a kept node and begin an attempt on it, in one commit: from then on it is this run's."""

    key: str
    attempt: int
    offer: Offer
    from_step: int
    world_size: int


@dataclass(frozen=True)
class Launch:
    """Rent one node: intent, call, outcome."""

    attempt: int
    index: int
    offer: Offer
    lease_end: datetime


@dataclass(frozen=True)
class Adopt:
    """The inventory shows the node of an intent whose answer was lost, or one that was given up."""

    key: str
    node_id: str


@dataclass(frozen=True)
class Abandon:
    """Give an intent up: it was looked for long enough."""

    key: str


@dataclass(frozen=True)
class DeclareGone:
    """Believe that a node is no more."""

    key: str
    evidence: str


@dataclass(frozen=True)
class Confirm:
    """Ask for one node by its id, to learn whether it is gone."""

    key: str


@dataclass(frozen=True)
class Terminate:
    """Ask for the end of a node: intent, call, outcome."""

    key: str
    reason: str


@dataclass(frozen=True)
class EndLate:
    """End a node that another run gave up before it appeared: found, intent, call, outcome."""

    key: str
    node_id: str


@dataclass(frozen=True)
class Reconcile:
    """Ask the provider's log when a node that is gone began and ended, and correct its bill by that."""

    key: str


@dataclass(frozen=True)
class Keep:
    """Leave a node running after the run, as the spec says."""

    key: str
    until: datetime | None


@dataclass(frozen=True)
class ExtendLease:
    """Make the provider's note of a node's lease that of the run's limits."""

    key: str
    until: datetime


@dataclass(frozen=True)
class Prepare:
    """Code, environment, data and preflight on a node, as one background job of parallel lanes."""

    key: str


@dataclass(frozen=True)
class StartTrainer:
    """Start the supervisors under a token; harmless where they run already."""

    token: str
    deadline: datetime | None


@dataclass(frozen=True)
class StopTrainer:
    """Ask the supervisors to end, with a last checkpoint or at once."""

    checkpoint: bool


@dataclass(frozen=True)
class Collect:
    """Bring home the named checkpoints, the rest of log and metrics, and the evaluations."""

    steps: tuple[int, ...]
    weights_only: bool = False


@dataclass(frozen=True)
class RequestStop:
    """The budget or the deadline ends the run."""

    reason: str


@dataclass(frozen=True)
class EndAttempt:
    """Each node of the attempt is settled or kept."""

    reason: str


@dataclass(frozen=True)
class EndRun:
    """The verdict."""

    outcome: Literal["succeeded", "failed", "stopped", "lost"]
    reason: str


Effect = (
    AskOffers | Look | BeginAttempt | Claim | Launch | Adopt | Abandon | DeclareGone | Confirm | Terminate | EndLate | Reconcile | Keep
    | ExtendLease | Prepare | StartTrainer | StopTrainer | Collect | RequestStop | EndAttempt | EndRun
)  # fmt: skip


@dataclass(frozen=True)
class Wait:
    """Nothing to do for `seconds`, or until something is heard."""

    seconds: float
    why: str


@dataclass(frozen=True)
class Done:
    """Nothing is left to do for this run."""
