"""The hands of the driver: each effect of `life.decide`, done. Intent before effect, outcome after.

This is the only module that calls a provider's launch and terminate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import singledispatchmethod
from typing import Any, Protocol

from orchestrator.clock import Clock
from orchestrator.life import terms
from orchestrator.life import world as w
from provisioning.base import (
    CredentialsError,
    InvalidHardware,
    LaunchRequest,
    NoCapacity,
    Provider,
    ProviderError,
    Refused,
)
from runs import events as e
from runs.facts import ENDED, Inventory, Marker, NodeFacts, Offer, lease_minutes
from runs.record import NodeRecord, RunRecord
from runs.store import NotYours, Store

BOOTING_NOTED = timedelta(seconds=30)
"""How often it is noted that a node still boots: billing begins later than that, whoever sees it active."""


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
    confirmed_at: dict[str, datetime] = field(default_factory=dict)
    stop_asked: tuple[datetime, bool] | None = None
    lease_tried_at: dict[str, datetime] = field(default_factory=dict)
    claim_refused: str | None = None
    complaint: str | None = None
    """Why the last look failed, for people."""

    def see(self, inventory: Inventory, nodes: Sequence[NodeRecord]) -> None:
        """Take in an inventory: what is there, and which of our nodes are not."""
        self.previous_at = self.inventory.at if self.inventory else None
        self.inventory, self.complaint = inventory, None
        for node in nodes:
            shown = inventory.find(node.key, node.id) is not None
            self.absent[node.key] = () if shown else (*self.absent.get(node.key, ())[-8:], inventory.at)

    def world(self, provider: Provider, view: SiteView) -> w.World:
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
            claim_refused=self.claim_refused,
        )


@dataclass
class Hands:
    """Everything an effect needs."""

    store: Store
    provider: Provider
    site: Site
    clock: Clock
    run: str
    epoch: int
    request: Callable[[Marker, Offer], LaunchRequest]
    """Builds the launch request of a marker: keys, options of the spec's hardware section."""
    sight: Sight = field(default_factory=Sight)

    def commit(self, *changes: tuple[str, e.RunEvent | e.NodeEvent]) -> None:
        """Make events durable, as this epoch of this run."""
        self.store.commit(changes, epoch=self.epoch, run=self.run)

    @singledispatchmethod
    def perform(self, effect: w.Effect, run: RunRecord) -> None:
        """Do `effect` for `run`. Raises StaleEpoch where another driver took over, NotYours where another run took the
        node over; provider errors become events."""
        raise TypeError(f"no hands for {type(effect).__name__}")

    # -------------------------------------------------------- looking

    @perform.register
    def _(self, effect: w.AskOffers, run: RunRecord) -> None:
        sight = self.sight
        sight.offers_at = self.clock.now()
        try:
            sight.offers = tuple(self.provider.offers(terms.hardware(run.spec)))
            sight.complaint = None
        except (CredentialsError, InvalidHardware) as error:
            sight.offers_error = f"{error.code}: {error}"
        except ProviderError as error:
            sight.offers, sight.complaint = None, str(error)

    @perform.register
    def _(self, effect: w.Look, run: RunRecord) -> None:
        sight = self.sight
        sight.looked_at = self.clock.now()
        try:
            inventory = self.provider.inventory()
        except ProviderError as error:
            sight.complaint = str(error)
            return
        sight.see(inventory, run.nodes)
        changes = [
            self._observed(node, inventory.find(node.key, node.id), sight.previous_at)
            for node in run.owned
            if node.answer == "known"
        ]
        self.commit(*(change for change in changes if change is not None))

    def _observed(
        self, node: NodeRecord, facts: NodeFacts | None, before: datetime | None
    ) -> tuple[str, e.NodeEvent] | None:
        """The event that `facts` add to what is known of a node, if any; `before`: when it was last looked at."""
        if facts is None or node.gone_at is not None:
            return None
        known, now = (node.status, node.ip, node.port), self.clock.now()
        same = (facts.status, facts.ip or node.ip, facts.port if facts.ip else node.port) == known
        noted = node.observed_at or node.intended_at
        boots_still = facts.status == "booting" and now - noted >= BOOTING_NOTED
        if same and not boots_still:
            return None
        return e.node_stream(node.key), e.NodeObserved(
            at=now,
            status=facts.status,
            ip=facts.ip,
            port=facts.port,
            user=facts.user,
            private_ip=facts.private_ip,
            micro_usd_per_hour=facts.micro_usd_per_hour or None,
            not_before=max(node.intended_at, before) if before else None,
        )

    @perform.register
    def _(self, effect: w.Confirm, run: RunRecord) -> None:
        node = run.node(effect.key)
        assert node is not None and node.id is not None
        self.sight.confirmed_at[effect.key] = self.clock.now()
        try:
            facts = self.provider.find(node.id)
        except ProviderError as error:
            self.sight.complaint = str(error)
            return
        now, stream = self.clock.now(), e.node_stream(node.key)
        if facts is None:
            # One that was never seen may only be too new to be known: a young "not found" proves nothing.
            young = (now - node.intended_at).total_seconds() < self.provider.traits.look_seconds
            if not (young and node.status is None):
                self.commit((stream, e.NodeGone(at=now, evidence="not found")))
        elif facts.status in ENDED:
            self.commit((stream, e.NodeGone(at=now, evidence=f"reported as {facts.status}")))
        else:
            self.sight.absent[effect.key] = ()
            observed = self._observed(node, facts, self.sight.inventory.at if self.sight.inventory else None)
            if observed is not None:
                self.commit(observed)

    # -------------------------------------------------------- renting

    @perform.register
    def _(self, effect: w.BeginAttempt, run: RunRecord) -> None:
        self.commit(*self._begun(effect, effect.keys))

    def _begun(self, effect: w.BeginAttempt | w.Claim, keys: tuple[str, ...]) -> list[tuple[str, e.RunEvent]]:
        now, stream = self.clock.now(), e.run_stream(self.run)
        started = e.AttemptStarted(
            at=now,
            attempt=effect.attempt,
            keys=keys,
            from_step=effect.from_step,
            world_size=effect.world_size,
        )
        return [
            (stream, e.OfferChosen(at=now, attempt=effect.attempt, offer=effect.offer)),
            (stream, started),
        ]

    @perform.register
    def _(self, effect: w.Claim, run: RunRecord) -> None:
        assert run.on_node is not None
        claimed = e.NodeClaimed(
            at=self.clock.now(), run=run.run, attempt=effect.attempt, former=run.on_node.run
        )
        try:
            self.commit(*self._begun(effect, (effect.key,)), (e.node_stream(effect.key), claimed))
        except NotYours as error:
            self.sight.claim_refused = str(error)

    @perform.register
    def _(self, effect: w.Launch, run: RunRecord) -> None:
        lease = lease_minutes(effect.lease_end)
        marker = Marker(run=run.run, attempt=effect.attempt, index=effect.index, lease_end=lease)
        stream = e.node_stream(marker.key)
        request = self.request(marker, effect.offer)
        self.commit(
            (
                stream,
                e.LaunchIntended(
                    at=self.clock.now(),
                    key=marker.key,
                    run=run.run,
                    provider=self.provider.name,
                    marker=marker,
                    offer=effect.offer,
                ),
            )
        )
        outcome: e.NodeEvent
        try:
            node_id = self.provider.launch(request)
        except (Refused, CredentialsError, InvalidHardware) as error:
            sold_out = isinstance(error, NoCapacity)
            outcome = e.LaunchRefused(
                at=self.clock.now(), code=error.code, message=str(error), capacity=sold_out
            )
        except ProviderError as error:
            outcome = e.LaunchAmbiguous(at=self.clock.now(), message=f"{error.code}: {error}")
        else:
            outcome = e.LaunchAnswered(at=self.clock.now(), id=node_id)
        self.commit((stream, outcome))

    @perform.register
    def _(self, effect: w.Adopt, run: RunRecord) -> None:
        self.commit((e.node_stream(effect.key), e.LaunchFound(at=self.clock.now(), id=effect.node_id)))
        node = self.store.node(effect.key)
        assert node is not None and self.sight.inventory is not None
        found = self.sight.inventory.find(effect.key, effect.node_id)
        observed = self._observed(node, found, self.sight.previous_at)
        if observed is not None:
            self.commit(observed)

    @perform.register
    def _(self, effect: w.Abandon, run: RunRecord) -> None:
        self.commit((e.node_stream(effect.key), e.LaunchAbandoned(at=self.clock.now())))

    @perform.register
    def _(self, effect: w.DeclareGone, run: RunRecord) -> None:
        self.commit((e.node_stream(effect.key), e.NodeGone(at=self.clock.now(), evidence=effect.evidence)))

    # -------------------------------------------------------- letting go

    @perform.register
    def _(self, effect: w.Terminate, run: RunRecord) -> None:
        terminate(
            self.store, self.provider, self.clock, effect.key, effect.reason, run=self.run, epoch=self.epoch
        )

    @perform.register
    def _(self, effect: w.Keep, run: RunRecord) -> None:
        self.commit((e.node_stream(effect.key), e.NodeKept(at=self.clock.now(), until=effect.until)))

    @perform.register
    def _(self, effect: w.ExtendLease, run: RunRecord) -> None:
        node = run.node(effect.key)
        assert node is not None and node.id is not None
        self.sight.lease_tried_at[effect.key] = self.clock.now()
        marker = node.marker.model_copy(update={"lease_end": lease_minutes(effect.until)})
        try:
            self.provider.extend(node.id, marker)
        except ProviderError as error:
            self.sight.complaint = str(error)
            return
        self.commit((e.node_stream(node.key), e.LeaseExtended(at=self.clock.now(), marker=marker)))

    # -------------------------------------------------------- on the node

    @perform.register
    def _(self, effect: w.Prepare, run: RunRecord) -> None:
        self.site.prepare(run, effect.key)

    @perform.register
    def _(self, effect: w.StartTrainer, run: RunRecord) -> None:
        assert run.attempt is not None
        started = e.TrainerStarted(
            at=self.clock.now(), attempt=run.attempt.number, token=effect.token, deadline=effect.deadline
        )
        self.commit((e.run_stream(run.run), started))
        self.site.start(run, effect.token, effect.deadline)

    @perform.register
    def _(self, effect: w.StopTrainer, run: RunRecord) -> None:
        self.sight.stop_asked = (self.clock.now(), effect.checkpoint)
        self.site.stop(run, checkpoint=effect.checkpoint)

    @perform.register
    def _(self, effect: w.Collect, run: RunRecord) -> None:
        self.site.collect(run, effect.steps, weights_only=effect.weights_only)

    # -------------------------------------------------------- verdicts

    @perform.register
    def _(self, effect: w.RequestStop, run: RunRecord) -> None:
        self.commit((e.run_stream(run.run), e.StopRequested(at=self.clock.now(), reason=effect.reason)))

    @perform.register
    def _(self, effect: w.EndAttempt, run: RunRecord) -> None:
        assert run.attempt is not None
        ended = e.AttemptEnded(at=self.clock.now(), attempt=run.attempt.number, reason=effect.reason)
        self.commit((e.run_stream(run.run), ended))

    @perform.register
    def _(self, effect: w.EndRun, run: RunRecord) -> None:
        ended = e.RunEnded(at=self.clock.now(), outcome=effect.outcome, reason=effect.reason)
        self.commit((e.run_stream(run.run), ended))


