"""What a driver sees: what happens on its nodes (`Site`), and what it remembers of its looks at the provider (`Sight`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from orchestrator.life import world as w
from provisioning.base import Provider
from runs import events as e
from runs.facts import ENDED, Inventory, Offer
from runs.record import NodeRecord, RunRecord


@dataclass(frozen=True)
class SiteView:
    """What a Site saw since it was last asked."""

    contacts: Mapping[str, w.Contact] = field(default_factory=dict)
    trainer: w.TrainerView | None = None
    jobs: Mapping[str, w.Job] = field(default_factory=dict)
    events: Sequence[tuple[str, e.RunEvent | e.NodeEvent]] = ()
    """(stream, event), to be committed."""


class Site(Protocol):
    """What happens on nodes. Nothing here blocks: work goes on in the background, and is seen by `observe`.

    A job that was asked for is in the next view, in whatever state; what was seen of the trainer before `start` or `stop`
    is not in any view after it. An event is in the view that says that its job is done, or in an earlier one.
    """

    def observe(self, run: RunRecord) -> SiteView:
        """Keep connections to the nodes of the open attempt; report what was heard."""

    def prepare(self, run: RunRecord, key: str) -> None:
        """Begin the lanes of a node."""

    def start(self, run: RunRecord, token: str, deadline: datetime | None) -> None:
        """Start the supervisors under `token`; harmless where they run."""

    def stop(self, run: RunRecord, *, checkpoint: bool) -> None:
        """Ask the supervisors to end."""

    def collect(self, run: RunRecord, steps: Sequence[int], *, weights_only: bool) -> None:
        """Begin to bring home checkpoints, log, metrics and evaluations."""


@dataclass
class Sight:
    """What this driver remembers of what it saw; lost with it, and seen again by the next."""

    offers: tuple[Offer, ...] | None = None
    offers_at: datetime | None = None
    offers_error: str | None = None
    inventory: Inventory | None = None
    previous_at: datetime | None = None
    looked_at: datetime | None = None
    absent: dict[str, tuple[datetime, ...]] = field(default_factory=dict)
    seen_at: dict[str, datetime] = field(default_factory=dict)
    """key → when its node was last seen to be there."""
    confirmed_at: dict[str, datetime] = field(default_factory=dict)
    stop_asked: tuple[datetime, bool] | None = None
    lease_tried_at: dict[str, datetime] = field(default_factory=dict)
    audits: dict[str, tuple[datetime, int]] = field(default_factory=dict)
    claim_refused: str | None = None
    complaint: str | None = None
    """Why the last look failed, for people."""

    def see(self, inventory: Inventory, nodes: Sequence[NodeRecord]) -> None:
        """Take in an inventory: what is there, and which of our nodes are not."""
        self.previous_at = self.inventory.at if self.inventory else None
        self.inventory, self.complaint = inventory, None
        for node in nodes:
            found = inventory.find(node.key, node.id)
            if found is not None and found.status not in ENDED:
                self.seen_at[node.key] = inventory.at
            self.absent[node.key] = () if found else (*self.absent.get(node.key, ())[-8:], inventory.at)

    def world(self, provider: Provider, view: SiteView, given_up: tuple[NodeRecord, ...] = ()) -> w.World:
        """The world as `decide` wants it."""
        return w.World(
            traits=provider.traits,
            offers=self.offers,
            offers_at=self.offers_at,
            offers_error=self.offers_error,
            inventory=self.inventory,
            absent=dict(self.absent),
            looked_at=self.looked_at,
            confirmed_at=dict(self.confirmed_at),
            contacts=view.contacts,
            trainer=view.trainer,
            jobs=view.jobs,
            stop_asked=self.stop_asked,
            lease_tried_at=dict(self.lease_tried_at),
            given_up=given_up,
            audits=dict(self.audits),
            claim_refused=self.claim_refused,
        )
