# ruff: noqa: F811 - fixtures are imported by name
"""The provider `ec2` against moto over HTTP: launching, looking, ending, and what AWS's answers mean."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from provisioning import aws as amazon
from provisioning import ec2, ec2_check, ec2_launch
from provisioning.base import (
    Ambiguous,
    CredentialsError,
    Home,
    InvalidHardware,
    LaunchRequest,
    NoCapacity,
    Provider,
    Refused,
    Unavailable,
)
from runs.facts import Marker, Offer, Tariff
from tests.aws_server import SECRET, AwsServer, aws, aws_factory  # noqa: F401
from tests.lambda_fixtures import request as lambda_request

HARDWARE: dict[str, object] = {"gpu": "A10G:1", "regions": ["us-east-1"]}
OWNER = "0123abcd"
OFFER = Offer(
    provider="ec2", instance_type="g5.xlarge", region="us-east-1a", gpu="A10G-24GB", gpus=1,
    tariff=Tariff(micro_usd_per_hour=1_022_438, minimum_seconds=60),
    options={"market": "on-demand", "volume_gib": "150", "volume_micro_usd": "16438"},
)  # fmt: skip


@pytest.fixture
def provider(aws: AwsServer, tmp_path: Path) -> ec2.Ec2:
    return made(tmp_path)


def made(tmp_path: Path, **hardware: object) -> ec2.Ec2:
    return ec2.open(Home(tmp_path / "home", OWNER), {**HARDWARE, **hardware})


def request(
    provider: ec2.Ec2, run: str = "run-abcd", attempt: int = 1, *, asked: bool = False, **hardware: object
) -> LaunchRequest:
    """A launch of the cheapest type; with `asked` of the first offer that AWS makes for the hardware."""
    wanted = {**HARDWARE, **hardware}
    plain = OFFER.model_copy(
        update={"options": {**OFFER.options, "market": str(wanted.get("market", "on-demand"))}}
    )
    return dataclasses.replace(
        lambda_request(run, attempt), offer=provider.offers(wanted)[0] if asked else plain, options=wanted
    )


def test_it_is_a_provider(provider: ec2.Ec2) -> None:
    assert isinstance(provider, Provider)
    assert provider.traits.lease_on_node and provider.traits.rented


def test_a_launch_is_what_it_should_be(aws: AwsServer, provider: ec2.Ec2) -> None:
    wanted = request(provider, asked=True)
    assert wanted.offer.model_copy(update={"description": ""}) == OFFER.model_copy(
        update={"vcpus": 4, "memory_gib": 16, "storage_gib": 400}
    )
    node_id = provider.launch(wanted)
    (sent,) = aws.sent("RunInstances")
    told = sent["parameters"]
    assert told["ClientToken"] == wanted.marker.key and told["MaxCount"] == "1"
    assert told["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert (
        told["MetadataOptions.HttpTokens"] == "required"
        and told["MetadataOptions.InstanceMetadataTags"] == "enabled"
    )
    volume = {
        key.rpartition(".")[2]: value
        for key, value in told.items()
        if key.startswith("BlockDeviceMapping.1.Ebs")
    }
    assert (
        volume["DeleteOnTermination"] == "true"
        and volume["VolumeType"] == "gp3"
        and int(volume["VolumeSize"]) >= 150
    )
    assert "InstanceMarketOptions.MarketType" not in told and SECRET not in json.dumps(told)
    node = provider.find(node_id)
    assert node is not None and node == provider.inventory().nodes[0]
    assert (node.key, node.owner, node.lease_end) == (
        wanted.marker.key,
        wanted.owner,
        wanted.marker.lease_end,
    )
    assert (node.status, node.region, node.instance_type) == ("active", "us-east-1a", "g5.xlarge")
    assert node.micro_usd_per_hour == wanted.offer.tariff.micro_usd_per_hour
    provider.terminate(node_id)
    gone = provider.find(node_id)
    assert gone is not None and gone.status == "terminated"
    provider.terminate(node_id)


def test_the_group_lets_in_this_address_alone_and_follows_it(
    aws: AwsServer,
    provider: ec2.Ec2,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node_id = provider.launch(request(provider))

    def admitted() -> list[str]:
        (group,) = aws.client("ec2").describe_security_groups(GroupNames=[f"llmctl-{OWNER}"])[
            "SecurityGroups"
        ]
        return [item["CidrIp"] for rule in group["IpPermissions"] for item in rule["IpRanges"]]

    assert admitted() == ["203.0.113.7/32"]
    provider.inventory()
    monkeypatch.setenv("LLMCTL_ADDRESS", "198.51.100.9, 192.0.2.0/28")
    provider._address = None
    provider.inventory()
    assert sorted(admitted()) == ["192.0.2.0/28", "198.51.100.9/32"]
    monkeypatch.setenv("LLMCTL_ADDRESS", "not an address")
    provider._address = None
    provider.inventory()
    assert sorted(admitted()) == ["192.0.2.0/28", "198.51.100.9/32"], (
        "an address that is not known changes nothing"
    )
    provider.terminate(node_id)


def test_a_second_launch_uses_the_same_group_and_key(aws: AwsServer, provider: ec2.Ec2) -> None:
    for attempt in (1, 2):
        provider.terminate(provider.launch(request(provider, attempt=attempt)))
    assert len(aws.sent("CreateSecurityGroup")) == 1 and len(aws.sent("ImportKeyPair")) == 1


def test_the_token_never_makes_a_second_instance(aws: AwsServer, provider: ec2.Ec2) -> None:
    wanted = request(provider)
    aws.fault("RunInstances", "lose-answer")
    with pytest.raises(Ambiguous):
        provider.launch(wanted)
    assert provider.launch(wanted) == aws.alive()[0] and len(aws.instances()) == 1
    provider.terminate(aws.alive()[0])


@pytest.mark.parametrize("kind", ["lose-request", "lose-answer", "lie", "garbage"])
def test_a_launch_without_a_clear_answer_is_ambiguous_and_sent_once(
    aws: AwsServer, provider: ec2.Ec2, kind: str
) -> None:
    wanted = request(provider)
    aws.fault("RunInstances", kind)
    with pytest.raises(Ambiguous):
        provider.launch(wanted)
    assert len(aws.sent("RunInstances")) == 1
    found = provider.inventory().find(wanted.marker.key)
    assert (found is None) == (kind == "lose-request")
    if found is not None:
        provider.terminate(found.id)


@pytest.mark.parametrize(
    ("code", "status", "error", "words"),
    [
        ("InsufficientInstanceCapacity", 500, NoCapacity, "free there now"),
        ("Unsupported", 400, NoCapacity, "that zone"),
        ("VcpuLimitExceeded", 400, Refused, "L-DB2E81BA"),
        ("MaxSpotInstanceCountExceeded", 400, Refused, "request-service-quota-increase"),
        ("UnauthorizedOperation", 403, CredentialsError, "iam-policy.json"),
        ("AuthFailure", 401, CredentialsError, "AWS_PROFILE"),
        ("RequestExpired", 400, CredentialsError, "timedatectl"),
        ("ExpiredToken", 400, CredentialsError, "aws sso login"),
        ("OptInRequired", 403, CredentialsError, "switch the region on"),
        ("InvalidSubnetID.NotFound", 400, Refused, "hardware.subnet"),
        ("RequestLimitExceeded", 503, Ambiguous, "tried again"),
        ("InternalError", 500, Ambiguous, "tried again"),
    ],
)
def test_what_a_code_means(  # noqa: PLR0917
    aws: AwsServer, provider: ec2.Ec2, code: str, status: int, error: type[Exception], words: str
) -> None:
    wanted = request(provider)
    aws.fault("RunInstances", "refuse", code=code, status=status)
    with pytest.raises(error) as raised:
        provider.launch(wanted)
    assert type(raised.value) is error
    assert code in str(raised.value) and words in f"{raised.value} {raised.value.hint}"  # type: ignore[attr-defined]
    assert aws.instances() == []


def test_quotas_are_named_by_family_and_market() -> None:
    spot = {"InstanceMarketOptions": {}}
    assert "L-417A185B" in amazon.quota_hint({"InstanceType": "p5.48xlarge"})
    assert "L-C4BD4855" in amazon.quota_hint({"InstanceType": "p5.48xlarge", **spot})
    assert "L-7212CCBC" in amazon.quota_hint({"InstanceType": "p4d.24xlarge", **spot})
    assert "L-1216C47A" in amazon.quota_hint({"InstanceType": "c7i.large"})


def test_a_read_that_fails_is_unavailable_not_an_empty_list(aws: AwsServer, provider: ec2.Ec2) -> None:
    provider.inventory()
    aws.fault("DescribeInstances", "refuse", times=4, code="InternalError", status=500)
    with pytest.raises(Unavailable):
        provider.inventory()


def test_regions_that_the_organisation_forbids_have_nothing_unless_they_were_asked_for(
    aws: AwsServer, tmp_path: Path
) -> None:
    node_id = (everywhere := made(tmp_path, regions=[])).launch(request(everywhere))
    aws.denied_regions = {"us-west-2", "us-east-2"}
    fresh = made(tmp_path, regions=[])
    assert [node.id for node in fresh.inventory().nodes] == [node_id]
    assert {offer.region[:-1] for offer in fresh.offers({**HARDWARE, "regions": []})} == {"us-east-1"}
    assert made(tmp_path, regions=[]).find("i-0123456789abcdef0") is None
    with pytest.raises(CredentialsError):
        made(tmp_path, regions=["us-west-2"]).inventory()
    fresh.terminate(node_id)


def test_extend_moves_name_and_tag(provider: ec2.Ec2) -> None:
    wanted = request(provider)
    node_id = provider.launch(wanted)
    later = wanted.marker.model_copy(update={"lease_end": wanted.marker.lease_end + timedelta(hours=3)})
    ec2.open(provider._home, HARDWARE).extend(node_id, later)  # a process that has never seen the node
    node = provider.find(node_id)
    assert node is not None and node.lease_end == later.lease_end and Marker.parse(node.name) == later
    provider.terminate(node_id)


def test_terminating_what_is_gone_is_a_success_and_what_lies_is_seen(
    aws: AwsServer, provider: ec2.Ec2
) -> None:
    provider.terminate("i-0123456789abcdef0")
    assert provider.find("i-0123456789abcdef0") is None and provider.find("not an id") is None
    node_id = provider.launch(request(provider))
    aws.terminate_lies = 1
    provider.terminate(node_id)
    node = provider.find(node_id)
    assert node is not None and node.status == "active"
    aws.fault("TerminateInstances", "refuse", code="InvalidInstanceID.NotFound")
    with pytest.raises(Ambiguous):
        provider.terminate(node_id)
    provider.terminate(node_id)


def test_spot_is_one_time_capped_and_priced_by_its_hours(aws: AwsServer, tmp_path: Path) -> None:
    aws.spot = {"us-east-1b": 0.2}
    provider = made(tmp_path, market="spot", max_usd_per_hour=0.6)
    wanted = request(provider, asked=True, market="spot", max_usd_per_hour=0.6)
    assert wanted.offer.region == "us-east-1b" and wanted.offer.tariff.micro_usd_per_hour == 216_438
    node_id = provider.launch(wanted)
    told = aws.sent("RunInstances")[0]["parameters"]
    assert told["InstanceMarketOptions.SpotOptions.SpotInstanceType"] == "one-time"
    assert float(told["InstanceMarketOptions.SpotOptions.MaxPrice"]) == pytest.approx(0.6 - 0.016438)
    aws.spot = {"us-east-1b": 0.5}
    node = provider.find(node_id)
    assert node is not None and node.micro_usd_per_hour == 516_438
    aws.spot = {"us-east-1b": 0.9}
    aws.kill(node_id, "Server.SpotInstanceTermination")
    ended = provider.find(node_id)
    assert ended is not None and ended.status == "preempted"
    assert ended.micro_usd_per_hour == 516_438, "what an hour costs after its end is nothing to it"


def test_every_volume_that_an_image_brings_goes_with_the_instance() -> None:
    image = {
        "RootDeviceName": "/dev/sda1",
        "BlockDeviceMappings": [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 900, "DeleteOnTermination": True}},
            {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 500, "DeleteOnTermination": False}},
            {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"},
        ],
    }
    root, other = ec2_launch._volumes(OFFER, image)
    assert root["Ebs"] == {"VolumeSize": 900, "VolumeType": "gp3", "DeleteOnTermination": True}
    assert other == {"DeviceName": "/dev/sdf", "Ebs": {"DeleteOnTermination": True}}


def test_prices_come_from_the_dated_table_where_the_list_may_not_be_asked(
    aws: AwsServer, tmp_path: Path
) -> None:
    aws.prices = None
    offer = made(tmp_path).offers(HARDWARE)[0]
    assert offer.tariff.estimated and offer.usd_per_hour == pytest.approx(1.006 + 0.016438)


def test_prices_are_kept_for_a_day(aws: AwsServer, tmp_path: Path) -> None:
    for _ in range(2):
        made(tmp_path).offers(HARDWARE)
    assert len(aws.sent("pricing GetProducts")) == 2  # one for each type with an A10G


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        ({"regions": ["us-east-9"]}, "no region us-east-9"),
        ({"subnet": "subnet-0badbad"}, "no subnet subnet-0badbad"),
    ],
)
def test_hardware_that_is_not_there(provider: ec2.Ec2, hardware: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidHardware) as error:
        provider.offers({**HARDWARE, **hardware})
    assert words in str(error.value)


def test_an_image_that_is_not_there_is_refused(provider: ec2.Ec2) -> None:
    with pytest.raises(Refused) as error:
        provider.launch(request(provider, image="/no/such/parameter"))
    assert error.value.code == "no-image" and "hardware.image" in error.value.hint


def test_a_subnet_narrows_the_offers(aws: AwsServer, provider: ec2.Ec2) -> None:
    subnet = next(
        item
        for item in aws.client("ec2").describe_subnets()["Subnets"]
        if item["AvailabilityZone"] == "us-east-1c"
    )
    found = provider.offers({**HARDWARE, "subnet": subnet["SubnetId"]})
    assert {offer.region for offer in found} == {"us-east-1c"}


def test_without_credentials_it_is_not_configured(
    aws: AwsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(CredentialsError) as error:
        made(tmp_path).inventory()
    assert error.value.code == "no-key" and "aws configure" in error.value.hint


def test_without_boto3_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "find_spec", lambda _name: None)
    with pytest.raises(CredentialsError) as error:
        made(tmp_path)
    assert error.value.code == "no-extra" and "pip install 'llmctl[aws]'" in error.value.hint


def test_doctor_names_what_the_policy_lacks(aws: AwsServer, provider: ec2.Ec2) -> None:
    assert [item.ok for item in provider.check()] == [True, True, True]
    aws.denied = {"TerminateInstances", "CreateTags"}
    (bad,) = [item for item in provider.check() if not item.ok]
    assert bad.detail == "missing: ec2:TerminateInstances, ec2:CreateTags" and "iam-policy.json" in bad.hint
    aws.denied = {"GetProducts"}
    assert all(item.ok for item in provider.check())


def test_the_shipped_policy_allows_all_that_doctor_asks_and_all_that_is_sent(
    aws: AwsServer, tmp_path: Path
) -> None:
    policy = json.loads(Path(ec2_check.__file__).with_name("iam-policy.json").read_text())
    allowed = {
        action
        for item in policy["Statement"]
        for action in ([item["Action"]] if isinstance(item["Action"], str) else item["Action"])
    }
    provider = made(tmp_path)
    assert set(ec2_check._probes(provider._aws, OWNER)) <= allowed
    provider.terminate(provider.launch(request(provider)))
    provider.leftovers()
    aws_names = {
        ":".join(row["name"].split()[:2])
        for row in aws.requests
        if row["name"].split()[0] in {"ec2", "ssm", "pricing"}
    }
    assert aws_names <= allowed


def test_leftovers_are_volumes_that_nothing_has(aws: AwsServer, provider: ec2.Ec2) -> None:
    volume = aws.client("ec2").create_volume(AvailabilityZone="us-east-1a", Size=300)["VolumeId"]
    (text,) = provider.leftovers()
    assert volume in text and "300 GiB" in text and "delete-volume" in text


def test_the_dry_run_shows_the_request_without_the_host_key(aws: AwsServer, provider: ec2.Ec2) -> None:
    wanted = request(provider)
    before = len(aws.requests)
    shown = json.dumps(provider.redacted(wanted))
    assert "PRIVATE KEY" not in shown and wanted.marker.key in shown and len(aws.requests) == before


def test_a_stopped_instance_is_ill_and_a_foreign_one_is_nobodys(aws: AwsServer, provider: ec2.Ec2) -> None:
    aws.client("ec2").run_instances(ImageId=aws.image(), MinCount=1, MaxCount=1, InstanceType="t3.micro")
    (foreign,) = provider.inventory().nodes
    assert foreign.key is None and foreign.owner is None
    aws.client("ec2").stop_instances(InstanceIds=[foreign.id])
    stopped = provider.find(foreign.id)
    assert stopped is not None and stopped.status == "unhealthy"
    provider.terminate(foreign.id)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCTL_ADDRESS", "10.1.2.3/24")
    assert ec2_launch.this_address() == ["10.1.2.0/24"]
    monkeypatch.setenv("LLMCTL_ADDRESS", "http://127.0.0.1:1/")
    with pytest.raises(Unavailable):
        ec2_launch.this_address()


def test_launched_at_is_utc() -> None:
    raw: dict[str, Any] = {
        "InstanceId": "i-1",
        "State": {"Name": "weird"},
        "Tags": [{"Key": "llmctl-lease", "Value": "1700000000"}],
    }
    node = ec2.facts(raw)
    assert node.status == "unknown" and node.lease_end == datetime.fromtimestamp(1_700_000_000, UTC)
