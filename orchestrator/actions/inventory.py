"""Asking every configured provider what is there, and remembering it for those who only look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.actions.show import INVENTORY
from provisioning import open_provider, provider_names
from provisioning.base import CredentialsError, Home, ProviderError
from runs.facts import ENDED, Inventory
from runs.store import Store, utcnow

if TYPE_CHECKING:
    from provisioning.base import Provider


NO_KEY = "no-key"
"""Code of the error of a provider for which there are no credentials at all."""


@dataclass(frozen=True)
class Seen:
    """A provider and what it has now, or why that is not known."""

    name: str
    provider: Provider | None
    inventory: Inventory | None
    error: ProviderError | None = None
    configured: bool = True
    """False: there are no credentials for it, which is no fault."""


def open_all(store: Store) -> Iterator[tuple[str, Provider | ProviderError]]:
    """Each provider, opened for listing and ending; or why it cannot be."""
    home = Home(store.home, store.owner)
    for name in provider_names():
        try:
            yield name, open_provider(name, home, {})
        except ProviderError as error:
            yield name, error
        except ModuleNotFoundError as error:
            hint = f"pip install 'llmctl[{_EXTRAS.get(name, name)}]'"
            yield (
                name,
                CredentialsError(
                    f"{name} needs {error.name}, which is not installed", code="no-extra", hint=hint
                ),
            )


_EXTRAS = {"ec2": "aws"}


def ask(store: Store) -> list[Seen]:
    """What every provider has. A provider without credentials is not configured; any other failure is reported."""
    used = {node.provider for node in store.nodes(unsettled=True)}
    result = []
    for name, opened in open_all(store):
        if isinstance(opened, ProviderError):
            missing = isinstance(opened, CredentialsError) and name not in used
            result.append(Seen(name, None, None, opened, configured=not missing))
            continue
        try:
            result.append(Seen(name, opened, opened.inventory()))
        except ProviderError as error:
            missing = isinstance(error, CredentialsError) and error.code == NO_KEY and name not in used
            result.append(Seen(name, opened, None, error, configured=not missing))
    return result


def refresh(store: Store) -> list[Seen]:
    """Ask, and remember. Of a provider that does not answer the last known nodes stay."""
    seen = ask(store)
    note = store.note(INVENTORY) or {"providers": {}}
    providers = dict(note["providers"])
    for item in seen:
        if item.inventory is not None:
            nodes = [
                node.model_dump(mode="json")
                for node in item.inventory.nodes
                if node.status not in ENDED and node.key
            ]
            providers[item.name] = {"at": item.inventory.at.isoformat(), "nodes": nodes}
    store.remember(INVENTORY, {"at": utcnow().isoformat(), "providers": providers})
    return seen
