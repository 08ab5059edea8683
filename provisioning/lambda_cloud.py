"""Provider `lambda`: Lambda Cloud's on-demand instances.

A node carries three notes of its own: a unique name that holds the lease (`extend` renames it, tags cannot be changed),
the tags `llmctl-intent`, `llmctl-owner` and `llmctl-lease`, and the name of the SSH key, which holds the owner. Any of
them may fail to come back, so the inventory reads whichever it finds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter

from provisioning import lambda_offers
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
    utc,
)
from provisioning.cloudinit import LARGEST_BYTES, RISK, SelfTerminate, user_data
from provisioning.lambda_api import CONSOLE, GONE_CODES, LambdaApi, base_url, find_credentials, redacted
from provisioning.lambda_models import (
    AuditEvent,
    AuditLog,
    Filesystem,
    Instance,
    SSHKey,
    filesystem_sentence,
    node_facts,
)
from provisioning.ratelimit import Limiter, Rates, SharedReading
from runs.facts import BillingEvidence, Inventory, Marker, NodeFacts, Offer

_INSTANCES = TypeAdapter(list[Instance])
_KEYS = TypeAdapter(list[SSHKey])
_FILESYSTEMS = TypeAdapter(list[Filesystem])
_EVENTS = TypeAdapter(list[AuditEvent])
_NODES = TypeAdapter(list[NodeFacts])
_OVER = frozenset({"terminating", "terminated", "preempted"})
AUDIT_SECONDS = 10.0
"""How old a reading of the audit log may be: its events are minutes late themselves."""
MOUNTS = "/lambda/nfs"
"""Where a filesystem is on the node, by its name (the API document, `mount_point`)."""
_IMAGE_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def open(home: Home, hardware: dict[str, object]) -> LambdaCloud:  # noqa: A001 - the registry's word: lambda_cloud.open
    """The provider for this account. Nothing is sent yet; a missing key is an error of the first call, not of this one.

    `LLMCTL_TEST_PACE` (docs/assumptions.md) scales every wait for tests against a server whose seconds are short.
    """
    pace = float(os.environ.get("LLMCTL_TEST_PACE", "1"))
    url, credentials = base_url(), find_credentials()
    secret = credentials.key.get_secret_value() if credentials else ""
    directory = _state_directory(home, hashlib.sha256(f"{url} {secret}".encode()).hexdigest()[:16])
    limiter = Limiter(directory / "turns.json", Rates().scaled(pace), sleep=home.sleep)
    return LambdaCloud(
        home,
        hardware,
        LambdaApi(credentials, url, limiter, pace=pace),
        instances=SharedReading(directory / "instances.json", 5.0 * pace, sleep=home.sleep),
        types=SharedReading(directory / "types.json", 5.0 * pace, sleep=home.sleep),
        audit=SharedReading(
            directory / "audit.json", AUDIT_SECONDS * pace, patience_seconds=60.0, sleep=home.sleep
        ),
        pace=pace,
    )


def _state_directory(home: Home, account: str) -> Path:
    """A private directory of this user and account, whatever LLMCTL_HOME is: the limits are the account's."""
    import platformdirs

    for parent in (platformdirs.user_cache_path("llmctl"), home.path):
        directory = parent / f"lambda-{account}"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(directory, os.W_OK):
            return directory
    raise InvalidHardware(
        f"neither the user's cache directory nor {home.path} can be written",
        code="not-writable",
        hint="set LLMCTL_HOME to a directory of yours",
    )