def terminate(
    store: Store,
    provider: Provider,
    clock: Clock,
    key: str,
    reason: str,
    *,
    run: str,
    epoch: int | None = None,
) -> None:
    """End one node of `run`: intent, call, answer. What it means is read from the provider later. Also the hand of `reap`.

    Raises NotYours, and calls nobody, where another run has claimed the node.
    """
    stream = e.node_stream(key)
    node = store.node(key)
    assert node is not None and node.id is not None
    store.commit([(stream, e.TerminateIntended(at=clock.now(), reason=reason))], epoch=epoch, run=run)
    try:
        provider.terminate(node.id)
    except ProviderError as error:
        answer = e.TerminateAnswered(at=clock.now(), accepted=False, message=f"{error.code}: {error}")
    else:
        answer = e.TerminateAnswered(at=clock.now(), accepted=True)
    store.commit([(stream, answer)], epoch=epoch, run=run)


def terminate_foreign(provider: Provider, node_id: str) -> str | None:
    """Ask for the end of a node that this store does not know (`reap`); why that was not accepted, or None."""
    try:
        provider.terminate(node_id)
    except ProviderError as error:
        return f"{error.code}: {error}"
    return None


def plain(value: Any) -> Any:
    """Effects and offers as plain JSON values, for --dry-run and logs."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return {"effect": type(value).__name__, **{name: plain(item) for name, item in asdict(value).items()}}
    if isinstance(value, Offer):
        return value.model_dump(mode="json")
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
