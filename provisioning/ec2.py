"""Provider `ec2`: AWS's instances, on demand and spot.

A node carries its marker as its name and the tags `llmctl-intent`, `llmctl-owner` and `llmctl-lease`. It ends itself when its lease is
over (ec2_guard), so that no machine that vanished leaves a bill behind. An id is looked for in every region that the account has
switched on, unless the spec names regions.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar, get_args

from provisioning import ec2_check, ec2_launch, ec2_market, ec2_offers
from provisioning.aws import GONE, Aws
from provisioning.base import (
    Ambiguous,
    Check,
    Home,
    InvalidHardware,
    LaunchRequest,
    ProviderError,
    Refused,
    Traits,
    Unavailable,
    texts,
    utc,
)
from runs.facts import ENDED, Inventory, Marker, NodeFacts, NodeStatus, Offer, key_of

R = TypeVar("R")
_STATUSES: dict[str, NodeStatus] = {
    "pending": "booting",
    "running": "active",
    "shutting-down": "terminating",
    "terminated": "terminated",
    # Nothing of ours is ever stopped: whoever did it, the volume bills on.
    "stopping": "unhealthy",
    "stopped": "unhealthy",
}
_OVER = frozenset({"terminating", "terminated", "preempted"})
_SPOT_END = "Server.SpotInstanceTermination"
ADDRESS_SECONDS = 60.0
"""How often it is looked whether this machine's address has changed."""


def open(home: Home, hardware: dict[str, object]) -> Ec2:  # noqa: A001 - the registry's word: ec2.open
    """The provider for the account of boto3's credentials. Nothing is sent yet. Raises CredentialsError without boto3.

    `LLMCTL_TEST_PACE` (docs/assumptions.md) scales every wait for tests against a server whose seconds are short.
    """
    return Ec2(home, hardware, Aws(), pace=float(os.environ.get("LLMCTL_TEST_PACE", "1")))


