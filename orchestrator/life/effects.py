"""The hands of the driver: each effect of `life.decide`, done. Intent before effect, outcome after.

This is the only module that calls a provider's launch and terminate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import singledispatchmethod

from orchestrator.clock import Clock
from orchestrator.life import terms, vigil
from orchestrator.life import world as w
from orchestrator.life.sight import Sight, Site
from provisioning.base import (
    Audited,
    CredentialsError,
    InvalidHardware,
    LaunchRequest,
    NoCapacity,
    Provider,
    ProviderError,
    Refused,
)
from provisioning.keys import KeyFileError
from runs import charges
from runs import events as e
from runs.facts import ENDED, RUNNING, Marker, NodeFacts, Offer, lease_minutes
from runs.record import LATE, NodeRecord, RunRecord
from runs.store import NotYours, Store

BOOTING_NOTED = timedelta(seconds=30)
"""How often it is noted that a node still boots: billing begins later than that, whoever sees it active."""


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
            sight.ask(self.provider, terms.hardware(run.spec))
            sight.complaint = None
        except (CredentialsError, InvalidHardware) as error:
            sight.offers_error = f"{error.code}: {_advised(error)}"
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
        for node in (*run.owned, *self.given_up(run)):
            found = inventory.find(node.key, node.id)
            observed = (
                self._observed(node, found, sight.previous_at, inventory.at)
                if node.answer == "known"
                else None
            )
            if observed is not None:
                self._note(node, observed)

    def given_up(self, run: RunRecord) -> tuple[NodeRecord, ...]:
        """Launches that other runs of this home gave up and that are still watched for."""
        since = self.clock.now() - vigil.ABANDONED_WATCH
        return self.store.given_up(self.provider.name, since, beside=run.run)

    def _note(self, node: NodeRecord, change: tuple[str, e.NodeEvent]) -> None:
        """Commit what was learnt of a node: as this epoch, unless it is one that another run gave up, which no driver answers for."""
        self.store.commit([change], epoch=self.epoch if node.run == self.run else None, run=node.run)

    def _node(self, run: RunRecord, key: str) -> NodeRecord:
        node = run.node(key) or self.store.node(key)
        assert node is not None
        return node

    def _observed(
        self, node: NodeRecord, facts: NodeFacts | None, before: datetime | None, as_of: datetime
    ) -> tuple[str, e.NodeEvent] | None:
        """The event that `facts`, as of a moment, add to what is known of a node, if any; `before`: when it was last looked at."""
        if facts is None or node.gone_at is not None:
            return None
        known, now = (node.status, node.ip, node.port), self.clock.now()
        price = self._price(node, facts)
        same = (facts.status, facts.ip or node.ip, facts.port if facts.ip else node.port) == known
        noted = node.observed_at or node.intended_at
        boots_still = facts.status == "booting" and now - noted >= BOOTING_NOTED
        ending = node.terminate_accepted_at
        lingers = ending is not None and as_of > ending and facts.status in RUNNING
        if same and not boots_still and not price and not lingers:
            return None
        return e.node_stream(node.key), e.NodeObserved(
            at=now,
            status=facts.status,
            ip=facts.ip,
            port=facts.port,
            user=facts.user,
            private_ip=facts.private_ip,
            micro_usd_per_hour=price,
            not_before=max(node.intended_at, before) if before else None,
        )

    def _gone(self, node: NodeRecord, run: RunRecord, evidence: str) -> e.NodeGone:
        """That a node is no more, and when it was last known to be there: by an inventory, or by what it said itself."""
        told = [self.sight.seen_at[node.key]] if node.key in self.sight.seen_at else []
        if run.attempt is not None and node.key in run.attempt.keys and run.intervals:
            told.append(datetime.fromtimestamp(run.intervals[-1][2], UTC))
        now = self.clock.now()
        return e.NodeGone(at=now, evidence=evidence, seen_at=min(now, max(told)) if told else None)

    def _price(self, node: NodeRecord, facts: NodeFacts) -> int | None:
        """What a node costs an hour, where that is news: the figure of its start, or one that has moved by a hundredth."""
        seen, known = facts.micro_usd_per_hour, node.micro_usd_per_hour
        if not seen or known is None:
            return seen or None
        return seen if self.provider.traits.price_moves and abs(seen - known) * 100 >= known else None

    @perform.register
    def _(self, effect: w.Confirm, run: RunRecord) -> None:
        node = self._node(run, effect.key)
        assert node.id is not None
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
                self._note(node, (stream, self._gone(node, run, "not found")))
        elif facts.status in ENDED:
            if self._price(node, facts) and (last := self._observed(node, facts, None, now)):
                self._note(node, last)
            self._note(node, (stream, self._gone(node, run, f"reported as {facts.status}")))
        else:
            self.sight.absent[effect.key], self.sight.seen_at[effect.key] = (), now
            before = self.sight.inventory.at if self.sight.inventory else None
            observed = self._observed(node, facts, before, now)
            if observed is not None:
                self._note(node, observed)

    @perform.register
    def _(self, effect: w.Reconcile, run: RunRecord) -> None:
        node = run.node(effect.key)
        assert node is not None and node.id is not None and isinstance(self.provider, Audited)
        now, times = self.clock.now(), self.sight.audits.get(effect.key, (None, 0))[1] + 1
        self.sight.audits[effect.key] = now, times
        try:
            said = self.provider.billing_evidence(node.id, node.intended_at - charges.DOUBT)
        except CredentialsError:
            self.sight.audits[effect.key] = now, vigil.MAX_AUDITS
            return
        except ProviderError as error:
            self.sight.complaint = str(error)
            return
        if said.ended is not None:
            told = e.BillingReconciled(
                at=now,
                source=said.source,
                launched=said.launched,
                ended=said.ended,
                contradiction=charges.contradiction(node, said),
            )
            self.commit((e.node_stream(effect.key), told))

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
                    unguarded=self.provider.traits.unguarded,
                ),
            )
        )
        outcome: e.NodeEvent
        try:
            request = self.request(marker, effect.offer)
            node_id = self.provider.launch(request)
        except (Refused, CredentialsError, InvalidHardware, KeyFileError) as error:
            sold_out = isinstance(error, NoCapacity)
            message = str(error) if sold_out else _advised(error)
            outcome = e.LaunchRefused(
                at=self.clock.now(), code=error.code, message=message, capacity=sold_out
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
        inventory = self.sight.inventory
        assert node is not None and inventory is not None
        found = inventory.find(effect.key, effect.node_id)
        observed = self._observed(node, found, self.sight.previous_at, inventory.at)
        if observed is not None:
            self.commit(observed)

    @perform.register
    def _(self, effect: w.Abandon, run: RunRecord) -> None:
        self.commit((e.node_stream(effect.key), e.LaunchAbandoned(at=self.clock.now())))

    @perform.register
    def _(self, effect: w.DeclareGone, run: RunRecord) -> None:
        node = self._node(run, effect.key)
        self._note(node, (e.node_stream(effect.key), self._gone(node, run, effect.evidence)))

    # -------------------------------------------------------- letting go

    @perform.register
    def _(self, effect: w.Terminate, run: RunRecord) -> None:
        node = self._node(run, effect.key)
        late = node.terminate_reason == LATE and node.run != self.run
        author, epoch = (node.run, None) if late else (self.run, self.epoch)
        terminate(self.store, self.provider, self.clock, effect.key, effect.reason, run=author, epoch=epoch)

    @perform.register
    def _(self, effect: w.EndLate, run: RunRecord) -> None:
        node = self._node(run, effect.key)
        if node.answer == "abandoned":  # no other driver was quicker
            inventory = self.sight.inventory
            assert inventory is not None
            facts = inventory.find(effect.key, effect.node_id)
            found = (e.node_stream(node.key), e.LaunchFound(at=self.clock.now(), id=effect.node_id))
            seen = [found, self._observed(node, facts, self.sight.previous_at, inventory.at)]
            told = [change for change in seen if change is not None]
            terminate(self.store, self.provider, self.clock, node.key, LATE, run=node.run, told=told)

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


def _advised(error: ProviderError | KeyFileError) -> str:
    """An error and its next step: what ends a run is read where nothing else tells."""
    return f"{error}; {error.hint}" if error.hint else str(error)


def terminate(
    store: Store,
    provider: Provider,
    clock: Clock,
    key: str,
    reason: str,
    *,
    run: str,
    epoch: int | None = None,
    told: Sequence[tuple[str, e.NodeEvent]] = (),
) -> None:
    """End one node of `run`: intent, call, answer. What it means is read from the provider later. Also the hand of `reap`. `told`:
    that it is there after all, noted together with the intent, so that whoever comes next knows both or neither.

    Raises NotYours, and calls nobody, where another run has claimed the node.
    """
    stream = e.node_stream(key)
    store.commit([*told, (stream, e.TerminateIntended(at=clock.now(), reason=reason))], epoch=epoch, run=run)
    node = store.node(key)
    assert node is not None and node.id is not None
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
