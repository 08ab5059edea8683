"""Kept nodes: which one a word means, and whether a run may take it over. Rents nothing, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.errors import Invalid, NoOffer, Usage
from runs.facts import ENDED
from runs.store import Store, utcnow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provisioning.base import Provider
    from runs.facts import Offer
    from runs.record import NodeRecord
    from runs.sections import RunSpec


def find(store: Store, word: str) -> NodeRecord:
    """The kept node that `word` names: its key, its name, its id, or the run that keeps it.

    Raises Usage where nothing is called so, NoOffer where it is gone, busy, or kept no longer.
    """
    nodes = store.nodes()
    named = [node for node in nodes if word in {node.key, node.marker.name, node.id}]
    if not named:
        try:
            run = store.find(word)
        except LookupError as error:
            raise Usage(f"{word!r} may be any of {error}", "write more of it") from None
        named = [node for node in nodes if node.run == run]
        if not named:
            kept = ", ".join(node.key for node in nodes if node.kept)
            raise Usage(
                f"no node is called {word!r}, and no run of that name has one",
                f"kept now: {kept}" if kept else "a run with node.on_finish: keep leaves its node",
            )
    node = next((node for node in named if node.kept), named[-1])
    reason = unavailable(store, node)
    if reason is not None:
        raise NoOffer(reason, "`llmctl launch` without --on rents another one", run=node.run, code="no-node")
    return node


def unavailable(store: Store, node: NodeRecord) -> str | None:
    """Why a node of this store cannot be taken over now, or None."""
    if node.settled:
        return f"{node.key} is gone ({node.gone_evidence or node.answer})"
    if node.terminate_intended_at is not None:
        return f"{node.key} is being ended"
    row = store.summary(node.run)
    if not node.kept or row is None or row["outcome"] is None:
        return f"{node.key} is busy: {node.run} is {row['state'] if row else 'unknown'}"
    if node.kept_until is not None and utcnow() >= node.kept_until:
        return f"{node.key} was kept until {node.kept_until:%Y-%m-%d %H:%M} UTC, and is being ended"
    record = store.record(node.run)
    if record is not None and not record.keeps(node):
        return f"{node.key} is being released, as `llmctl stop {node.run}` asked"
    return None


def check(provider: Provider, spec: RunSpec, node: NodeRecord, offers: Sequence[Offer]) -> None:
    """Raise Invalid where the node is not what the spec asks for, NoOffer where its provider has it no more."""
    if spec.hardware.nodes > 1:
        raise Invalid(
            f"the spec asks for {spec.hardware.nodes} nodes, and --on gives it one",
            "set hardware.nodes to 1, or launch without --on",
        )
    kinds = dict.fromkeys(offer.instance_type for offer in offers)
    if node.provider != spec.hardware.provider or node.offer.instance_type not in kinds:
        wanted = f"{spec.hardware.provider}: {', '.join(kinds) or 'nothing that there is'}"
        raise Invalid(
            f"{node.key} is {node.provider}: {node.offer.instance_type}; the spec's hardware section asks for {wanted}",
            "change the hardware section, or launch without --on",
        )
    facts = provider.find(node.id) if node.id is not None else None
    if facts is None or facts.status in ENDED:
        raise NoOffer(
            f"{node.provider} has {node.key} no more",
            f"`llmctl stop {node.run}` notes that; `llmctl launch` without --on rents another one",
            run=node.run,
            code="no-node",
        )