class Ec2:
    """The Provider protocol over EC2."""

    name = "ec2"

    def __init__(self, home: Home, hardware: dict[str, object], aws: Aws, *, pace: float = 1.0) -> None:
        self._home, self._hardware, self._aws = home, hardware, aws
        self._pace = pace
        self._known_regions: list[str] | None = None
        self._places: dict[str, str] = {}
        """Node id → region, of those that were seen."""
        self._means: dict[str, int] = {}
        """Spot node id → the mean price of its life so far, in micro-dollars an hour."""
        self._lock = threading.Lock()
        self._address: tuple[float, list[str]] | None = None
        self.traits = Traits(
            looks=3,
            look_seconds=60 * pace,
            boot_poll_seconds=10 * pace,
            terminate_poll_seconds=5 * pace,
            capacity_poll_seconds=60 * pace,
            watch_seconds=60 * pace,
            retry_seconds=5 * pace,
            unreachable_seconds=1200 * pace,
            lease_on_node=True,
            price_moves=True,
        )

    # ------------------------------------------------------------ renting

    def offers(self, hardware: dict[str, object]) -> list[Offer]:
        """See Provider. EC2 does not say what is free: every zone that has the type counts as free until it refuses."""
        kinds, zones = ec2_market.places(self._aws, self._regions(hardware), hardware)
        zones = self._within_subnet(zones, hardware)
        groups = ec2_offers.wanted(kinds, hardware)
        wanted = {item.name: zones.get(item.name, []) for group in groups for item in group}
        prices = (
            ec2_market.spot_prices(self._aws, wanted)
            if hardware.get("market") == "spot"
            else ec2_market.on_demand_prices(self._aws, wanted, self._home.path / "cache" / "ec2-prices.json")
        )
        return ec2_offers.offers(
            kinds,
            zones,
            prices,
            hardware,
            volume=ec2_market.table()["gp3_usd_per_gib_month"],
            home_region=self._aws.region,
        )

    def launch(self, request: LaunchRequest) -> str:
        """See Provider. The marker's key is the client token: EC2 never makes a second instance of it."""
        region = ec2_offers.region_of(request.offer.region)
        body = ec2_launch.prepare(self._aws, request, self._home.owner)
        answer = self._aws.send("ec2", "run_instances", region, **body)
        ids = [item.get("InstanceId") for item in answer.get("Instances") or ()]
        if len(ids) != 1 or not isinstance(ids[0], str):
            raise Ambiguous(
                "EC2 accepted the launch but named no single instance",
                code="unreadable",
                hint="see the EC2 console",
            )
        self._places[ids[0]] = region
        return ids[0]

    def redacted(self, request: LaunchRequest) -> dict[str, object]:
        """See Provider. Asks nobody: what AWS has to be asked for stands in angle brackets."""
        options = request.options
        groups = texts(options, "security_group") or [f"<{ec2_launch.group_name(self._home.owner)}>"]
        chosen = {"ImageId": str(options.get("image") or "<Deep Learning AMI>")}
        subnet = str(options.get("subnet") or f"<default subnet of {request.offer.region}>")
        key = ec2_launch.key_name(self._home.owner, request.public_key)
        made = ec2_launch.redacted(ec2_launch.body(request, chosen, subnet, groups, key))
        return {
            "operation": "RunInstances",
            "region": ec2_offers.region_of(request.offer.region),
            "parameters": made,
        }

    # ------------------------------------------------------------ looking

    def inventory(self) -> Inventory:
        """See Provider. While a run is driven, the security group follows this machine's address from here."""
        at = datetime.now(UTC)
        found = self._everywhere(self._region_nodes, self._hardware)
        nodes = [node for part in found for node in part]
        if self._hardware and any(
            node.owner == self._home.owner and node.status not in _OVER for node in nodes
        ):
            self._follow(
                {ec2_offers.region_of(node.region) for node in nodes if node.owner == self._home.owner}
            )
        return Inventory(at=at, nodes=nodes)

    def find(self, node_id: str) -> NodeFacts | None:
        """See Provider. Only "not found" in each region that may have it is a None."""
        if not re.fullmatch(r"i-[0-9a-f]+", node_id):
            return None
        filters = [{"Name": "instance-id", "Values": [node_id]}]

        def look(region: str) -> NodeFacts | None:
            raw = next(self._instances(region, filters), None)
            return self._facts(raw, region) if raw is not None else None

        known = self._places.get(node_id)
        found = [look(known)] if known else self._everywhere(look, self._hardware)
        return next((node for node in found if node is not None), None)

    def _region_nodes(self, region: str) -> list[NodeFacts]:
        return [self._facts(raw, region) for raw in self._instances(region, [])]

    def _instances(self, region: str, filters: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for page in self._aws.pages("ec2", "describe_instances", region, Filters=filters):
            for reservation in page["Reservations"]:
                yield from reservation["Instances"]

    def _facts(self, raw: Mapping[str, Any], region: str) -> NodeFacts:
        node = facts(raw)
        self._places[node.id] = region
        tags = _tags(raw)
        if node.key is None or ec2_launch.PRICE_TAG not in tags:
            return node
        price = _number(tags.get(ec2_launch.PRICE_TAG))
        if raw.get("InstanceLifecycle") == "spot":
            mean = self._spot_mean(node, raw["LaunchTime"])
            price = mean + _number(tags.get(ec2_launch.VOLUME_TAG)) if mean is not None else price
        return node.model_copy(update={"micro_usd_per_hour": price})

    def _spot_mean(self, node: NodeFacts, launched: datetime) -> int | None:
        """The mean spot price over a node's life, so that dollars are those of each hour's price; of one that is over, the last one
        seen while it lived. None: not known, and the price of the launch stands."""
        if node.status == "booting" or (node.status in ENDED and node.id in self._means):
            return self._means.get(node.id)
        with suppress(ProviderError):
            kind, zone = node.instance_type, node.region
            mean = ec2_market.spot_mean(self._aws, kind, zone, launched, datetime.now(UTC))
            if mean is not None:
                self._means[node.id] = mean
        return self._means.get(node.id)

    # ------------------------------------------------------------ ending

    def terminate(self, node_id: str) -> None:
        """See Provider. "Not found" is verified by looking, and an answer that does not name the node is no acceptance."""
        region = self._places.get(node_id)
        if region is None:
            node = self._look(node_id)
            if node is None:
                return
            region = ec2_offers.region_of(node.region)
        try:
            answer = self._aws.send("ec2", "terminate_instances", region, InstanceIds=[node_id])
        except Refused as error:
            if error.code not in GONE:
                raise
            node = self._look(node_id)
            if node is not None and node.status not in _OVER:
                message = f"EC2 says that {node_id} does not exist, and shows it"
                raise Ambiguous(message, code="contradiction", hint="see the EC2 console") from None
            return
        if node_id not in [item.get("InstanceId") for item in answer.get("TerminatingInstances") or ()]:
            raise Ambiguous(
                f"EC2 answered the terminate of {node_id} without naming it",
                code="unreadable",
                hint="see the EC2 console",
            )

    def _look(self, node_id: str) -> NodeFacts | None:
        try:
            return self.find(node_id)
        except Unavailable as error:
            raise Ambiguous(
                f"whether {node_id} is gone is not known: {error}", code=error.code, hint=error.hint
            ) from None

    def extend(self, node_id: str, marker: Marker) -> None:
        """See Provider. The node reads the tag and lives as long as it says. Setting tags may be repeated, so it is."""
        region = self._places.get(node_id)
        if region is None:
            node = self.find(node_id)
            if node is None:
                raise Refused(
                    f"EC2 has no instance {node_id}",
                    code="InvalidInstanceID.NotFound",
                    hint="`llmctl status --refresh`",
                )
            region = ec2_offers.region_of(node.region)
        lease = str(int(marker.lease_end.timestamp()))
        tags = [{"Key": "llmctl-lease", "Value": lease}, {"Key": "Name", "Value": marker.name}]
        self._aws.read("ec2", "create_tags", region, Resources=[node_id], Tags=tags)

    # ------------------------------------------------------------ for people

    def check(self) -> Sequence[Check]:
        """See Provider."""
        return ec2_check.check(self._aws, self._hardware, self._home.owner)

    def leftovers(self) -> Sequence[str]:
        """See Provider: volumes that no instance has, and spot requests that may still start one."""
        return [text for part in self._everywhere(self._leftovers, {}) for text in part]

    def _leftovers(self, region: str) -> list[str]:
        free = [{"Name": "status", "Values": ["available"]}]
        volumes = [
            item
            for page in self._aws.pages("ec2", "describe_volumes", region, Filters=free)
            for item in page["Volumes"]
        ]
        told = [
            f"EBS volume {item['VolumeId']} in {item['AvailabilityZone']}: {item['Size']} GiB, attached to nothing, bills until "
            f"`aws ec2 delete-volume --region {region} --volume-id {item['VolumeId']}`"
            for item in volumes
        ]
        waiting = [{"Name": "state", "Values": ["open"]}]
        requests = self._aws.read("ec2", "describe_spot_instance_requests", region, Filters=waiting)[
            "SpotInstanceRequests"
        ]
        return told + [
            f"Spot request {item['SpotInstanceRequestId']} in {region} is open and may still start an instance: "
            f"`aws ec2 cancel-spot-instance-requests --region {region} --spot-instance-request-ids {item['SpotInstanceRequestId']}`"
            for item in requests
        ]

    # ------------------------------------------------------------ where

    def _regions(self, hardware: Mapping[str, object]) -> list[str]:
        """The regions that the spec names, else all of the account's. Raises InvalidHardware for one that is none."""
        with self._lock:
            if self._known_regions is None:
                answer = self._aws.read("ec2", "describe_regions", AllRegions=False)
                self._known_regions = sorted(item["RegionName"] for item in answer["Regions"])
        asked = list(dict.fromkeys(ec2_offers.region_of(name) for name in texts(hardware, "regions")))
        wrong = [name for name in asked if name not in self._known_regions]
        if wrong:
            raise InvalidHardware(
                f"hardware.regions: this AWS account has no region {', '.join(wrong)}", code="region",
                hint=f"it has {', '.join(self._known_regions)}; others are switched on under Account → AWS Regions",
            )  # fmt: skip
        return asked or self._known_regions

    def _everywhere(self, look: Callable[[str], R], hardware: Mapping[str, object]) -> list[R]:
        """What `look` finds in the regions of a hardware section."""
        asked = bool(texts(hardware, "regions"))
        return ec2_market.in_regions(look, self._regions(hardware), asked=asked)

    def _within_subnet(
        self, zones: dict[str, list[str]], hardware: Mapping[str, object]
    ) -> dict[str, list[str]]:
        """A given subnet lies in one zone: only offers there are any."""
        wanted = hardware.get("subnet")
        if not wanted:
            return zones
        filters = [{"Name": "subnet-id", "Values": [str(wanted)]}]
        for region in self._regions(hardware):
            for item in self._aws.read("ec2", "describe_subnets", region, Filters=filters)["Subnets"]:
                return {
                    name: [zone for zone in there if zone == item["AvailabilityZone"]]
                    for name, there in zones.items()
                }
        raise InvalidHardware(f"hardware.subnet: there is no subnet {wanted}", code="InvalidSubnetID.NotFound",
                              hint="check hardware.subnet and hardware.regions")  # fmt: skip

    def _follow(self, regions: set[str]) -> None:
        """Keep SSH open for this machine's address, wherever it is now. A failure is met again at the next look."""
        if self._hardware.get("security_group"):
            return
        now = time.monotonic()
        if self._address is not None and now - self._address[0] < ADDRESS_SECONDS * self._pace:
            return
        with suppress(ProviderError):
            networks = ec2_launch.this_address()
            if self._address is None or self._address[1] != networks:
                for region in sorted(regions):
                    ec2_launch.follow(self._aws, region, self._home.owner, networks)
            self._address = now, networks


def facts(raw: Mapping[str, Any]) -> NodeFacts:
    """One instance as the rest of the program sees it, its price excepted. Pure."""
    tags = _tags(raw)
    name = tags.get("Name", "")
    key = key_of(tags.get("llmctl-intent", "")) or key_of(name) or key_of(str(raw.get("ClientToken") or ""))
    lease = _number(tags.get("llmctl-lease"))
    status: NodeStatus = _STATUSES.get(str(raw.get("State", {}).get("Name")), "unknown")
    if status in {"terminating", "terminated"} and raw.get("StateReason", {}).get("Code") == _SPOT_END:
        status = "preempted" if status == "terminated" else status
    assert status in get_args(NodeStatus)
    return NodeFacts(
        id=str(raw["InstanceId"]),
        name=name,
        status=status,
        provider="ec2",
        ip=raw.get("PublicIpAddress"),
        port=_ssh_port(str(raw["InstanceId"])),
        private_ip=raw.get("PrivateIpAddress"),
        region=str(raw.get("Placement", {}).get("AvailabilityZone", "")),
        instance_type=str(raw.get("InstanceType", "")),
        key=key,
        owner=tags.get("llmctl-owner"),
        lease_end=utc(lease) if lease else None,
    )


def _tags(raw: Mapping[str, Any]) -> dict[str, str]:
    return {str(item["Key"]): str(item["Value"]) for item in raw.get("Tags") or ()}


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _ssh_port(node_id: str) -> int:
    """22, always. Tests cannot bind it, so their server writes `{id: port}` to the file LLMCTL_TEST_SSH_PORTS."""
    path = os.environ.get("LLMCTL_TEST_SSH_PORTS")
    if not path:
        return 22
    import json
    from pathlib import Path

    with suppress(OSError, ValueError):
        return int(json.loads(Path(path).read_text(encoding="utf-8")).get(node_id, 22))
    return 22
