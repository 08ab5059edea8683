"""`doctor` for EC2: whose credentials these are, and which permissions of the shipped policy are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from provisioning import ec2_launch
from provisioning.aws import DENIED, POLICY, Aws
from provisioning.base import Check, CredentialsError, ProviderError
from provisioning.ec2_market import PRICE_LIST_REGION

_NOBODY = "i-00000000000000000"


def check(aws: Aws, hardware: dict[str, object], owner: str) -> list[Check]:
    """The account, its permissions (asked with dry runs, which change nothing), and the network."""
    try:
        who = aws.read("sts", "get_caller_identity")
    except CredentialsError as error:
        return [Check("ec2 account", False, str(error), error.hint)]
    except ProviderError as error:
        return [Check("ec2", False, str(error), error.hint)]
    checks = [Check("ec2 account", True, f"{who.get('Arn')}, region {aws.region}")]
    checks.append(_permissions(aws, owner))
    try:
        found = aws.read("ec2", "describe_subnets", Filters=[{"Name": "default-for-az", "Values": ["true"]}])[
            "Subnets"
        ]
    except ProviderError as error:
        return [*checks, Check("ec2: network", False, str(error), error.hint)]
    given = hardware.get("subnet")
    fine = bool(found or given)
    detail = (
        f"{len(found)} default subnets in {aws.region}"
        if found
        else f"subnet {given}"
        if given
        else f"no default subnet in {aws.region}"
    )
    return [
        *checks,
        Check("ec2: network", fine, detail, "" if fine else "aws ec2 create-default-vpc, or hardware.subnet"),
    ]


def _permissions(aws: Aws, owner: str) -> Check:
    missing = [action for action, probe in _probes(aws, owner).items() if _denied(probe)]
    needed = [action for action in missing if action != "pricing:GetProducts"]
    if needed:
        hint = f"attach {POLICY} to this identity: aws iam put-user-policy --user-name NAME --policy-name llmctl --policy-document file://{POLICY}"
        return Check("ec2: permissions", False, f"missing: {', '.join(missing)}", hint)
    detail = (
        "all of the shipped policy's"
        if not missing
        else "all but pricing:GetProducts: prices are from a dated table"
    )
    return Check("ec2: permissions", True, detail)


def _denied(probe: Callable[[], Any]) -> bool:
    """Whether AWS says that this is not allowed. Any other answer means that it would have gone on, or that nobody knows."""
    try:
        probe()
    except ProviderError as error:
        return error.code in DENIED
    return False


def _probes(aws: Aws, owner: str) -> dict[str, Callable[[], Any]]:
    def dry(operation: str, **parameters: Any) -> Callable[[], Any]:
        return lambda: aws.read("ec2", operation, DryRun=True, **parameters)

    rules = [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.1/32"}]}]
    group = "sg-00000000000000000"
    product = [{"Type": "TERM_MATCH", "Field": "instanceType", "Value": "g5.xlarge"}]
    return {
        "ec2:DescribeRegions": dry("describe_regions"),
        "ec2:DescribeInstances": dry("describe_instances"),
        "ec2:DescribeInstanceTypes": dry("describe_instance_types"),
        "ec2:DescribeInstanceTypeOfferings": dry("describe_instance_type_offerings"),
        "ec2:DescribeSpotPriceHistory": dry("describe_spot_price_history"),
        "ec2:DescribeSpotInstanceRequests": dry("describe_spot_instance_requests"),
        "ec2:DescribeImages": dry("describe_images", Owners=["self"]),
        "ec2:DescribeSubnets": dry("describe_subnets"),
        "ec2:DescribeSecurityGroups": dry("describe_security_groups"),
        "ec2:DescribeKeyPairs": dry("describe_key_pairs"),
        "ec2:DescribeVolumes": dry("describe_volumes"),
        "ec2:RunInstances": lambda: _rehearse(aws),
        "ec2:TerminateInstances": dry("terminate_instances", InstanceIds=[_NOBODY]),
        "ec2:CreateTags": dry("create_tags", Resources=[_NOBODY], Tags=[{"Key": "llmctl-lease", "Value": "0"}]),
        "ec2:CreateSecurityGroup": dry("create_security_group", GroupName=ec2_launch.group_name(owner), Description="llmctl"),
        "ec2:AuthorizeSecurityGroupIngress": dry("authorize_security_group_ingress", GroupId=group, IpPermissions=rules),
        "ec2:RevokeSecurityGroupIngress": dry("revoke_security_group_ingress", GroupId=group, IpPermissions=rules),
        "ec2:ImportKeyPair": dry("import_key_pair", KeyName="llmctl-probe", PublicKeyMaterial=b"ssh-ed25519 AAAA"),
        "ssm:GetParameters": lambda: aws.read("ssm", "get_parameters", Names=list(ec2_launch.IMAGES)),
        "pricing:GetProducts": lambda: aws.read(
            "pricing", "get_products", PRICE_LIST_REGION, ServiceCode="AmazonEC2", Filters=product, MaxResults=1
        ),
    }  # fmt: skip


def _rehearse(aws: Aws) -> Any:
    """A launch that is only checked. AWS looks at the permission after the image, so a real one is named."""
    image = ec2_launch.image(aws, aws.region, None)["ImageId"]
    return aws.read(
        "ec2", "run_instances", DryRun=True, ImageId=image, InstanceType="g5.xlarge", MinCount=1, MaxCount=1
    )
