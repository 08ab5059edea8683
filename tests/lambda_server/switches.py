"""Everything about the server that a test may change, also while it runs. Durations are virtual seconds: `pace` real
ones each. Every switch that makes a belief of llmctl false is named in docs/assumptions.md.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Fault(BaseModel):
    """What happens to the next `times` requests whose `METHOD /path` contains `match`.

    refuse       `status` (and `code`, or a body that is not JSON), without any effect
    lie          the same answer, but the effect has happened
    lose-request the connection ends before anything happened
    lose-answer  the effect happens, the connection ends without an answer
    garbage      the effect happens, the answer is a 200 that is not JSON
    empty        the effect happens, the answer is a 200 with nothing in it
    """

    model_config = ConfigDict(extra="forbid")

    match: str
    kind: Literal["refuse", "lie", "lose-request", "lose-answer", "garbage", "empty"]
    times: int = 1
    status: int = 500
    code: str | None = "global/internal-error"
    """None: a body that is not JSON, as gateways send."""
    retry_after: str | None = None


class Switches(BaseModel):
    """The defaults are a well-behaved cloud."""

    model_config = ConfigDict(extra="forbid")

    pace: float = 1.0
    """Real seconds in a virtual one. Billing alone is always in real minutes."""

    rate_limits: bool = True
    request_interval: float = 1.0
    launch_interval: float = 12.0
    account: Literal["ok", "inactive", "bad-address", "forbidden", "quota"] = "ok"
    faults: list[Fault] = []

    capacity: dict[str, list[str]] = {}
    """Regions with capacity by type, instead of the catalogue's."""
    capacity_after: float = 0.0
    """Until this many seconds after the start (or the last change of this switch) everything is sold out."""
    ghost_capacity: list[str] = []
    """`type/region` that the list shows and a launch is refused."""

    boot_seconds: float = 20.0
    boot_ends_as: Literal["active", "unhealthy", "terminated", "preempted"] = "active"
    die_after: float | None = None
    """Seconds after `active` at which an instance dies by itself …"""
    die_as: Literal["terminated", "unhealthy", "preempted", "vanished"] = "terminated"
    """… and what is seen of it then. An unhealthy one goes on billing."""
    terminate_unavailable_seconds: float = 0.0
    """How long after its launch an instance refuses to be terminated (vm-has-not-launched)."""
    terminating_seconds: float = 3.0
    terminate_lies: int = 0
    """So many terminates are answered as if accepted, and do nothing; −1: all."""

    list_lag: float = 0.0
    """The list shows the world as it was so long ago; so do single look-ups with `lookup_lag`."""
    lookup_lag: float = 0.0
    linger_seconds: float = 60.0
    """How long a terminated instance stays in the list, and can be looked up."""
    gone_status: Literal[400, 404] = 404
    """HTTP status for an id that does not exist."""

    echo_name: bool = True
    echo_tags: bool = True
    omit: list[str] = ["private_ip"]
    """Optional fields of an instance that are absent; `ip` always is while booting."""
    unknown_fields: bool = False
    status_names: dict[str, str] = {}
    """Other words for statuses, such as {"active": "running"}; against the document."""
    rename_ignored: bool = False
    unique_key_names: bool = False
    """A second SSH key of the same name is refused."""

    ssh: Literal["open", "never"] = "open"
    ssh_delay: float = 0.0
    """Between `active` and a listening SSH server."""
    user_data_ignored: bool = False
    """The image makes its own host key and no guard runs."""
    node_env: dict[str, str] = {}

    audit: Literal["ok", "forbidden"] = "ok"
    audit_lag: float = 0.0
    """How late the audit log shows an event."""
    audit_skew: float = 0.0
    """How far the audit log's clock is behind, in real seconds."""
    audit_actions: dict[str, str] = {"launch": "launched", "terminate": "terminated"}
    filesystems: list[str] = []
    """`name@region`"""

    def changed(self, changes: dict[str, Any]) -> Switches:
        """These switches with some of them changed. Raises ValidationError for one that does not exist."""
        return Switches.model_validate(self.model_dump() | changes)
