"""The provider against a server whose time the test moves: every method, and every belief that may be false."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from provisioning import lambda_cloud
from provisioning.base import Ambiguous, CredentialsError, InvalidHardware, Provider, Refused, Unavailable
from runs import charges
from runs.facts import Marker
from runs.record import NodeRecord
from tests.lambda_fixtures import CLIENT, Paper, paper, request
from tests.lambda_server.nodes import cloud_config

__all__ = ["paper"]
LAUNCH, TERMINATE = "instance-operations/launch", "instance-operations/terminate"


def launched(paper: Paper, **options: object) -> tuple[Any, str]:
    provider = paper.provider()
    node = provider.launch(request(**options))
    paper.tick(30)
    return provider, node


def fresh(provider: Any) -> Any:
    """An inventory that was asked for after now."""
    provider._shared.forget()
    return provider.inventory()


def test_it_is_a_provider(paper: Paper) -> None:
    provider = paper.provider()
    assert isinstance(provider, Provider)
    assert (provider.name, provider.traits.rented, provider.traits.looks) == ("lambda", True, 3)
    assert not provider.traits.lease_on_node
    assert provider.traits.unguarded
    assert paper.provider(self_terminate=True).traits.lease_on_node


def test_the_default_waits_are_those_of_the_house(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMCTL_TEST_PACE")
    traits = paper.provider().traits
    assert (traits.look_seconds, traits.capacity_poll_seconds) == (60, 60)


def test_a_life(paper: Paper) -> None:
    provider = paper.provider()
    wanted = request()
    node = provider.launch(wanted)
    booting = provider.find(node)
    assert booting is not None
    assert (booting.status, booting.ip) == ("booting", None)
    paper.tick(30)
    active = provider.inventory().find(wanted.marker.key)
    assert active is not None
    assert (active.status, active.owner, active.lease_end) == ("active", "0123abcd", wanted.marker.lease_end)
    paper.tick(100)
    provider.terminate(node)
    assert [item.status for item in fresh(provider).nodes] == ["terminating"]
    paper.tick(10)
    assert [item.status for item in fresh(provider).nodes] == ["terminated"]
    paper.tick(100)
    assert fresh(provider).nodes == []
    assert provider.find(node) is None
    (row,) = paper.server.world.ledger()
    assert (row["minutes"], row["billing"]) == (2, False)


def test_the_request_says_all_of_it_and_nothing_else(paper: Paper) -> None:
    paper.set(filesystems=["cache@us-west-1"])
    wanted = request(image="lambda-stack-24-04", filesystem="cache", regions=["x"], gpu="A10:1")
    provider = paper.provider()
    node = provider.launch(wanted)
    body = paper.machines[0].request
    assert set(body) == {
        "region_name",
        "instance_type_name",
        "ssh_key_names",
        "name",
        "tags",
        "image",
        "user_data",
    } | {"file_system_names"}
    assert body["image"] == {"family": "lambda-stack-24-04"}
    assert body["file_system_names"] == ["cache"]
    assert body["name"] == wanted.marker.name
    assert {tag["key"]: tag["value"] for tag in body["tags"]} == wanted.tags()
    assert cloud_config(body["user_data"])["ssh_keys"]["ed25519_private"] == wanted.host_private_key
    shown = provider.redacted(wanted)
    assert shown["json"] == body | {"user_data": f"[redacted, {len(body['user_data'])} characters]"}
    provider.terminate(node)


def test_an_image_id_is_told_from_a_family(paper: Paper) -> None:
    provider = paper.provider()
    for image in ("43336648-096d-4cba-9aa2-f9bb7727639d", "43336648096d4cba9aa2f9bb7727639d"):
        shown: Any = provider.redacted(request(image=image))
        assert shown["json"]["image"] == {"id": image}
    assert paper.server.requests == []


def test_without_an_injected_host_key_there_is_no_user_data(paper: Paper) -> None:
    import dataclasses

    shown: Any = paper.provider().redacted(
        dataclasses.replace(request(), host_private_key=None, host_public_key=None)
    )
    assert "user_data" not in shown["json"]


def test_the_longest_name_fits_and_a_longer_one_is_refused_here(paper: Paper) -> None:
    provider = paper.provider()
    longest = "a" * 32 + "-abcd"
    shown: Any = provider.redacted(request(run=longest, attempt=99))
    assert len(shown["json"]["name"]) <= 64
    with pytest.raises(InvalidHardware, match="64"):
        provider.redacted(request(run="a" * 52 + "-abcd"))


def test_the_own_key_is_registered_once_and_found_by_what_it_is(paper: Paper) -> None:
    provider = paper.provider()
    nodes = [provider.launch(request(attempt=attempt)) for attempt in (1, 2)]
    assert [(key["name"], key["public_key"]) for key in paper.server.world.keys] == [
        ("llmctl-0123abcd", CLIENT.public)
    ]
    paper.server.world.keys[0]["name"] = "renamed in the console"
    nodes.append(provider.launch(request(attempt=3)))
    assert paper.machines[2].request["ssh_key_names"] == ["renamed in the console"]
    assert len(paper.server.world.keys) == 1
    for node in nodes:
        provider.terminate(node)


@pytest.mark.parametrize("unique", [True, False])
def test_a_name_that_another_key_has_is_left_alone(paper: Paper, unique: bool) -> None:
    paper.set(unique_key_names=unique)
    paper.server.world.add_key({"name": "llmctl-0123abcd", "public_key": "ssh-ed25519 AAAA old"})
    provider, node = launched(paper)
    (name,) = paper.machines[0].request["ssh_key_names"]
    assert name.startswith("llmctl-0123abcd-")
    assert fresh(provider).nodes[0].owner == "0123abcd"
    provider.terminate(node)


@pytest.mark.parametrize("kind", ["lose-answer", "lie", "garbage"])
def test_a_lost_answer_to_the_key_is_read_back_and_costs_no_launch(paper: Paper, kind: str) -> None:
    paper.fault("POST /ssh-keys", kind)
    provider, node = launched(paper)
    assert len(paper.server.world.keys) == len(paper.machines) == 1
    provider.terminate(node)


def test_a_key_that_was_not_registered_is_sent_again(paper: Paper) -> None:
    paper.fault("POST /ssh-keys", "refuse", times=2, status=429, code=None)
    provider, node = launched(paper)
    assert len(paper.sent("POST /ssh-keys")) == 3
    assert len(paper.server.world.keys) == len(paper.sent(LAUNCH)) == 1
    provider.terminate(node)


@pytest.mark.parametrize("fault", [("POST /ssh-keys", "lose-request"), ("GET /ssh-keys", "lose-request")])
def test_what_fails_before_the_launch_is_ambiguous_and_launches_nothing(
    paper: Paper, fault: tuple[str, str]
) -> None:
    paper.fault(*fault, times=100)
    with pytest.raises(Ambiguous):
        paper.provider().launch(request())
    assert paper.sent(LAUNCH) == []


def test_a_named_key_is_used_as_it_is(paper: Paper) -> None:
    with pytest.raises(Refused, match="does not exist") as caught:
        paper.provider().launch(request(ssh_key_name="mine"))
    assert "ssh_key_name" in caught.value.hint
    assert paper.server.world.keys == []


@pytest.mark.parametrize(("name", "tags"), [(True, False), (False, True)])
def test_either_echo_suffices(paper: Paper, name: bool, tags: bool) -> None:
    paper.set(echo_name=name, echo_tags=tags)
    wanted = request()
    provider = paper.provider()
    paper.fault(LAUNCH, "lose-answer")
    with pytest.raises(Ambiguous):
        provider.launch(wanted)
    paper.tick(30)
    found = fresh(provider).find(wanted.marker.key)
    assert found is not None
    assert (found.owner, found.lease_end) == ("0123abcd", wanted.marker.lease_end)
    provider.terminate(found.id)


def test_without_any_echo_the_id_and_the_ssh_key_still_tell(paper: Paper) -> None:
    paper.set(echo_name=False, echo_tags=False)
    provider, node = launched(paper)
    seen = provider.find(node)
    assert seen is not None
    assert (seen.key, seen.owner) == (None, "0123abcd")
    provider.terminate(node)


def test_absent_and_unknown_fields(paper: Paper) -> None:
    paper.set(omit=["private_ip", "hostname", "jupyter_token", "jupyter_url", "ip"], unknown_fields=True)
    provider, node = launched(paper)
    seen = provider.find(node)
    assert seen is not None
    assert (seen.status, seen.ip) == ("active", None)
    provider.terminate(node)


def test_a_status_that_is_new_is_unknown_not_an_end(paper: Paper) -> None:
    paper.may_violate = True
    paper.set(status_names={"active": "hibernating"})
    provider, node = launched(paper)
    seen = provider.find(node)
    assert seen is not None
    assert seen.status == "unknown"
    provider.terminate(node)


def test_the_list_lags_and_says_when_it_was_asked(paper: Paper) -> None:
    paper.set(list_lag=45, lookup_lag=45)
    provider = paper.provider()
    wanted = request()
    before = datetime.now(UTC)
    node = provider.launch(wanted)
    inventory = fresh(provider)
    assert inventory.find(wanted.marker.key) is None
    assert inventory.at >= before
    assert provider.find(node) is None
    paper.tick(46)
    assert fresh(provider).find(wanted.marker.key) is not None
    paper.tick(46)
    provider.terminate(node)
    paper.tick(10)
    assert fresh(provider).nodes[0].status == "active"
    paper.tick(46)
    assert fresh(provider).nodes[0].status == "terminated"


@pytest.mark.parametrize("status", [404, 400])
def test_an_id_that_is_gone_is_none_and_terminating_it_is_a_success(paper: Paper, status: int) -> None:
    paper.set(linger_seconds=0, terminating_seconds=0, gone_status=status)
    provider, node = launched(paper)
    provider.terminate(node)
    paper.tick(1)
    assert provider.find(node) is None
    provider.terminate(node)
    assert len(paper.sent(TERMINATE)) == 2


def test_an_error_is_not_an_end(paper: Paper) -> None:
    provider, node = launched(paper)
    paper.fault(f"GET /instances/{node}", "refuse", times=100, status=404, code=None)
    with pytest.raises(Unavailable):
        provider.find(node)
    paper.set(faults=[])
    paper.fault(f"GET /instances/{node}", "refuse", status=400, code="global/invalid-parameters")
    with pytest.raises(Unavailable):
        provider.find(node)
    provider.terminate(node)


def test_what_can_be_no_id_is_not_asked_for(paper: Paper) -> None:
    assert paper.provider().find("../ssh-keys") is None
    assert paper.server.requests == []


def test_does_not_exist_is_verified(paper: Paper) -> None:
    provider, node = launched(paper)
    paper.fault(TERMINATE, "refuse", status=404, code="global/object-does-not-exist")
    with pytest.raises(Ambiguous, match="shows it"):
        provider.terminate(node)
    paper.fault(TERMINATE, "refuse", status=404, code="global/object-does-not-exist")
    paper.fault(f"GET /instances/{node}", "lose-answer", times=5)
    with pytest.raises(Ambiguous, match="not known"):
        provider.terminate(node)
    provider.terminate(node)
    paper.fault(TERMINATE, "refuse", status=404, code="global/object-does-not-exist")
    provider.terminate(node)


def test_an_acceptance_that_names_nobody_is_none(paper: Paper) -> None:
    provider, node = launched(paper)
    paper.fault(TERMINATE, "empty")
    with pytest.raises(Ambiguous, match="without naming"):
        provider.terminate(node)


def test_a_launch_that_names_nobody_is_ambiguous(paper: Paper) -> None:
    provider = paper.provider()
    paper.fault(LAUNCH, "empty")
    wanted = request()
    with pytest.raises(Ambiguous):
        provider.launch(wanted)
    found = provider.inventory().find(wanted.marker.key)
    assert found is not None
    provider.terminate(found.id)


def test_a_lie_about_terminating_is_seen_by_looking(paper: Paper) -> None:
    paper.set(terminate_lies=2)
    provider, node = launched(paper)
    for _ in range(2):
        provider.terminate(node)
        paper.tick(10)
        assert fresh(provider).nodes[0].status == "active"
        assert paper.server.world.ledger()[0]["billing"]
    provider.terminate(node)
    paper.tick(10)
    assert fresh(provider).nodes[0].status == "terminated"
    assert paper.server.world.ledger()[0]["seconds"] == 20


def test_a_machine_that_cannot_be_ended_yet_says_so(paper: Paper) -> None:
    paper.set(terminate_unavailable_seconds=60)
    provider, node = launched(paper)
    seen = provider.find(node)
    assert seen is not None
    assert not seen.terminate_available
    with pytest.raises(Refused):
        provider.terminate(node)
    paper.tick(60)
    provider.terminate(node)


@pytest.mark.parametrize("how", ["unhealthy", "terminated", "preempted"])
def test_what_dies_is_seen(paper: Paper, how: str) -> None:
    paper.may_bill = how == "unhealthy"
    paper.set(die_after=100, die_as=how)
    provider, node = launched(paper)
    paper.tick(101)
    seen = provider.find(node)
    assert seen is not None
    assert seen.status == how


@pytest.mark.parametrize("how", ["unhealthy", "terminated", "preempted"])
def test_a_boot_that_ends_badly_is_seen(paper: Paper, how: str) -> None:
    paper.may_bill = how == "unhealthy"
    paper.set(boot_ends_as=how)
    provider, node = launched(paper)
    seen = provider.find(node)
    assert seen is not None
    assert seen.status == how


def test_a_boot_that_never_ends_stays_one(paper: Paper) -> None:
    paper.set(boot_seconds=1e9)
    provider, node = launched(paper)
    paper.tick(86400)
    seen = provider.find(node)
    assert seen is not None
    assert seen.status == "booting"
    provider.terminate(node)
    assert paper.server.world.ledger()[0]["minutes"] == 0


def test_extend_renames_and_may_be_repeated(paper: Paper) -> None:
    provider, node = launched(paper)
    old = provider.find(node)
    assert old is not None
    marker = Marker(run="run-abcd", attempt=1, index=0, lease_end=old.lease_end + timedelta(hours=5))
    paper.fault(f"POST /instances/{node}", "lose-answer", times=2)
    provider.extend(node, marker)
    seen = provider.inventory().find(marker.key)
    assert seen is not None
    assert (seen.name, seen.lease_end) == (marker.name, marker.lease_end)
    paper.set(rename_ignored=True)
    with pytest.raises(Refused, match="kept the name"):
        provider.extend(node, marker.model_copy(update={"lease_end": marker.lease_end + timedelta(hours=1)}))
    paper.set(echo_name=False)
    provider.extend(node, marker)
    provider.terminate(node)


def test_an_empty_map_of_types_is_not_believed(paper: Paper) -> None:
    provider = paper.provider()
    paper.fault("GET /instance-types", "empty")
    assert provider.offers({"gpu": "A10:1"})
    paper.fault("GET /instance-types", "empty", times=2)
    with pytest.raises(Unavailable, match="cannot be true"):
        provider.offers({})


def test_capacity_is_live(paper: Paper) -> None:
    provider = paper.provider()
    paper.set(capacity={"gpu_1x_a10": ["europe-central-1"]}, capacity_after=600)
    assert [offer.available for offer in provider.offers({"gpu": "A10:1"})] == [False]
    paper.tick(601)
    (offer,) = provider.offers({"gpu": "A10:1"})
    assert (offer.region, offer.available) == ("europe-central-1", True)


def test_one_inventory_serves_all_and_an_effect_ends_it(
    paper: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCTL_TEST_PACE", "100")  # readings stay young for 500 s; nothing here waits
    first, second = paper.provider(), paper.provider(owner="ffff0000")
    for provider in (first, second):
        monkeypatch.setattr(provider._api._limiter, "wait", lambda **_: None)
    at = first.inventory().at
    assert second.inventory().at == at
    assert len(paper.sent("GET /instances")) == 1
    assert second.inventory(newer_than=at).at > at
    node = first.launch(request())
    assert [item.id for item in second.inventory().nodes] == [node]
    first.terminate(node)
    assert second.inventory().nodes[0].status == "terminating"
    assert len(paper.sent("GET /instances")) == 4


def test_the_shared_reading_is_private(paper: Paper) -> None:
    paper.provider().inventory()
    files = [path for path in (paper.directory / "cache").rglob("*") if path.is_file()]
    assert files
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}
    assert {oct(path.parent.stat().st_mode & 0o777) for path in files} == {"0o700"}


def test_an_instance_without_an_id_makes_the_whole_list_unreadable(paper: Paper) -> None:
    paper.may_violate = True
    paper.set(omit=["id"])
    provider = paper.provider()
    provider.launch(request())
    paper.tick(30)
    with pytest.raises(Unavailable, match="cannot be read") as caught:
        provider.inventory()
    assert paper.machines[0].token not in str(caught.value)
    paper.set(omit=[])
    provider.terminate(paper.machines[0].id)


def test_doctor(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.ok for check in paper.provider().check()] == [True] * 4
    lines = paper.provider(ssh_key_name="mine").check()
    assert [(check.name, check.hint != "") for check in lines if not check.ok] == [("lambda: SSH key", True)]
    paper.set(account="inactive")
    last = paper.provider(owner="other").check()[-1]
    assert not last.ok
    assert last.hint
    monkeypatch.setenv("LAMBDA_API_KEY", "secret_wrong")
    assert [check.ok for check in paper.provider().check()] == [True, False]
    monkeypatch.delenv("LAMBDA_API_KEY")
    monkeypatch.setenv("HOME", str(paper.directory))
    assert [check.ok for check in paper.provider().check()] == [False]


def test_filesystems_are_left_over(paper: Paper) -> None:
    paper.set(filesystems=["cache@us-west-1"])
    (sentence,) = paper.provider().leftovers()
    assert "cache in us-west-1: 3.0 GiB, not mounted" in sentence


def test_a_filesystem_in_another_region_is_refused_with_the_way_out(paper: Paper) -> None:
    paper.set(filesystems=["cache@us-east-1"])
    with pytest.raises(Refused) as caught:
        paper.provider().launch(request(filesystem="cache"))
    assert "hardware.regions" in caught.value.hint


@pytest.mark.parametrize(
    "words", [{"launch": "launched", "terminate": "terminated"}, {"launch": "x", "terminate": "deleted"}]
)
def test_the_audit_log_dates_a_life(paper: Paper, words: dict[str, str]) -> None:
    paper.set(audit_actions=words)
    provider = paper.provider()
    start = paper.now
    nodes = [provider.launch(request(attempt=attempt)) for attempt in (1, 2, 3)]
    paper.tick(90)
    for node in nodes:
        provider.terminate(node)
    said = provider.billing_evidence(nodes[2], datetime.fromtimestamp(start - 60, UTC))
    launched_at, terminated_at = said.launched, said.ended
    assert launched_at is not None
    assert terminated_at is not None
    assert launched_at.timestamp() == pytest.approx(start, abs=0.01)
    assert terminated_at - launched_at == timedelta(seconds=90)
    assert len(paper.sent("audit-events")) == 3


def test_processes_share_one_reading_of_the_audit_log(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_cloud, "AUDIT_SECONDS", 1e9)
    provider, start = paper.provider(), datetime.fromtimestamp(paper.now, UTC)
    nodes = [provider.launch(request(attempt=attempt)) for attempt in (1, 2)]
    for node in nodes:
        provider.terminate(node)
    for owner, node in zip(("0123abcd", "89abcdef"), nodes, strict=True):
        assert paper.provider(owner=owner).billing_evidence(node, start).ended
    assert len(paper.sent("audit-events")) == 2  # two events a page
    assert provider.billing_evidence(nodes[0], start - timedelta(hours=2)).ended
    assert len(paper.sent("audit-events")) == 4


def test_without_evidence_nothing_is_invented(paper: Paper) -> None:
    paper.set(audit_actions={"launch": "x", "terminate": "y"})
    provider, node = launched(paper)
    provider.terminate(node)
    since = datetime.fromtimestamp(paper.now - 60, UTC)
    assert provider.billing_evidence(node, since).ended is None
    nobody = provider.billing_evidence("0" * 32, since)
    assert (nobody.launched, nobody.ended) == (None, None)
    paper.set(audit="forbidden")
    with pytest.raises(CredentialsError):
        provider.billing_evidence(node, since)


def test_a_log_that_lags_or_whose_clock_is_wrong(paper: Paper) -> None:
    paper.set(audit_lag=30 / 0.0001, pace=0.0001, audit_skew=4000)
    provider, since = paper.provider(), datetime.fromtimestamp(paper.now - 60, UTC)
    wanted = request()
    launched_at = datetime.fromtimestamp(paper.now, UTC)
    node_id = provider.launch(wanted)
    paper.tick(90)
    provider.terminate(node_id)
    assert provider.billing_evidence(node_id, since).ended is None
    paper.tick(31)
    said = provider.billing_evidence(node_id, since)
    assert said.ended is not None
    node = NodeRecord(
        key=wanted.marker.key, run=wanted.marker.run, provider="lambda", marker=wanted.marker, offer=wanted.offer,
        intended_at=launched_at, gone_at=datetime.fromtimestamp(paper.now, UTC),
    )  # fmt: skip
    assert "before the one that was intended" in str(charges.contradiction(node, said))
    right = {
        name: at + timedelta(seconds=4000)
        for name, at in (("launched", said.launched), ("ended", said.ended))
        if at
    }
    assert charges.contradiction(node, said.model_copy(update=right)) is None


def test_self_terminate_puts_the_key_on_the_node_only_when_asked(paper: Paper) -> None:
    provider, plain = launched(paper)
    guarded = provider.launch(request(attempt=2, self_terminate=True))
    without, with_ = (machine.request["user_data"] for machine in paper.machines)
    assert paper.server.key not in without
    assert paper.server.key in with_
    for node in (plain, guarded):
        provider.terminate(node)


def test_no_writable_place_for_the_state_is_an_error_with_a_way_out(
    paper: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = paper.directory / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    paper.provider().inventory()  # LLMCTL_HOME serves instead
    with pytest.raises(InvalidHardware, match="can be written"):
        from provisioning import lambda_cloud
        from provisioning.base import Home

        lambda_cloud.open(Home(blocked, "0123abcd"), {})


def test_a_key_that_is_none_is_said_at_once(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_API_KEY", "two words")
    with pytest.raises(CredentialsError):
        paper.provider()
