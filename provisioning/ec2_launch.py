"""The launch of an EC2 instance: image, network, security group, key pair, volume, and the one request that starts it."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Mapping
from typing import Any

from provisioning.aws import Aws
from provisioning.base import Ambiguous, LaunchRequest, Refused, Unavailable, texts
from provisioning.ec2_guard import guarded
from provisioning.ec2_offers import region_of
from runs.facts import Offer
from runs.rows import MICRO

IMAGES = tuple(
    f"/aws/service/deeplearning/ami/x86_64/{name}/latest/ami-id"
    for name in (
        "oss-nvidia-driver-gpu-pytorch-2.13-ubuntu-24.04",
        "oss-nvidia-driver-gpu-pytorch-2.12-ubuntu-24.04",
        "oss-nvidia-driver-gpu-pytorch-2.11-ubuntu-24.04",
        "oss-nvidia-driver-gpu-pytorch-2.10-ubuntu-24.04",
        "oss-nvidia-driver-gpu-pytorch-2.9-ubuntu-24.04",
        "oss-nvidia-driver-gpu-pytorch-2.9-ubuntu-22.04",
        "base-oss-nvidia-driver-gpu-ubuntu-24.04",
        "base-oss-nvidia-driver-gpu-ubuntu-22.04",
    )
)
"""Deep Learning AMIs with torch 2.9 or later, then those with the driver alone; the first that a region has is taken."""
ADDRESS_URL = "https://checkip.amazonaws.com"
PRICE_TAG, VOLUME_TAG = "llmctl-price", "llmctl-volume-price"
"""Micro-dollars an hour at launch, volume included; and the volume's share. So any machine can say what a node costs."""


def this_address() -> list[str]:
    """The networks that SSH may come from: LLMCTL_ADDRESS (addresses or networks, with commas, or a URL that tells it), else this
    machine's public IPv4 address as AWS sees it. Raises Unavailable."""
    given = os.environ.get("LLMCTL_ADDRESS", ADDRESS_URL)
    hint = "export LLMCTL_ADDRESS=ADDRESS, or a network such as 203.0.113.0/24"
    text = given
    if given.startswith(("http://", "https://")):
        import httpx2

        try:
            answer = httpx2.get(given, timeout=10)
            answer.raise_for_status()
            text = answer.text
        except httpx2.HTTPError as error:
            message = f"this machine's public address could not be asked for at {given}: {error}"
            raise Unavailable(message, code="address", hint=hint) from None
    try:
        return sorted(str(ipaddress.IPv4Network(part.strip(), strict=False)) for part in text.split(","))
    except ValueError as error:
        raise Unavailable(f"no IPv4 address: {error}", code="address", hint=hint) from None


def group_name(owner: str) -> str:
    """The security group of this LLMCTL_HOME."""
    return f"llmctl-{owner}"


def key_name(owner: str, public_key: str) -> str:
    """The key pair's name holds a hash of the key, so that one name never means two keys."""
    material = " ".join(public_key.split()[:2])
    return f"llmctl-{owner}-{hashlib.sha256(material.encode()).hexdigest()[:8]}"


def image(aws: Aws, region: str, wanted: object) -> dict[str, Any]:
    """The image as EC2 describes it: an AMI, an SSM parameter, or the newest Deep Learning AMI. Raises Refused."""
    if wanted and not str(wanted).startswith("/"):
        ami = str(wanted)
    else:
        names = [str(wanted)] if wanted else list(IMAGES)
        answer = aws.read("ssm", "get_parameters", region, Names=names)
        values = {item["Name"]: item["Value"] for item in answer["Parameters"]}
        ami = next((values[name] for name in names if name in values), "")
        if not ami:
            hint = f"aws ssm get-parameters-by-path --region {region} --path /aws/service/deeplearning/ami --recursive; or hardware.image: ami-…"
            raise Refused(f"{region} has no SSM parameter {names[0]}", code="no-image", hint=hint)
    found = aws.read("ec2", "describe_images", region, ImageIds=[ami])["Images"]
    if not found:
        raise Refused(
            f"{region} has no image {ami}",
            code="InvalidAMIID.NotFound",
            hint="check hardware.image: an AMI belongs to one region",
        )
    described: dict[str, Any] = found[0]
    return described


