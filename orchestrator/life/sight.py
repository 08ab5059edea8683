"""What a driver sees: what happens on its nodes (`Site`), and what it remembers of its looks at the provider (`Sight`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from orchestrator.figures import dollars
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


def free_now(offers: Iterable[Offer], most: int = 4) -> str:
    """Types with GPUs that are free, those with the most GPUs first: `free now: gpu_8x_a100 ($14.32/h, us-east-1), …`."""
    places: dict[str, list[Offer]] = {}
    for offer in offers:
        if offer.available and offer.gpus:
            places.setdefault(offer.instance_type, []).append(offer)
    ranked = sorted(places.values(), key=lambda item: (-item[0].gpus, item[0].usd_per_hour))
    told = [
        f"{item[0].instance_type} ({dollars(item[0].usd_per_hour)}/h, {', '.join(offer.region for offer in item[:3])})"
        for item in ranked[:most]
    ]
    return f"free now: {', '.join(told)}" if told else "nothing with a GPU is free now"


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
    free: str = ""
    """What could be rented instead while nothing that the spec asks for is free, for people."""

    def ask(self, provider: Provider, hardware: dict[str, Any]) -> None:
        """Take in what can be rented. Raises ProviderError."""
        self.free = ""
        self.offers = tuple(provider.offers(hardware))
        if provider.traits.tells_capacity and not any(offer.available for offer in self.offers):
            self.free = free_now(provider.offers({}))

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