class LambdaCloud:
    """The Provider protocol over Lambda's API."""

    name = "lambda"

    def __init__(
        self,
        home: Home,
        hardware: dict[str, object],
        api: LambdaApi,
        *,
        instances: SharedReading,
        types: SharedReading,
        audit: SharedReading,
        pace: float = 1.0,
    ) -> None:
        self._home = home
        self._hardware = hardware
        self._api = api
        self._shared, self._types, self._audit = instances, types, audit
        self.traits = Traits(
            looks=3,
            look_seconds=60 * pace,
            rented=True,
            boot_poll_seconds=10 * pace,
            terminate_poll_seconds=5 * pace,
            capacity_poll_seconds=60 * pace,
            watch_seconds=60 * pace,
            retry_seconds=5 * pace,
            unreachable_seconds=1200 * pace,
            lease_on_node=bool(hardware.get("self_terminate")),
            audited=True,
            tells_capacity=True,
            cache=f"{MOUNTS}/{hardware['filesystem']}/llmctl" if hardware.get("filesystem") else None,
            risk=RISK if hardware.get("self_terminate") else "",
        )

    def offers(self, hardware: dict[str, object]) -> list[Offer]:
        """See Provider. One reading, at most five seconds old, serves all. An empty map of types is not believed: Lambda always lists
        what it sells, sold out or not."""

        def fetch() -> tuple[float, str]:
            answer = self._api.read("GET", "/instance-types")
            return answer.sent_at, json.dumps(answer.data)

        seen: float | None = None
        for _ in range(2):
            seen, text = self._types.read(fetch, newer_than=seen)
            items = lambda_offers.readable(json.loads(text))
            if items:
                return lambda_offers.offers(items, hardware)
        raise Unavailable(
            "Lambda answered that it has no instance types at all, which cannot be true",
            code="empty-answer",
            hint="try again in a minute",
        )

    def launch(self, request: LaunchRequest) -> str:
        """See Provider. Sends at most one launch; what goes wrong before it is Ambiguous too, which costs a look, never
        a second node."""
        try:
            body = self._body(request, self._key_name(request))
        except Unavailable as error:
            raise Ambiguous(
                f"{error} (before the launch was sent)", code=error.code, hint=error.hint
            ) from None
        try:
            answer = self._api.send("/instance-operations/launch", body, launch=True)
        finally:
            self._shared.forget()
        data = answer.data
        ids = data.get("instance_ids") if isinstance(data, dict) else None
        if not isinstance(ids, list) or len(ids) != 1 or not isinstance(ids[0], str):
            raise Ambiguous(
                "Lambda accepted the launch but named no single instance",
                code="unreadable",
                hint=f"see {CONSOLE}",
            )
        return ids[0]

    def redacted(self, request: LaunchRequest) -> dict[str, object]:
        """See Provider. Asks nobody: an own key that is registered under another name shows as the name it would get."""
        body = self._body(request, self._given_key_name(request) or self._own_key_name())
        return {
            "method": "POST",
            "url": f"{self._api.url}/instance-operations/launch",
            "json": redacted(body),
        }

    def inventory(self, newer_than: datetime | None = None) -> Inventory:
        """See Provider. One reading, at most five seconds old, serves every llmctl process of this user; `newer_than`
        asks for one that was sent later than that."""

        def fetch() -> tuple[float, str]:
            answer = self._api.read("GET", "/instances")
            nodes = [node_facts(instance) for instance in answer.parsed(_INSTANCES)]
            # To the microsecond, as the caller sees it: `newer_than=inventory.at` must not find this one again.
            return utc(answer.sent_at).timestamp(), _NODES.dump_json(nodes).decode()

        at, text = self._shared.read(fetch, newer_than=newer_than.timestamp() if newer_than else None)
        return Inventory(at=utc(at), nodes=_NODES.validate_json(text))

    def find(self, node_id: str) -> NodeFacts | None:
        """See Provider. Only a code that says "does not exist" is a None; no other error is evidence of an end."""
        if not re.fullmatch(r"[A-Za-z0-9-]+", node_id):
            return None
        answer = self._api.look_up(f"/instances/{node_id}")
        return node_facts(answer.parsed(TypeAdapter(Instance))) if answer else None

    def terminate(self, node_id: str) -> None:
        """See Provider. Goes before everything else that waits for a turn. A 200 that does not name the node is no
        acceptance, and "does not exist" is verified by looking."""
        try:
            answer = self._api.send(
                "/instance-operations/terminate", {"instance_ids": [node_id]}, urgent=True
            )
        except Refused as error:
            if error.code not in GONE_CODES:
                raise
            self._verify_gone(node_id)
            return
        finally:
            self._shared.forget()
        data = answer.data
        ended = data.get("terminated_instances") if isinstance(data, dict) else None
        named = (
            [item.get("id") for item in ended if isinstance(item, dict)] if isinstance(ended, list) else []
        )
        if node_id not in named:
            message = f"Lambda answered the terminate of {node_id} without naming it"
            raise Ambiguous(message, code="unreadable", hint=f"see {CONSOLE}")

    def _verify_gone(self, node_id: str) -> None:
        try:
            node = self.find(node_id)
        except Unavailable as error:
            raise Ambiguous(
                f"whether {node_id} is gone is not known: {error}", code=error.code, hint=error.hint
            ) from None
        if node is not None and node.status not in _OVER:
            raise Ambiguous(
                f"Lambda says that {node_id} does not exist, and shows it",
                code="contradiction",
                hint=f"see {CONSOLE}",
            )

    def extend(self, node_id: str, marker: Marker) -> None:
        """See Provider. A rename may be repeated, so it is. Raises Refused where the name did not change."""
        try:
            answer = self._api.read("POST", f"/instances/{node_id}", json={"name": marker.name})
        finally:
            self._shared.forget()
        data = answer.data
        name = data.get("name") if isinstance(data, dict) else None
        if name not in (None, marker.name):
            raise Refused(
                f"Lambda kept the name {name} of {node_id}: its lease there has not changed",
                code="rename-ignored",
                hint="llmctl on other machines still sees the old lease; run `llmctl extend` again",
            )

    def check(self) -> Sequence[Check]:
        """See Provider. Stops at the first fault: what follows would fail for the same reason."""
        checks: list[Check] = []
        try:
            checks.append(Check("lambda: API key", True, f"from {self._api.credentials.source}"))
            nodes = self.inventory().nodes
            checks.append(Check("lambda: account", True, f"{self._api.url} answers; {len(nodes)} instances"))
            checks.append(self._check_ssh_key())
            held = self._api.read("GET", "/file-systems").parsed(_FILESYSTEMS)
        except ProviderError as error:
            return [*checks, Check("lambda", False, str(error), error.hint)]
        quota = f"Lambda tells no quota; {len(nodes)} instances and {len(held)} filesystems count against it"
        return [*checks, Check("lambda: quota", True, quota)]

    def leftovers(self) -> Sequence[str]:
        """See Provider: filesystems bill by the hour for what they hold, mounted or not."""
        held = self._api.read("GET", "/file-systems").parsed(_FILESYSTEMS)
        return [filesystem_sentence(filesystem) for filesystem in held]

    def billing_evidence(self, node_id: str, since: datetime) -> BillingEvidence:
        """See Provider. The names of the actions are in no document: the first event about an instance is its launch, and
        its end is the last one whose action speaks of terminating or deleting."""
        events = [event for event in self._audit_log(since) if event.concerns(node_id)]
        dated = sorted(
            (event.event_time.astimezone(UTC), event.action.lower()) for event in events if event.event_time
        )
        ends = [at for at, action in dated if "terminat" in action or "delet" in action]
        launched = dated[0][0] if dated and dated[0][0] not in ends else None
        return BillingEvidence(
            source="Lambda's audit log", launched=launched, ended=ends[-1] if ends else None
        )

    def _audit_log(self, since: datetime) -> list[AuditEvent]:
        """The account's log from the hour of `since` on. One reading, a few seconds old, serves every process: runs that end
        together ask about the same hour, page by page at one page a second."""
        start = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0)

        def fetch() -> tuple[float, str]:
            params = {"start": start.isoformat().replace("+00:00", "Z")}
            events: list[AuditEvent] = []
            for _ in range(25):
                answer = self._api.read("GET", "/audit-events", params=params)
                events = [*events, *answer.parsed(_EVENTS)]
                token = answer.body.get("page_token")
                if not isinstance(token, str) or not token:
                    break
                params["page_token"] = token
            return answer.sent_at, AuditLog(start=start, events=events).model_dump_json()

        log = AuditLog.model_validate_json(self._audit.read(fetch)[1])
        if log.start > start:
            self._audit.forget()
            log = AuditLog.model_validate_json(self._audit.read(fetch)[1])
        return log.events

    def _body(self, request: LaunchRequest, key_name: str) -> dict[str, object]:
        options = request.options
        if len(request.marker.name) > 64:
            raise InvalidHardware(
                f"the node's name {request.marker.name} is longer than Lambda's 64 characters", code="name"
            )
        body: dict[str, object] = {
            "region_name": request.offer.region,
            "instance_type_name": request.offer.instance_type,
            "ssh_key_names": [key_name],
            "name": request.marker.name,
            "tags": [{"key": key, "value": value} for key, value in request.tags().items()],
        }
        if image := options.get("image"):
            body["image"] = {"id" if _IMAGE_ID.fullmatch(str(image)) else "family": str(image)}
        if filesystem := options.get("filesystem"):
            body["file_system_names"] = [str(filesystem)]
        data = user_data(request.host_private_key, request.host_public_key, self._guard(request))
        if data is not None:
            assert len(data.encode()) <= LARGEST_BYTES
            body["user_data"] = data
        return body

    def _guard(self, request: LaunchRequest) -> SelfTerminate | None:
        if not (request.options.get("self_terminate") or self._hardware.get("self_terminate")):
            return None
        key = self._api.credentials.key.get_secret_value()
        return SelfTerminate(key, self._api.url, request.marker.key, request.marker.lease_end)

    def _given_key_name(self, request: LaunchRequest) -> str | None:
        name = request.options.get("ssh_key_name") or self._hardware.get("ssh_key_name")
        return str(name) if name else None

    def _own_key_name(self) -> str:
        return f"llmctl-{self._home.owner}"[:55]

    def _key_name(self, request: LaunchRequest) -> str:
        """The one key name of the launch: the spec's, or that of our own key, registered on first use. An own key is
        found by what it is, not by its name, so a lost answer or another machine cannot register it twice."""
        given = self._given_key_name(request)
        if given is not None:
            return given
        keys = self._registered_keys()
        mine = _key_material(request.public_key)
        found = next((key.name for key in keys if _key_material(key.public_key) == mine), None)
        if found:
            return found
        name = self._own_key_name()
        if any(key.name == name for key in keys):
            name = f"{name}-{hashlib.sha256(mine.encode()).hexdigest()[:8]}"
        body = {"name": name, "public_key": request.public_key.strip()}
        for last in (False, False, True):
            try:
                self._api.send("/ssh-keys", body)
                break
            except Ambiguous:  # registering the same key again is harmless, unlike a launch
                if any(_key_material(key.public_key) == mine for key in self._registered_keys()):
                    break
                if last:
                    raise
        return name

    def _registered_keys(self) -> list[SSHKey]:
        return self._api.read("GET", "/ssh-keys").parsed(_KEYS)

    def _check_ssh_key(self) -> Check:
        names = [key.name for key in self._registered_keys()]
        given = self._hardware.get("ssh_key_name")
        if given:
            fine = given in names
            hint = "register it at https://cloud.lambda.ai/ssh-keys, or leave ssh_key_name out"
            detail = f"{given} is {'' if fine else 'not '}registered"
            return Check("lambda: SSH key", fine, detail, "" if fine else hint)
        known = any(name.startswith(self._own_key_name()) for name in names)
        return Check(
            "lambda: SSH key",
            True,
            "llmctl's own is registered" if known else "llmctl registers its own at the first launch",
        )


def _key_material(public_key: str) -> str:
    """Type and base64 of an OpenSSH public key, without its comment."""
    return " ".join(public_key.split()[:2])