def subnet(aws: Aws, zone: str, wanted: object) -> dict[str, Any]:
    """The given subnet, or the default one of a zone. Raises Refused."""
    region = region_of(zone)
    filters = (
        [{"Name": "subnet-id", "Values": [str(wanted)]}]
        if wanted
        else [{"Name": "availability-zone", "Values": [zone]}, {"Name": "default-for-az", "Values": ["true"]}]
    )
    found = aws.read("ec2", "describe_subnets", region, Filters=filters)["Subnets"]
    if not found:
        what = f"no subnet {wanted}" if wanted else f"no default subnet in {zone}"
        hint = (
            "check hardware.subnet"
            if wanted
            else f"aws ec2 create-default-subnet --region {region} --availability-zone {zone}, or hardware.subnet"
        )
        raise Refused(f"{region} has {what}", code="no-subnet", hint=hint)
    described: dict[str, Any] = found[0]
    return described


def security_group(
    aws: Aws, region: str, vpc: str, owner: str, networks: list[str], *, together: bool
) -> str:
    """The id of this home's group in a VPC, made where there is none; it lets in SSH from `networks` and nobody else, and
    with `together` its own members."""
    found = _groups(aws, region, owner, vpc)
    if not found:
        tags = [{"ResourceType": "security-group", "Tags": [{"Key": "llmctl-owner", "Value": owner}]}]
        try:
            aws.send("ec2", "create_security_group", region, GroupName=group_name(owner), VpcId=vpc,
                     Description="llmctl: SSH from the machine that launched it", TagSpecifications=tags)  # fmt: skip
        except (Ambiguous, Refused) as error:
            if isinstance(error, Refused) and error.code != "InvalidGroup.Duplicate":
                raise
        found = _groups(aws, region, owner, vpc)
        if not found:
            raise Unavailable(
                "the security group that was made is not shown yet", code="group", hint="it is tried again"
            )
    admit(aws, region, found[0], networks)
    identity = str(found[0]["GroupId"])
    if together and not any(rule.get("UserIdGroupPairs") for rule in found[0].get("IpPermissions", [])):
        inside = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": identity}]}]
        _change(aws, "authorize_security_group_ingress", region, identity, inside)
    return identity


def follow(aws: Aws, region: str, owner: str, networks: list[str]) -> None:
    """Let SSH in from `networks` in every group of this home in a region: this machine has moved."""
    for group in _groups(aws, region, owner):
        admit(aws, region, group, networks)


def admit(aws: Aws, region: str, group: Mapping[str, Any], networks: list[str]) -> None:
    """Make `networks` the only ones that a group lets in, the new ones first."""
    present = {
        item["CidrIp"]
        for rule in group.get("IpPermissions", [])
        if rule.get("FromPort") == 22
        for item in rule.get("IpRanges", [])
    }
    extra = [
        rule for rule in group.get("IpPermissions", []) if rule.get("FromPort") != 22 and rule.get("IpRanges")
    ]
    identity = str(group["GroupId"])
    new, old = sorted(set(networks) - present), sorted(present - set(networks))
    if new:
        _change(aws, "authorize_security_group_ingress", region, identity, [_ssh(new)])
    closed = [_ssh(old)] if old else []
    closed += [
        {
            **{key: rule[key] for key in ("IpProtocol", "FromPort", "ToPort") if key in rule},
            "IpRanges": rule["IpRanges"],
        }
        for rule in extra
    ]
    if closed:
        _change(aws, "revoke_security_group_ingress", region, identity, closed)


def _ssh(networks: list[str]) -> dict[str, Any]:
    return {
        "IpProtocol": "tcp",
        "FromPort": 22,
        "ToPort": 22,
        "IpRanges": [{"CidrIp": item, "Description": "llmctl"} for item in networks],
    }


def _change(aws: Aws, operation: str, region: str, group: str, rules: list[dict[str, Any]]) -> None:
    """A change that another process may have made meanwhile, which is as good."""
    try:
        aws.send("ec2", operation, region, GroupId=group, IpPermissions=rules)
    except Refused as error:
        if error.code not in {"InvalidPermission.Duplicate", "InvalidPermission.NotFound"}:
            raise


def _groups(aws: Aws, region: str, owner: str, vpc: str | None = None) -> list[dict[str, Any]]:
    filters = [{"Name": "group-name", "Values": [group_name(owner)]}]
    filters += [{"Name": "vpc-id", "Values": [vpc]}] if vpc else []
    return [
        item
        for page in aws.pages("ec2", "describe_security_groups", region, Filters=filters)
        for item in page["SecurityGroups"]
    ]


def key_pair(aws: Aws, region: str, owner: str, public_key: str) -> str:
    """The name of this home's key pair in a region, imported where it is missing."""
    name = key_name(owner, public_key)
    filters = [{"Name": "key-name", "Values": [name]}]
    if aws.read("ec2", "describe_key_pairs", region, Filters=filters)["KeyPairs"]:
        return name
    try:
        aws.send(
            "ec2", "import_key_pair", region, KeyName=name, PublicKeyMaterial=public_key.strip().encode()
        )
    except Refused as error:
        if error.code != "InvalidKeyPair.Duplicate":
            raise
    return name


