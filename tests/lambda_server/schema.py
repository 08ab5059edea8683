"""What the API promises, in both directions: a hand-made extract of the parts of the official OpenAPI document that
llmctl uses. Where that document is at hand (`../shared` beside the repository) the server validates against it instead,
and a test compares the two.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "lambda-cloud-openapi.json"

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}


def text(longest: int | None = None, *, shortest: int | None = None, pattern: str | None = None) -> Schema:
    limits = {"maxLength": longest, "minLength": shortest, "pattern": pattern}
    return TEXT | {name: value for name, value in limits.items() if value is not None}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def shape(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": required | optional, "required": list(required)}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def error(code: str, *, suggestion: bool) -> Schema:
    fields = {"code": {"const": code, "type": "string"}, "message": TEXT}
    return shape(fields | {"suggestion": TEXT}) if suggestion else shape(fields, suggestion=TEXT)


_ACTIONS = ("migrate", "rebuild", "restart", "cold_reboot", "terminate")
SCHEMAS: dict[str, Schema] = {
    "Region": shape({"name": TEXT, "description": TEXT}),
    "InstanceTypeSpecs": shape({"vcpus": WHOLE, "memory_gib": WHOLE, "storage_gib": WHOLE, "gpus": WHOLE}),
    "InstanceType": shape(
        {"name": TEXT, "description": TEXT, "gpu_description": TEXT, "price_cents_per_hour": WHOLE}
        | {"specs": ref("InstanceTypeSpecs")}
    ),
    "InstanceTypesItem": shape(
        {"instance_type": ref("InstanceType"), "regions_with_capacity_available": listed(ref("Region"))}
    ),
    "InstanceTypes": {"type": "object", "additionalProperties": ref("InstanceTypesItem")},
    "InstanceStatus": {
        "enum": ["booting", "active", "unhealthy", "terminated", "terminating", "preempted"],
        "type": "string",
    },
    "InstanceActionAvailabilityDetails": shape({"available": FLAG}, reason_description=TEXT),
    "InstanceActionAvailability": shape(
        {name: ref("InstanceActionAvailabilityDetails") for name in _ACTIONS}
    ),
    "TagEntry": shape({"key": TEXT, "value": TEXT}),
    "RequestedTagEntry": shape({"key": text(55, pattern="^[a-z][a-z0-9-:]+$"), "value": text(128)}),
    "FilesystemMountEntry": shape({"mount_point": TEXT, "file_system_id": TEXT}),
    "Instance": shape(
        {
            "id": TEXT,
            "status": ref("InstanceStatus"),
            "ssh_key_names": listed(TEXT),
            "file_system_names": listed(TEXT),
        }
        | {
            "region": ref("Region"),
            "instance_type": ref("InstanceType"),
            "actions": ref("InstanceActionAvailability"),
        },
        name=text(64, shortest=0),
        ip=TEXT,
        private_ip=TEXT,
        file_system_mounts=listed(ref("FilesystemMountEntry")),
        hostname=TEXT,
        jupyter_token=TEXT,
        jupyter_url=TEXT,
        tags=listed(ref("TagEntry")),
    ),
    "InstanceLaunchResponse": shape({"instance_ids": listed(TEXT)}),
    "InstanceTerminateResponse": shape({"terminated_instances": listed(ref("Instance"))}),
    "SSHKey": shape({"id": TEXT, "name": text(64, shortest=1), "public_key": text(4096, shortest=1)}),
    "UserStatus": {"enum": ["active", "deactivated"], "type": "string"},
    "User": shape({"id": TEXT, "email": TEXT, "status": ref("UserStatus")}),
    "Filesystem": shape(
        {"id": TEXT, "name": TEXT, "mount_point": TEXT, "created": TEXT | {"format": "date-time"}}
        | {"created_by": ref("User"), "is_in_use": FLAG, "region": ref("Region")},
        bytes_used=WHOLE,
    ),
    "AuditEvent": shape(
        {
            "service_name": TEXT,
            "resource_name": TEXT,
            "action": TEXT,
            "catalog_version": TEXT,
            "event_id": TEXT,
        }
        | {
            "event_time": TEXT,
            "actor_lrn": {"anyOf": [TEXT, {"type": "null"}]},
            "resource_lrns": listed(TEXT),
        }
        | {"resource_owner_lrn": {"anyOf": [TEXT, {"type": "null"}]}}
        | {
            "request_api_key_lrn": {"anyOf": [TEXT, {"type": "null"}]},
            "additional_details": {"type": "object"},
        }
    ),
    "ImageSpecificationID": shape({"id": TEXT}),
    "ImageSpecificationFamily": shape({"family": TEXT}),
    "ApiErrorUnauthorized": error("global/invalid-api-key", suggestion=True),
    "ApiErrorAccountInactive": error("global/account-inactive", suggestion=True),
    "ApiErrorInvalidBillingAddress": error("global/invalid-address", suggestion=True),
    "ApiErrorForbidden": error("global/forbidden", suggestion=False),
    "ApiErrorInvalidParameters": error("global/invalid-parameters", suggestion=False),
    "ApiErrorInstanceNotFound": error("global/object-does-not-exist", suggestion=False),
    "ApiErrorLaunchResourceNotFound": error("global/object-does-not-exist", suggestion=True),
    "ApiErrorNotFound": error("global/not-found", suggestion=False),
    "ApiErrorQuotaExceeded": error("global/quota-exceeded", suggestion=True),
    "ApiErrorInsufficientCapacity": error(
        "instance-operations/launch/insufficient-capacity", suggestion=False
    ),
    "ApiErrorFileSystemInWrongRegion": error(
        "instance-operations/launch/file-system-in-wrong-region", suggestion=False
    ),
}

LAUNCH = shape(
    {"region_name": TEXT, "instance_type_name": TEXT, "ssh_key_names": listed(TEXT)},
    file_system_names=listed(TEXT),
    hostname=text(63, shortest=1, pattern="^[a-z0-9][0-9a-z-]{0,62}$"),
    name=text(64, shortest=0),
    image={"anyOf": [ref("ImageSpecificationID"), ref("ImageSpecificationFamily")]},
    user_data=TEXT,
    tags=listed(ref("RequestedTagEntry")),
)
TERMINATE = shape({"instance_ids": listed(TEXT)})
RENAME = shape({}, name=text(64, shortest=0))
ADD_KEY = shape({"name": text(64, shortest=1)}, public_key=text(4096, shortest=1))

_INVALID, _NOT_FOUND, _INACTIVE = "ApiErrorInvalidParameters", "ApiErrorNotFound", "ApiErrorAccountInactive"
_NO_INSTANCE = "ApiErrorInstanceNotFound"


def _operation(
    data: Schema, errors: dict[str, list[str]], body: Schema | None = None, **more: Schema
) -> Schema:
    def json_body(content: Schema) -> Schema:
        return {"content": {"application/json": {"schema": content}}}

    def one(names: list[str]) -> Schema:
        return {"anyOf": [ref(name) for name in names]} if len(names) > 1 else ref(names[0])

    success = shape({"data": data} | more) | {"additionalProperties": False}
    answers = {"200": json_body(success)}
    for status, names in ({"401": ["ApiErrorUnauthorized"], "403": [_INACTIVE]} | errors).items():
        answers[status] = json_body(shape({"error": one(names)}) | {"additionalProperties": False})
    return {"responses": answers} | ({"requestBody": json_body(body)} if body else {})


_READ = {"400": [_INVALID], "404": [_NOT_FOUND]}
_ONE = {"400": [_INVALID], "404": [_NO_INSTANCE]}
PATHS: dict[str, dict[str, Schema]] = {
    "/api/v1/instance-types": {"get": _operation(ref("InstanceTypes"), _READ)},
    "/api/v1/instances": {
        "get": _operation(listed(ref("Instance")), _READ | {"403": [_INACTIVE, "ApiErrorForbidden"]})
    },
    "/api/v1/instances/{id}": {
        "get": _operation(ref("Instance"), _ONE | {"403": [_INACTIVE, "ApiErrorForbidden"]}),
        "post": _operation(ref("Instance"), _ONE, RENAME),
    },
    "/api/v1/instance-operations/launch": {
        "post": _operation(
            ref("InstanceLaunchResponse"),
            {
                "400": [
                    "ApiErrorFileSystemInWrongRegion",
                    "ApiErrorInsufficientCapacity",
                    "ApiErrorLaunchResourceNotFound",
                    "ApiErrorQuotaExceeded",
                    _INVALID,
                ],
                "403": [_INACTIVE, "ApiErrorInvalidBillingAddress"],
                "404": ["ApiErrorLaunchResourceNotFound"],
            },
            LAUNCH,
        )
    },
    "/api/v1/instance-operations/terminate": {
        "post": _operation(ref("InstanceTerminateResponse"), _ONE, TERMINATE)
    },
    "/api/v1/ssh-keys": {
        "get": _operation(listed(ref("SSHKey")), _READ),
        "post": _operation(ref("SSHKey"), _READ, ADD_KEY),
    },
    "/api/v1/file-systems": {"get": _operation(listed(ref("Filesystem")), _READ)},
    "/api/v1/audit-events": {
        "get": _operation(listed(ref("AuditEvent")), _READ, page_token={"anyOf": [TEXT, {"type": "null"}]})
    },
}
EXTRACT: Schema = {"paths": PATHS, "components": {"schemas": SCHEMAS}}


@lru_cache(1)
def document() -> Schema:
    """The official document where it is at hand, else the extract."""
    if OFFICIAL.exists():
        official: Schema = json.loads(OFFICIAL.read_text(encoding="utf-8"))
        return official
    return EXTRACT


@lru_cache(64)
def _validator(path: str, method: str, status: str) -> Draft202012Validator | None:
    operation = document()["paths"][path][method]
    part = operation["requestBody"] if status == "request" else operation["responses"].get(status)
    if part is None:
        return None
    content = part["content"]["application/json"]["schema"]
    if status == "request":
        # The document leaves open what becomes of unknown request fields; a client of ours sends none.
        content = content | {"additionalProperties": False}
    return Draft202012Validator({"components": document()["components"]} | content)


def complaint(path: str, method: str, status: str, body: object) -> str | None:
    """What is wrong with a request (`status` "request") or an answer, or None."""
    if path not in PATHS:
        return None
    validator = _validator(path, method.lower(), status)
    if validator is None:
        return f"{method} {path} has no answer {status}"
    found = next(iter(validator.iter_errors(body)), None)
    return None if found is None else f"{method} {path} {status}: {found.json_path}: {found.message[:200]}"
