"""What EC2 answers where moto does not know it: client tokens, sold-out zones, lies about the end, regions, prices, parameters."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from tests.aws_server.wire import REGIONS, Answer, ec2, error


class Market:
    """The part of the account that decides by itself. Its state is the account's."""

    prices: dict[str, float] | None
    spot: dict[str, float]
    sold_out: set[str]
    terminate_lies: int
    parameters: dict[str, str]
    _tokens: dict[tuple[str, str], bytes]

    def _ec2_special(self, action: str, parameters: dict[str, str], region: str) -> Answer | None:
        if action == "RunInstances" and "DryRun" not in parameters:
            if (answer := self._tokens.get((region, parameters.get("ClientToken", "")))) is not None:
                return "200 OK", [("Content-Type", "text/xml")], answer
            subnet = parameters.get("NetworkInterface.1.SubnetId", "")
            zone = next(
                (item.availability_zone for item in ec2(region).describe_subnets() if item.id == subnet), ""
            )
            if self.sold_out & {zone, f"{parameters.get('InstanceType')}/{zone}"}:
                return error("ec2", "InsufficientInstanceCapacity", 500)
        if action == "TerminateInstances" and "DryRun" not in parameters:
            over = any(
                item.id == parameters["InstanceId.1"] and item.state == "terminated"
                for item in ec2(region).all_instances()
            )
            if not self.terminate_lies and not over:  # moto cannot end what has ended; EC2 says yes again
                return None
            self.terminate_lies -= 0 if over else 1
            item = f"<item><instanceId>{parameters['InstanceId.1']}</instanceId><currentState><code>32</code><name>shutting-down</name></currentState></item>"
            return (
                "200 OK",
                [("Content-Type", "text/xml")],
                f"<TerminateInstancesResponse><instancesSet>{item}</instancesSet></TerminateInstancesResponse>".encode(),
            )
        if action == "DescribeRegions" and "DryRun" not in parameters:
            names = "".join(f"<item><regionName>{name}</regionName></item>" for name in REGIONS)
            text = f"<DescribeRegionsResponse><regionInfo>{names}</regionInfo></DescribeRegionsResponse>"
            return "200 OK", [("Content-Type", "text/xml")], text.encode()
        if action == "DescribeSpotPriceHistory" and "DryRun" not in parameters:
            return self._spot_history(parameters, region)
        if parameters.get("DryRun") == "true":
            return error("ec2", "DryRunOperation", 412)
        return None

    def _spot_history(self, parameters: dict[str, str], region: str) -> Answer:
        types = [value for key, value in parameters.items() if key.startswith("InstanceType.")]
        zones = (
            [parameters["AvailabilityZone"]]
            if "AvailabilityZone" in parameters
            else [f"{region}{letter}" for letter in "abcdef"]
        )
        items = "".join(
            f"<item><instanceType>{kind}</instanceType><availabilityZone>{zone}</availabilityZone><spotPrice>{self.spot.get(zone, 0.4)}</spotPrice>"
            f"<timestamp>{datetime(2026, 1, 1, tzinfo=UTC).isoformat()}</timestamp></item>"
            for kind in types
            for zone in zones
        )
        text = f"<DescribeSpotPriceHistoryResponse><spotPriceHistorySet>{items}</spotPriceHistorySet></DescribeSpotPriceHistoryResponse>"
        return "200 OK", [("Content-Type", "text/xml")], text.encode()

    def _price_list(self, parameters: dict[str, str]) -> Answer:
        if self.prices is None:
            return error("pricing", "AccessDeniedException", 400)
        name = parameters.get("instanceType", "")
        dimension = {"unit": "Hrs", "pricePerUnit": {"USD": str(self.prices.get(name, 0))}}
        rows = [
            {"product": {"attributes": {"instanceType": name, "regionCode": region, "marketoption": "OnDemand"}},
             "terms": {"OnDemand": {"X": {"priceDimensions": {"Y": dimension}}}}}
            for region in ("us-east-1", "us-east-2", "us-west-2", "eu-west-1")
        ]  # fmt: skip
        body = json.dumps(
            {"FormatVersion": "aws_v1", "PriceList": [json.dumps(row) for row in rows]}
        ).encode()
        return "200 OK", [("Content-Type", "application/x-amz-json-1.1")], body

    def _ssm(self, wanted: dict[str, Any]) -> Answer:
        found = [
            {"Name": name, "Value": self.parameters[name]}
            for name in wanted["Names"]
            if name in self.parameters
        ]
        lacking = [name for name in wanted["Names"] if name not in self.parameters]
        body = json.dumps({"Parameters": found, "InvalidParameters": lacking}).encode()
        return "200 OK", [("Content-Type", "application/x-amz-json-1.1")], body
