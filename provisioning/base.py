"""The one door to machines: the Provider protocol, and the errors it may raise.

ProviderError                 what happened, why, what to do now; exit_code
├── CredentialsError          4: no key, a refused one, an inactive account
├── Refused                   the provider said no: `code`; nothing was launched
│   └── NoCapacity            5: sold out there, try another offer
├── Ambiguous                 an effect whose outcome is unknown (time-out, reset, 5xx, 429): look before trying again
├── Unavailable               6: a read that failed after its retries; nothing was changed
└── InvalidHardware           3: the spec's hardware section cannot be served
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from runs.facts import BillingEvidence, Inventory, Marker, NodeFacts, Offer


class ProviderError(Exception):
    """Base: `code` is the provider's own code, `hint` the next step."""

    exit_code = 1

    def __init__(self, message: str, *, code: str = "provider", hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class CredentialsError(ProviderError):
    """The provider does not know this account, or does not let it do this."""

    exit_code = 4


class Refused(ProviderError):
    """The provider answered no; nothing was launched or changed."""

    exit_code = 5


class NoCapacity(Refused):
    """Sold out: another region or type may still have it."""


class Ambiguous(ProviderError):
    """Nobody knows whether it happened. Never sent again before the inventory was read."""

    exit_code = 6


class Unavailable(ProviderError):
    """A read failed after its bounded retries; nothing was changed."""

    exit_code = 6


class InvalidHardware(ProviderError):
    """The hardware section names something this provider cannot serve."""

    exit_code = 3


@dataclass(frozen=True)
class Traits:
    """What differs between providers and matters to decisions, as data."""

    looks: int = 3
    """Inventories without it before an intent without an outcome is abandoned, or a known node is believed gone."""
    look_seconds: float = 60
    """… and the wall time that they must span."""
    rented: bool = True
    """Money flows to someone else while a node lives."""
    boot_poll_seconds: float = 10
    terminate_poll_seconds: float = 5
    capacity_poll_seconds: float = 60
    watch_seconds: float = 60
    """Between looks at a node that does its work."""
    retry_seconds: float = 5
    """Before the second try of something that failed; twice as long before each further one, up to a minute."""
    unreachable_seconds: float = 1200
    """A node that its provider calls active and that does not answer for this long is dead."""
    lease_on_node: bool = False
    """The node ends itself when its lease ends, without this machine."""
    host_key: str = "injected"
    """Where the spec does not say: `injected` (made here and pinned before the node exists) or `accept-new`."""
    tells_capacity: bool = False
    """Offers say what is free at the moment, of everything that there is, in one exchange."""
    cache: str | None = None
    """A folder on the node that outlives it: shards and environments are kept there."""
    risk: str = ""
    """What something that the spec switches on risks, for the plan to say."""
    price_moves: bool = False
    """What a living node costs an hour may change, and the last figure holds for its whole life; else the one of its start does."""
    audited: bool = False
    """The provider keeps a log that may say when a node began and ended: it is `Audited`."""
    own_login: bool = False
    """The user's own machine: without an identity_file the user's usual keys may log in."""

    @property
    def unguarded(self) -> bool:
        """It costs money, and nothing but this machine (or `reap` elsewhere) ends it."""
        return self.rented and not self.lease_on_node


@dataclass(frozen=True)
class LaunchRequest:
    """All that a provider needs to start one node. Made from the spec before anything is rented."""

    marker: Marker
    offer: Offer
    owner: str
    """Random id of this LLMCTL_HOME."""
    public_key: str
    """OpenSSH public key that may log in."""
    host_private_key: str | None = field(repr=False)
    """ed25519 host key (OpenSSH format) that the node shall use; None: accept what it has (host_key: accept-new)."""
    host_public_key: str | None
    options: dict[str, object] = field(default_factory=dict)
    """The spec's hardware section as plain values (image, filesystem, subnet, identity_file …)."""

    def tags(self) -> dict[str, str]:
        """`llmctl-intent`, `llmctl-owner`, `llmctl-lease`."""
        lease = str(int(self.marker.lease_end.timestamp()))
        return {"llmctl-intent": self.marker.key, "llmctl-owner": self.owner, "llmctl-lease": lease}


@dataclass(frozen=True)
class Check:
    """One line of `doctor`."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


@runtime_checkable
class Provider(Protocol):
    """Where nodes come from. Every method is one bounded exchange; none waits for a node to change its state."""

    name: str
    traits: Traits

    def offers(self, hardware: dict[str, object]) -> list[Offer]:
        """Every offer that fits the hardware section (`gpu`/`instance_type`, `regions`, `max_usd_per_hour`), in order of
        preference; sold-out ones with `available=False`. An empty section: everything the provider has."""

    def launch(self, request: LaunchRequest) -> str:
        """Start one node and return its id. Raises Refused, NoCapacity (nothing was launched), CredentialsError, Ambiguous."""

    def redacted(self, request: LaunchRequest) -> dict[str, object]:
        """The exact request that `launch` would send, with secrets replaced; for --dry-run."""

    def inventory(self) -> Inventory:
        """Every machine of this account, ours or not. Raises Unavailable or CredentialsError; never returns a guess."""

    def find(self, node_id: str) -> NodeFacts | None:
        """One machine by id; None where the provider says that it does not exist (any more). Raises Unavailable."""

    def terminate(self, node_id: str) -> None:
        """Ask for the end of a node. Returning means that the request was accepted, not that the node is gone.
        A node that is gone already is a success. Raises Ambiguous, Refused, CredentialsError."""

    def extend(self, node_id: str, marker: Marker) -> None:
        """Make the provider's own note of the lease (name, tags, timer) that of `marker`."""

    def check(self) -> Sequence[Check]:
        """What `doctor` shows for this provider."""

    def leftovers(self) -> Sequence[str]:
        """Other things that bill (volumes, filesystems, requests), one sentence each; for `reap`."""


@runtime_checkable
class Audited(Protocol):
    """A provider whose `traits.audited` holds."""

    def billing_evidence(self, node_id: str, since: datetime) -> BillingEvidence:
        """What the provider's own log says of a node's life. Raises CredentialsError where this account may not read it, Unavailable."""


@dataclass(frozen=True)
class Home:
    """What a provider may know of this machine."""

    path: Path
    """LLMCTL_HOME."""
    owner: str
    """Its random id."""
    sleep: Callable[[float], None] = time.sleep
    """How a provider waits for its turn: whoever is waited for may want to show meanwhile that it lives."""


class ProviderFactory(Protocol):
    """`provisioning.open_provider`'s registry holds one of these a provider."""

    def __call__(self, home: Home, hardware: dict[str, object]) -> Provider: ...


def texts(hardware: Mapping[str, object], name: str) -> list[str]:
    """A value of the hardware section that may be a text or a list of texts, as a list."""
    value = hardware.get(name)
    if value is None or value == "":
        return []
    return (
        [str(item) for item in value]
        if isinstance(value, Sequence) and not isinstance(value, str)
        else [str(value)]
    )


def number(hardware: Mapping[str, object], name: str) -> float | None:
    """A number of the hardware section, or None."""
    value = hardware.get(name)
    return float(value) if isinstance(value, (int, float)) else None


def utc(timestamp: float) -> datetime:
    """A POSIX timestamp as an aware datetime."""
    from datetime import UTC

    return datetime.fromtimestamp(timestamp, UTC)
