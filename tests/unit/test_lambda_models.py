"""What is made of an instance, whatever of it comes back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from provisioning.lambda_models import AuditEvent, Instance, node_facts
from runs.facts import Marker

LEASE = datetime(2026, 11, 21, 6, 0, tzinfo=UTC)
MARKER = Marker(run="run-abcd", attempt=2, index=1, lease_end=LEASE)
TAGS = [
    {"key": "llmctl-intent", "value": MARKER.key},
    {"key": "llmctl-owner", "value": "0123abcd"},
    {"key": "llmctl-lease", "value": str(int(LEASE.timestamp()))},
]
FULL: dict[str, Any] = {
    "id": "0920582c7ff041399e34823a0be62549",
    "name": MARKER.name,
    "ip": "198.51.100.2",
    "status": "active",
    "ssh_key_names": ["llmctl-0123abcd"],
    "file_system_names": [],
    "region": {"name": "us-west-1", "description": "California, USA"},
    "instance_type": {
        "name": "gpu_8x_a100",
        "description": "8x A100 (40 GB SXM4)",
        "gpu_description": "A100 (40 GB SXM4)",
        "price_cents_per_hour": 1592,
        "specs": {"vcpus": 124, "memory_gib": 1800, "storage_gib": 6144, "gpus": 8},
    },
    "jupyter_token": "SECRET-TOKEN",
    "jupyter_url": "https://jupyter.lambdaspaces.com/?token=SECRET-TOKEN",
    "actions": {"terminate": {"available": False, "reason_code": "vm-has-not-launched"}},
    "tags": TAGS,
}


def facts(**changes: Any) -> Any:
    return node_facts(Instance.model_validate({k: v for k, v in (FULL | changes).items() if v != "absent"}))


def test_a_whole_instance() -> None:
    node = facts()
    assert (node.key, node.owner, node.lease_end) == (MARKER.key, "0123abcd", LEASE)
    assert (node.status, node.ip, node.port, node.user) == ("active", "198.51.100.2", 22, "ubuntu")
    assert (node.region, node.instance_type, node.micro_usd_per_hour) == (
        "us-west-1",
        "gpu_8x_a100",
        15_920_000,
    )
    assert not node.terminate_available


@pytest.mark.parametrize("name", [name for name in FULL if name != "id"])
@pytest.mark.parametrize("nonsense", ["absent", None, 7, ["x"], {"y": {}}])
def test_any_field_may_be_missing_or_odd(name: str, nonsense: Any) -> None:
    node = facts(**{name: nonsense})
    assert node.id == FULL["id"]
    # Name or tags suffice to know whose it is.
    assert node.key == MARKER.key
    assert node.owner == "0123abcd"


def test_without_an_id_nothing_is_believed() -> None:
    for odd in ({}, FULL | {"id": None}, FULL | {"id": 7}):
        with pytest.raises(ValidationError):
            Instance.model_validate(odd)


def test_the_name_alone_the_tags_alone_the_ssh_key_alone() -> None:
    by_name = facts(tags="absent", ssh_key_names=["theirs"])
    assert (by_name.key, by_name.owner, by_name.lease_end) == (MARKER.key, None, LEASE)
    by_tags = facts(name="absent")
    assert (by_tags.key, by_tags.owner, by_tags.lease_end) == (MARKER.key, "0123abcd", LEASE)
    by_key = facts(name="absent", tags="absent")
    assert (by_key.key, by_key.owner, by_key.lease_end) == (None, "0123abcd", None)
    suffixed = facts(name="absent", tags="absent", ssh_key_names=["llmctl-0123abcd-89abcdef"])
    assert suffixed.owner == "0123abcd"


def test_a_rename_extends_the_lease_and_a_console_name_does_not_lose_it() -> None:
    later = MARKER.model_copy(update={"lease_end": LEASE + timedelta(hours=3)})
    assert facts(name=later.name).lease_end == LEASE + timedelta(hours=3)
    renamed = facts(name="my favourite node")
    assert (renamed.key, renamed.lease_end) == (MARKER.key, LEASE)


def test_a_machine_of_someone_else() -> None:
    node = facts(name="web server", tags=[{"key": "team", "value": "x"}], ssh_key_names=["me"])
    assert (node.key, node.owner, node.lease_end) == (None, None, None)


@pytest.mark.parametrize("lease", ["", "soon", "9" * 30, "-1e9"])
def test_an_absurd_lease_is_none(lease: str) -> None:
    tags = [*TAGS[:2], {"key": "llmctl-lease", "value": lease}]
    assert facts(name="x", tags=tags).lease_end is None
    assert facts(name=f"{MARKER.key}-t{'z' * 40}", tags=tags).key == MARKER.key


@pytest.mark.parametrize(
    ("status", "seen"), [("preempted", "preempted"), ("quarantined", "unknown"), ("", "unknown")]
)
def test_statuses(status: str, seen: str) -> None:
    assert facts(status=status).status == seen


def test_secrets_are_in_no_value() -> None:
    instance = Instance.model_validate(FULL)
    for text in (repr(instance), str(instance), instance.model_dump_json(), repr(node_facts(instance))):
        assert "SECRET-TOKEN" not in text


def test_an_event_concerns_an_instance_through_either_field() -> None:
    lrn = "lrn:cloud:instance:abc"
    assert AuditEvent.model_validate({"resource_lrns": [lrn]}).concerns("abc")
    assert AuditEvent.model_validate({"additional_details": {"instance_lrn": lrn}}).concerns("abc")
    assert not AuditEvent.model_validate({"resource_lrns": [lrn + "d"], "additional_details": None}).concerns(
        "abc"
    )