def tags(request: LaunchRequest) -> dict[str, str]:
    """All tags of an instance and its volume."""
    price = {
        PRICE_TAG: str(request.offer.tariff.micro_usd_per_hour),
        VOLUME_TAG: request.offer.options.get("volume_micro_usd", "0"),
    }
    return {"Name": request.marker.name, **request.tags(), **price}


def body(
    request: LaunchRequest, found_image: Mapping[str, Any], subnet_id: str, groups: list[str], key: str
) -> dict[str, Any]:
    """The parameters of RunInstances. Pure. The user data holds the host's private key: never log it."""
    offer, options = request.offer, request.options
    market = offer.options.get("market", "on-demand")
    kinds = ["instance", "volume", *(["spot-instances-request"] if market == "spot" else [])]
    tagged = [{"Key": key_, "Value": value} for key_, value in tags(request).items()]
    made: dict[str, Any] = {
        "ImageId": found_image["ImageId"],
        "InstanceType": offer.instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": request.marker.key,
        "KeyName": key,
        "NetworkInterfaces": [
            {
                "DeviceIndex": 0,
                "SubnetId": subnet_id,
                "Groups": groups,
                "AssociatePublicIpAddress": True,
                "DeleteOnTermination": True,
            }
        ],
        "BlockDeviceMappings": _volumes(offer, found_image),
        "InstanceInitiatedShutdownBehavior": "terminate",
        # The node reads its own lease there; tokens only, and no further hop, so that nothing it runs in a container asks.
        "MetadataOptions": {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
            "HttpEndpoint": "enabled",
            "InstanceMetadataTags": "enabled",
        },
        "TagSpecifications": [{"ResourceType": kind, "Tags": tagged} for kind in kinds],
        "UserData": guarded(request.host_private_key, request.host_public_key, request.marker.lease_end),
    }
    if market == "spot":
        spot: dict[str, Any] = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        cap = options.get("max_usd_per_hour")
        if isinstance(cap, (int, float)):
            nodes = options.get("nodes")
            share = (
                cap / (nodes if isinstance(nodes, int) else 1)
                - int(offer.options.get("volume_micro_usd", "0")) / MICRO
            )
            spot["MaxPrice"] = f"{share:.6f}"
        made["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": spot}
    return made


def _volumes(offer: Offer, found_image: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The root, sized from the spec, and whatever else the image brings: each goes with its instance."""
    root = str(found_image.get("RootDeviceName") or "/dev/sda1")
    mappings = [item for item in found_image.get("BlockDeviceMappings", []) if "Ebs" in item]
    least = max(
        (int(item["Ebs"].get("VolumeSize") or 0) for item in mappings if item.get("DeviceName") == root),
        default=0,
    )
    size = max(int(offer.options.get("volume_gib", "0")), least)
    others = [str(item["DeviceName"]) for item in mappings if item.get("DeviceName") != root]
    return [
        {
            "DeviceName": root,
            "Ebs": {"VolumeSize": size, "VolumeType": "gp3", "DeleteOnTermination": True},
        },
        *({"DeviceName": name, "Ebs": {"DeleteOnTermination": True}} for name in others),
    ]


def redacted(made: Mapping[str, Any]) -> dict[str, Any]:
    """A request whose user data is only counted."""
    return {
        **made,
        "UserData": f"(cloud-config with the node's host key, {len(str(made['UserData']).encode())} bytes)",
    }


def prepare(aws: Aws, request: LaunchRequest, owner: str) -> dict[str, Any]:
    """Everything that a launch needs, in place; the parameters of RunInstances. A read that fails is Ambiguous here, which costs
    a look and a new marker, never a second node."""
    zone, options = request.offer.region, request.options
    region = region_of(zone)
    try:
        net = subnet(aws, zone, options.get("subnet"))
        chosen = texts(options, "security_group")
        together = isinstance(options.get("nodes"), int) and int(str(options["nodes"])) > 1
        groups = chosen or [
            security_group(aws, region, str(net["VpcId"]), owner, this_address(), together=together)
        ]
        key = key_pair(aws, region, owner, request.public_key)
        return body(request, image(aws, region, options.get("image")), str(net["SubnetId"]), groups, key)
    except (Unavailable, Ambiguous) as error:
        raise Ambiguous(f"{error} (before the launch was sent)", code=error.code, hint=error.hint) from None
