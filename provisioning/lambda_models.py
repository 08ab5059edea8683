"""What Lambda's API answers, as far as it matters here. Any field may be missing, and new ones may appear; secrets
(`jupyter_token`, `jupyter_url`, `private_key`) have no field, so they are in no value, no repr and no log.
"""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from provisioning.base import utc
from runs.facts import Marker, NodeFacts, NodeStatus, key_of

_OWN_KEY = re.compile(r"llmctl-(?P<owner>[A-Za-z0-9]+)(-[0-9a-f]{8})?")


class Tolerant(BaseModel):
    """Base of what Lambda answers: unknown fields are dropped, and a field that has a default takes it when its value
    is absent, null or of an unexpected shape."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @field_validator("*", mode="wrap")
    @classmethod
    def _default_for_nonsense(
        cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> object:
        try:
            return handler(value)
        except ValidationError:
            field = cls.model_fields[cast("str", info.field_name)]
            if field.is_required():
                raise
            default: object = field.get_default(call_default_factory=True)
            return default


class Region(Tolerant):
    """A region; its description is a place."""

    name: str = ""
    description: str = ""


class Specs(Tolerant):
    """What is in the machine."""

    vcpus: int = 0
    memory_gib: float = 0
    storage_gib: float = 0
    gpus: int = 0


class InstanceType(Tolerant):
    """A type; `price_cents_per_hour` is the whole machine's, None where Lambda names none."""

    name: str = ""
    description: str = ""
    gpu_description: str = ""
    price_cents_per_hour: float | None = None
    specs: Specs = Specs()

    @property
    def micro_usd_per_hour(self) -> int | None:
        """The price as the rest of the program counts it."""
        return None if self.price_cents_per_hour is None else round(self.price_cents_per_hour * 10_000)


class TypeItem(Tolerant):
    """One entry of `GET /instance-types`."""

    instance_type: InstanceType
    regions_with_capacity_available: list[Region] = []


class Availability(Tolerant):
    """Whether an action can be asked for now."""

    available: bool = True
    reason_code: str = ""


class Actions(Tolerant):
    """Of the actions only one matters here."""

    terminate: Availability = Availability()


class Tag(Tolerant):
    """A key and a value."""

    key: str = ""
    value: str = ""


class Instance(Tolerant):
    """One machine. Without an id there is nothing to hold on to: such an answer is not believed at all."""

    id: str
    name: str = ""
    ip: str | None = None
    private_ip: str | None = None
    status: str = "unknown"
    ssh_key_names: list[str] = []
    region: Region = Region()
    instance_type: InstanceType = InstanceType()
    actions: Actions = Actions()
    tags: list[Tag] = []


class SSHKey(Tolerant):
    """A registered public key."""

    id: str = ""
    name: str = ""
    public_key: str = ""


class Filesystem(Tolerant):
    """A shared filesystem: it bills whether or not it is mounted."""

    id: str = ""
    name: str = ""
    region: Region = Region()
    is_in_use: bool = False
    bytes_used: int | None = None


class AuditEvent(Tolerant):
    """One line of the account's audit log."""

    action: str = ""
    event_time: datetime | None = None
    resource_lrns: list[str] = []
    additional_details: dict[str, object] = {}

    def concerns(self, node_id: str) -> bool:
        """Whether the event is about that instance."""
        lrn = f"lrn:cloud:instance:{node_id}"
        return lrn in self.resource_lrns or self.additional_details.get("instance_lrn") == lrn


class AuditLog(BaseModel):
    """The account's log from `start` on, as llmctl's processes share it."""

    start: datetime
    events: list[AuditEvent]


def filesystem_sentence(filesystem: Filesystem) -> str:
    """What a filesystem is and that it bills, for people."""
    size = "unknown size" if filesystem.bytes_used is None else f"{filesystem.bytes_used / 2**30:.1f} GiB"
    use = "mounted" if filesystem.is_in_use else "not mounted anywhere"
    return f"Lambda filesystem {filesystem.name} in {filesystem.region.name}: {size}, {use}, bills until it is deleted in the console"


def node_facts(instance: Instance) -> NodeFacts:
    """One instance as the rest of the program sees it. The intent comes from the tag or, without it, from the name; the
    lease from the name, which `extend` keeps up to date, or else from the tag."""
    tags = {tag.key: tag.value for tag in instance.tags}
    key = key_of(tags.get("llmctl-intent", "")) or key_of(instance.name)
    marker = _marker(instance.name)
    lease_end = marker.lease_end if marker and marker.key == key else _time(tags.get("llmctl-lease"))
    key_owner = next(
        (match["owner"] for name in instance.ssh_key_names if (match := _OWN_KEY.fullmatch(name))), None
    )
    status = instance.status if instance.status in get_args(NodeStatus) else "unknown"
    return NodeFacts(
        id=instance.id,
        name=instance.name,
        status=cast("NodeStatus", status),
        provider="lambda",
        ip=instance.ip,
        port=_ssh_port(instance.id),
        private_ip=instance.private_ip,
        region=instance.region.name,
        instance_type=instance.instance_type.name,
        micro_usd_per_hour=instance.instance_type.micro_usd_per_hour or 0,
        key=key,
        owner=tags.get("llmctl-owner") or key_owner,
        lease_end=lease_end,
        terminate_available=instance.actions.terminate.available,
    )


def _marker(name: str) -> Marker | None:
    try:
        return Marker.parse(name)
    except (ValueError, OverflowError, OSError):
        return None


def _time(text: str | None) -> datetime | None:
    try:
        return utc(int(text)) if text else None
    except (ValueError, OverflowError, OSError):
        return None


def _ssh_port(node_id: str) -> int:
    """22, always. Tests cannot bind it, so their server writes `{id: port}` to the file LLMCTL_TEST_SSH_PORTS."""
    path = os.environ.get("LLMCTL_TEST_SSH_PORTS")
    if not path:
        return 22
    return int(json.loads(Path(path).read_text(encoding="utf-8")).get(node_id, 22))
