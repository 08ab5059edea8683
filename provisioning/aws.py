"""Talking to AWS: sessions and clients of boto3, and what AWS's codes mean.

Credentials and the default region come from boto3's own chain (environment, profile, SSO, instance role), `AWS_ENDPOINT_URL`
included. Reads are repeated a few times; what changes something is sent once, because the caller decides what an
answer that never came means.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from provisioning.base import (
    Ambiguous,
    CredentialsError,
    InvalidHardware,
    NoCapacity,
    ProviderError,
    Refused,
    Unavailable,
)

FALLBACK_REGION = "us-east-1"
POLICY = "provisioning/iam-policy.json"
EXTRA = "pip install 'llmctl[aws]'"
READ_TRIES = 4
_QUOTAS = "https://console.aws.amazon.com/servicequotas/home/services/ec2/quotas"

_ACCOUNT = {
    "AuthFailure": ("AWS does not know these credentials", "aws sts get-caller-identity shows whose they are; export AWS_PROFILE or AWS_ACCESS_KEY_ID anew"),
    "InvalidClientTokenId": ("AWS does not know this access key", "it was deleted, or it belongs to another partition: make a new one, or export AWS_PROFILE"),
    "UnrecognizedClientException": ("AWS does not know this access key", "make a new one, or export AWS_PROFILE; a region that is not switched on answers so as well"),
    "InvalidAccessKeyId": ("S3 does not know this access key", "make a new one, or export AWS_PROFILE; at another endpoint check AWS_ENDPOINT_URL_S3"),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key, or this machine's clock is wrong", "copy the secret key again; timedatectl shows the clock"),
    "RequestTimeTooSkewed": ("this machine's clock differs from AWS's by more than it accepts", "set the clock: timedatectl set-ntp true"),
    "RequestExpired": ("the request was too old when it arrived: this machine's clock is wrong", "set the clock: timedatectl set-ntp true"),
    "ExpiredToken": ("the session of these credentials is over", "log in again: aws sso login, or renew AWS_SESSION_TOKEN"),
    "ExpiredTokenException": ("the session of these credentials is over", "log in again: aws sso login, or renew AWS_SESSION_TOKEN"),
    "UnauthorizedOperation": ("this identity may not do that", f"attach {POLICY} to it; `llmctl doctor` names what is missing"),
    "AccessDenied": ("this identity may not do that", f"attach {POLICY} to it; `llmctl doctor` names what is missing"),
    "AccessDeniedException": ("this identity may not do that", f"attach {POLICY} to it; `llmctl doctor` names what is missing"),
    "OptInRequired": ("the account, or the region, is not switched on", "finish the sign-up, or switch the region on under Account → AWS Regions"),
    "PendingVerification": ("AWS is still checking this account in that region", "it takes up to four hours; another region may serve meanwhile"),
    "Blocked": ("AWS has blocked this account", "write to AWS support"),
}  # fmt: skip
_SOLD_OUT = {
    "InsufficientInstanceCapacity": "AWS has no such machine free there now",
    "InsufficientHostCapacity": "AWS has no such machine free there now",
    "InsufficientCapacityOnHost": "AWS has no such machine free there now",
    "InsufficientReservedInstanceCapacity": "AWS has no such machine free there now",
    "InsufficientFreeAddressesInSubnet": "the subnet has no address left",
    "SpotMaxPriceTooLow": "the spot price is above the highest that the spec allows",
    "Unsupported": "that zone does not have this machine",
}
_QUOTA = {
    "VcpuLimitExceeded": "the account's quota of vCPUs for such machines in this region is used up, or is zero",
    "InstanceLimitExceeded": "the account's quota of such machines in this region is used up, or is zero",
    "MaxSpotInstanceCountExceeded": "the account's quota of spot machines in this region is used up, or is zero",
    "VolumeLimitExceeded": "the account's quota of gp3 storage in this region is used up",
}
_REFUSED = {
    "InvalidAMIID.NotFound": ("there is no such image in this region", "an AMI belongs to one region: copy it there, narrow hardware.regions, or leave hardware.image out"),
    "InvalidAMIID.Malformed": ("that is no name of an image", "hardware.image takes ami-… or the name of an SSM parameter (/…)"),
    "InvalidSubnetID.NotFound": ("there is no such subnet in this region", "check hardware.subnet and hardware.regions"),
    "InvalidGroup.NotFound": ("there is no such security group in the network", "check hardware.security_group: it belongs to one VPC"),
    "InvalidParameterCombination": ("AWS does not allow that combination", "the message says which; an image for another processor is the usual one"),
    "IdempotentParameterMismatch": ("this launch was sent before with other values", "`llmctl reap` shows what it started"),
    "NoSuchBucket": ("there is no such bucket", "check the name; `aws s3 mb s3://NAME` makes one"),
    "NoSuchKey": ("there is no such object", "`aws s3 ls` shows what is there"),
}  # fmt: skip
_BUSY = frozenset({"RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequestsException", "SlowDown",
                   "InternalError", "InternalFailure", "ServiceUnavailable", "Unavailable", "RequestTimeout"})  # fmt: skip
DENIED = frozenset({"UnauthorizedOperation", "AccessDenied", "AccessDeniedException"})
"""Not allowed, to credentials that are known."""
GONE = frozenset({"InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed", "InvalidInstanceId"})


def require_boto3() -> None:
    """Raises CredentialsError where the extra is not installed."""
    if find_spec("boto3") is None:
        raise CredentialsError(
            "AWS needs boto3, which is not installed", code="no-extra", hint=f"run {EXTRA}"
        )


class Aws:
    """Clients by service and region. Nothing is sent, and boto3 is not imported, before the first client is asked for."""

    def __init__(self) -> None:
        require_boto3()
        self._lock = threading.RLock()
        self._session: Any = None
        self._clients: dict[tuple[object, ...], Any] = {}

    @property
    def session(self) -> Any:
        """The boto3 session. Raises CredentialsError for a profile that does not exist."""
        import boto3
        from botocore.exceptions import BotoCoreError

        with self._lock:
            if self._session is None:
                try:
                    self._session = boto3.session.Session()
                except BotoCoreError as error:
                    raise without_answer(error, "boto3", effect=False) from None
            return self._session

    @property
    def region(self) -> str:
        """The region that the configuration names, else us-east-1."""
        return str(self.session.region_name or FALLBACK_REGION)

    def client(self, service: str, region: str | None = None, *, once: bool = False, **config: Any) -> Any:
        """A client; `once`: it sends a request a single time. `config` goes to botocore's Config."""
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        with self._lock:
            key = (
                service,
                region or self.region,
                once,
                *sorted((name, str(value)) for name, value in config.items()),
            )
            if key not in self._clients:
                retries = {"mode": "standard", "total_max_attempts": 1 if once else READ_TRIES}
                settings = Config(retries=retries, connect_timeout=10, read_timeout=60, max_pool_connections=16,
                                  user_agent_extra="llmctl", **config)  # fmt: skip
                try:
                    self._clients[key] = self.session.client(service, region_name=key[1], config=settings)
                except (BotoCoreError, ValueError) as error:
                    raise without_answer(error, service, effect=False) from None
            return self._clients[key]

    def read(
        self, service: str, operation: str, region: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """One read. Raises Unavailable, CredentialsError, Refused."""
        return _call(self.client(service, region), operation, parameters, effect=False)

    def pages(
        self, service: str, operation: str, region: str | None = None, **parameters: Any
    ) -> Iterator[dict[str, Any]]:
        """All pages of a list. Raises as `read` does."""
        token: dict[str, str] = {}
        while True:
            page = self.read(service, operation, region, **parameters, **token)
            yield page
            following = page.get("NextToken")
            if not following:
                return
            token = {"NextToken": following}

    def send(
        self, service: str, operation: str, region: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """One change, sent once. Raises Ambiguous where nobody knows whether it happened, Refused, CredentialsError."""
        return _call(self.client(service, region, once=True), operation, parameters, effect=True)


def _call(client: Any, operation: str, parameters: dict[str, Any], *, effect: bool) -> dict[str, Any]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        answer: dict[str, Any] = getattr(client, operation)(**parameters)
    except ClientError as error:
        raise refusal(error, operation, parameters, effect=effect) from None
    except (BotoCoreError, ResponseParserError) as error:
        raise without_answer(error, operation, effect=effect) from None
    return answer


def refusal(error: Any, operation: str, parameters: dict[str, Any], *, effect: bool) -> ProviderError:
    """What a code of AWS means here: the code itself, its meaning, AWS's own words, and the next step."""
    said = error.response.get("Error", {})
    code, words = str(said.get("Code", "unknown")), str(said.get("Message", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))

    def text(meaning: str) -> str:
        return f"{operation}: {code}: {meaning}" + (f" (AWS: {words})" if words else "")

    if code in _SOLD_OUT:
        hint = "the next zone, region or type of the spec is tried; `--wait 6h` goes on asking"
        return NoCapacity(text(_SOLD_OUT[code]), code=code, hint=hint)
    if code in _QUOTA:
        return Refused(text(_QUOTA[code]), code=code, hint=quota_hint(parameters))
    if code in _ACCOUNT:
        meaning, hint = _ACCOUNT[code]
        return CredentialsError(text(meaning), code=code, hint=hint)
    if code in _BUSY or status >= 500 or status == 429:
        kind = Ambiguous if effect else Unavailable
        return kind(
            text("AWS is busy or broken"),
            code=code,
            hint="it is tried again by itself; see health.aws.amazon.com",
        )
    meaning, hint = _REFUSED.get(
        code, ("AWS refused", "the message says why; correct the hardware section and plan again")
    )
    return Refused(text(meaning), code=code, hint=hint)


def quota_hint(parameters: dict[str, Any]) -> str:
    """Which quota to raise for a launch, and how."""
    kind, spot = str(parameters.get("InstanceType", "")), "InstanceMarketOptions" in parameters
    family = (
        "P5 "
        if spot and kind.startswith("p5")
        else "P"
        if kind.startswith("p")
        else "G"
        if kind.startswith(("g", "vt"))
        else ""
    )
    known = {
        ("P", False): ("Running On-Demand P instances", "L-417A185B"),
        ("G", False): ("Running On-Demand G and VT instances", "L-DB2E81BA"),
        ("", False): ("Running On-Demand Standard instances", "L-1216C47A"),
        ("P", True): ("All P4, P3 and P2 Spot Instance Requests", "L-7212CCBC"),
        ("P5 ", True): ("All P5 Spot Instance Requests", "L-C4BD4855"),
        ("G", True): ("All G and VT Spot Instance Requests", "L-3819A6DF"),
        ("", True): ("All Standard Spot Instance Requests", "L-34B43A08"),
    }  # fmt: skip
    name, code = known[family, spot]
    return (
        f"raise the quota “{name}” ({code}; it counts vCPUs) in that region: "
        f"aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {code} --desired-value N, or {_QUOTAS}/{code}; "
        "or name a region under hardware.regions in which you have it"
    )


def without_answer(error: Exception, operation: str, *, effect: bool) -> ProviderError:
    """A failure on this side of the wire, or an answer that cannot be read."""
    name = type(error).__name__
    if name in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ConfigNotFound"}:
        hint = "run `aws configure`, or export AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return CredentialsError(f"there are no AWS credentials: {error}", code="no-key", hint=hint)
    if name in {"TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "SSOError", "CredentialRetrievalError",
                "RefreshWithMFAUnsupportedError", "LoginRefreshRequired"}:  # fmt: skip
        return CredentialsError(
            f"the AWS login is over: {error}", code="login", hint="log in again: aws sso login"
        )
    if name in {
        "ParamValidationError",
        "InvalidRegionError",
        "UnknownServiceError",
        "NoRegionError",
        "ValueError",
    }:
        return InvalidHardware(
            f"{operation}: {error}",
            code=name,
            hint="check the region (AWS_REGION, hardware.regions) and AWS_ENDPOINT_URL",
        )
    where = os.environ.get("AWS_ENDPOINT_URL")
    hint = (
        f"check AWS_ENDPOINT_URL ({where})"
        if where
        else "check the network; a region that does not exist has no endpoint either"
    )
    return (Ambiguous if effect else Unavailable)(
        f"{operation}: no answer from AWS: {error}", code=name, hint=hint
    )
