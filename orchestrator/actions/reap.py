"""`reap`: from any machine, the nodes that nobody answers for. Which they are is pure (`orphan`); ending them goes through
`effects`, and is believed when the provider shows it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from orchestrator import exits
from orchestrator.actions import inventory
from orchestrator.clock import Clock
from orchestrator.life import effects
from provisioning.base import CredentialsError, ProviderError
from runs import charges
from runs import events as e
from runs.facts import ENDED, NodeFacts
from runs.rows import MICRO, usd
from runs.store import NotYours, Store

if TYPE_CHECKING:
    from provisioning.base import Provider
    from runs.record import NodeRecord, RunRecord

_PACE = float(os.environ.get("LLMCTL_TEST_PACE", "1"))
CONFIRM_SECONDS = 180.0 * _PACE
"""How long an end is waited for; a node that withstands that is reported as unconfirmed."""
AGAIN_SECONDS = 45.0 * _PACE
"""The request is sent again so often meanwhile."""


@dataclass(frozen=True)
class Orphan:
    """A node that nobody answers for."""

    provider: str
    facts: NodeFacts
    why: str
    cost_usd: float | None = None
    """So far, as far as this store knows."""
    run: str | None = None
    """The run that answered for it when it was judged."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        facts = self.facts
        return {
            "provider": self.provider, "id": facts.id, "name": facts.name, "status": facts.status, "region": facts.region,
            "instance_type": facts.instance_type, "usd_per_hour": usd(facts.micro_usd_per_hour), "owner": facts.owner,
            "lease_end": facts.lease_end.isoformat() if facts.lease_end else None, "reason": self.why,
            "cost_usd": self.cost_usd,
        }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What `reap` sees, and what became of it."""

    nodes: tuple[Orphan, ...]
    leftovers: tuple[str, ...] = ()
    errors: dict[str, ProviderError] = field(default_factory=dict)
    terminated: tuple[Orphan, ...] = ()
    unconfirmed: tuple[Orphan, ...] = ()

    @property
    def exit_code(self) -> int:
        """8 where an end is not confirmed, or where nobody can look at a provider that has nodes; else what failed."""
        if self.unconfirmed:
            return exits.MAY_BILL
        if any(isinstance(error, CredentialsError) for error in self.errors.values()):
            return exits.CREDENTIALS
        return exits.UNREACHABLE if self.errors else exits.OK

    @property
    def question(self) -> str:
        """What is asked before anything is ended."""
        count = len(self.nodes)
        return f"End {'this node' if count == 1 else f'these {count} nodes'}?"

    def document(self) -> dict[str, Any]:
        """`reap --json`."""
        return {
            "found": [item.document() for item in self.nodes],
            "terminated": [item.document() for item in self.terminated],
            "unconfirmed": [item.document() for item in self.unconfirmed],
            "leftovers": list(self.leftovers),
            "errors": {name: str(error) for name, error in self.errors.items()},
        }


def orphan(
    facts: NodeFacts,
    owner: str,
    now: datetime,
    run: RunRecord | None,
    node: NodeRecord | None,
    *,
    foreign: bool,
) -> str | None:
    """Why a node should be ended, or None. Pure.

    Of this owner: a node that no live run has and that is not kept on purpose, or whose end its run asks for in vain. Of anyone: an
    llmctl node past its lease.
    With `foreign` also unexpired nodes of other owners. A machine that is not llmctl's is nobody's business.
    """
    if facts.status in ENDED or (facts.key is None and facts.owner != owner and node is None):
        return None
    mine = facts.owner == owner or node is not None
    if mine and run is not None and run.live and node is not None and not node.settled:
        return "its end is asked for, and not confirmed" if node.terminate_tries > 1 else None
    if facts.lease_end is not None and now >= facts.lease_end:
        return f"past its lease, which ended {facts.lease_end:%Y-%m-%d %H:%M} UTC"
    if mine:
        if node and run and run.keeps(node) and (node.kept_until is None or now < node.kept_until):
            return None
        return "no live run has it"
    return "of another owner" if foreign else None


def known(store: Store, facts: NodeFacts) -> NodeRecord | None:
    """What this store knows of a machine: by its key, or by its id where the provider has lost name and tags."""
    if facts.key is not None:
        return store.node(facts.key)
    return next((node for node in store.nodes(unsettled=True) if node.id == facts.id), None)


def find(store: Store, clock: Clock, *, foreign: bool) -> Found:
    """Ask every provider, and judge each node. The inventory is remembered for `status`."""
    now, nodes, leftovers = clock.now(), list[Orphan](), list[str]()
    errors: dict[str, ProviderError] = {}
    for seen in inventory.refresh(store):
        if seen.inventory is None:
            if seen.configured and seen.error is not None:
                errors[seen.name] = seen.error
            continue
        for facts in seen.inventory.nodes:
            node = known(store, facts)
            run = store.record(node.run) if node else None
            why = orphan(facts, store.owner, now, run, node, foreign=foreign)
            if why is not None:
                bill = charges.node_bill(node, now) if node else None
                nodes.append(
                    Orphan(
                        seen.name,
                        facts,
                        why,
                        bill.micro_usd / MICRO if bill else None,
                        node.run if node else None,
                    )
                )
        try:
            assert seen.provider is not None
            leftovers += seen.provider.leftovers()
        except ProviderError as error:
            errors[seen.name] = error
    return Found(tuple(nodes), tuple(leftovers), errors)


def end(store: Store, clock: Clock, found: Found, *, patience: float = CONFIRM_SECONDS) -> Found:
    """Terminate all that was found and wait, within bounds, until the providers confirm it."""
    opened = {name: item for name, item in inventory.open_all(store) if not isinstance(item, ProviderError)}
    mine = [item for item in found.nodes if _terminate(store, opened[item.provider], clock, item)]
    waiting = {item.facts.id: item for item in mine}
    started = asked = clock.monotonic()
    gone: list[Orphan] = []
    never = threading.Event()
    while waiting:
        ended = [item for item in waiting.values() if _gone(store, opened[item.provider], clock, item)]
        gone += [waiting.pop(item.facts.id) for item in ended]
        left = started + patience - clock.monotonic()
        if not waiting or left <= 0:
            break
        if clock.monotonic() - asked >= AGAIN_SECONDS:
            asked = clock.monotonic()
            for item in waiting.values():
                _terminate(store, opened[item.provider], clock, item)
        clock.wait(never, min(left, _poll([opened[item.provider] for item in waiting.values()])))
    return Found(tuple(mine), found.leftovers, found.errors, tuple(gone), tuple(waiting.values()))


def _poll(providers: Sequence[Provider]) -> float:
    return min(provider.traits.terminate_poll_seconds for provider in providers)


def _terminate(store: Store, provider: Provider, clock: Clock, item: Orphan) -> bool:
    """Ask for the end of one node; of one that this store knows with intent and answer as events. False, and nobody is
    asked, where a run took it over since it was judged: it answers for it now."""
    node = known(store, item.facts)
    if node is None:
        effects.terminate_foreign(provider, item.facts.id)
        return True
    lost = node.id != item.facts.id or node.settled
    found = (e.node_stream(node.key), e.LaunchFound(at=clock.now(), id=item.facts.id))
    told, run = [found] if lost else [], item.run or node.run
    try:
        effects.terminate(store, provider, clock, node.key, "reaped", run=run, told=told)
    except NotYours:
        return False
    return True


def _gone(store: Store, provider: Provider, clock: Clock, item: Orphan) -> bool:
    """Whether the provider says that it is gone."""
    try:
        facts = provider.find(item.facts.id)
    except ProviderError:
        return False
    if facts is not None and facts.status not in ENDED:
        return False
    node = known(store, item.facts)
    if node is not None and node.gone_at is None:
        evidence = "not found" if facts is None else f"reported as {facts.status}"
        store.commit([(e.node_stream(node.key), e.NodeGone(at=clock.now(), evidence=evidence))])
    return True
