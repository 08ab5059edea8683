"""Frozen values that cross the floors: what can be rented, at what price, under which name, and what is there.

Money is integer micro-dollars (`micro_usd`), time is timezone-aware UTC.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict

from runs.rows import MICRO

_DIGITS = string.digits + string.ascii_lowercase
_KEY = re.compile(
    r"(?P<key>llmctl-(?P<run>[a-z0-9-]+-[a-z0-9]{4})-a(?P<attempt>\d+)-n(?P<index>\d+))(?:-t(?P<lease>[0-9a-z]+))?"
)

NodeStatus = Literal["booting", "active", "unhealthy", "terminating", "terminated", "preempted", "unknown"]
ENDED: frozenset[str] = frozenset({"terminated", "preempted"})
"""Node statuses in which nothing is left to terminate."""
RUNNING: frozenset[str] = frozenset({"active", "unhealthy"})
"""Node statuses that bill, and of which no end is under way."""


class Fact(BaseModel):
    """Base of the frozen values."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class Tariff(Fact):
    """A price and how it is counted."""

    micro_usd_per_hour: int
    granularity_seconds: int = 1
    """Billed time is rounded up to whole multiples of this."""
    minimum_seconds: int = 0
    """The least that is billed once billing has begun."""
    estimated: bool = False
    """The price comes from a dated list, not from the provider just now."""


class Offer(Fact):
    """An instance type in a region at a price."""

    provider: str
    instance_type: str
    region: str
    gpu: str | None
    """Key of the GPU table (`H100-80GB`); the provider's own description where the table has no such GPU; None without GPUs."""
    gpus: int
    tariff: Tariff
    vcpus: int = 0
    memory_gib: float = 0
    storage_gib: float = 0
    available: bool = True
    description: str = ""
    options: dict[str, str] = {}
    """What the provider needs to launch it again (zone, market, image …), opaque to everyone else."""

    @property
    def usd_per_hour(self) -> float:
        """Dollars per node-hour."""
        return self.tariff.micro_usd_per_hour / MICRO


class Marker(Fact):
    """The unique name of one intended node: `llmctl-RUN-aA-nN-tLEASE` (attempt, node, lease end in base-36 minutes)."""

    run: str
    attempt: int
    index: int
    lease_end: datetime

    @property
    def key(self) -> str:
        """What stays when `extend` renames the node; the value of the tag `llmctl-intent`."""
        return f"llmctl-{self.run}-a{self.attempt}-n{self.index}"

    @property
    def name(self) -> str:
        """The instance's name at the provider."""
        return f"{self.key}-t{base36(int(self.lease_end.timestamp()) // 60)}"

    @classmethod
    def parse(cls, name: str) -> Marker | None:
        """The marker that `name` spells, or None where it is no marker of ours."""
        match = _KEY.fullmatch(name)
        if match is None or match["lease"] is None:
            return None
        lease = datetime.fromtimestamp(int(match["lease"], 36) * 60, UTC)
        return cls(
            run=match["run"], attempt=int(match["attempt"]), index=int(match["index"]), lease_end=lease
        )


def base36(number: int) -> str:
    """`number` in base 36, lower case."""
    text = ""
    while True:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
        if not number:
            return text


class NodeFacts(Fact):
    """One machine as its provider describes it now."""

    id: str
    name: str
    status: NodeStatus
    provider: str
    ip: str | None = None
    port: int = 22
    user: str = "ubuntu"
    private_ip: str | None = None
    region: str = ""
    instance_type: str = ""
    micro_usd_per_hour: int = 0
    key: str | None = None
    """The `llmctl-intent` that tag or name carries; None for a machine that llmctl did not launch."""
    owner: str | None = None
    """The tag `llmctl-owner`: the random id of the LLMCTL_HOME that launched it."""
    lease_end: datetime | None = None
    """From the name or the tag `llmctl-lease`."""
    terminate_available: bool = True


class BillingEvidence(Fact):
    """What a provider's own log says of a node's life; None for what it does not say."""

    source: str
    launched: datetime | None = None
    ended: datetime | None = None


class Inventory(Fact):
    """One believable look at everything a provider has for this account."""

    at: datetime
    """When the request was sent: what it does not show may have been launched later."""
    nodes: Sequence[NodeFacts]

    def find(self, key: str, node_id: str | None = None) -> NodeFacts | None:
        """The node of that intent, by its key or its id (a provider may lose names and tags); one that is not ended first."""
        mine = [
            node for node in self.nodes if node.key == key or (node_id is not None and node.id == node_id)
        ]
        return min(mine, key=lambda node: node.status in ENDED, default=None)


def lease_minutes(end: datetime) -> datetime:
    """`end` rounded up to the whole minute that a marker's name can carry."""
    return end.replace(second=0, microsecond=0) + timedelta(minutes=1 if end.second or end.microsecond else 0)


def key_of(name: str) -> str | None:
    """The intent key in an instance's name, or None."""
    match = _KEY.fullmatch(name)
    return match["key"] if match else None


def run_of(key: str) -> str:
    """The run of an intent key."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is not the key of a node")
    return match["run"]
