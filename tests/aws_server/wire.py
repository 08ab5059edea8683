"""Requests and answers of AWS's protocols, as far as the front has to read and to make them; and moto's own state."""

from __future__ import annotations

import base64
import fnmatch
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

Answer = tuple[str, list[tuple[str, str]], bytes]
"""Status, headers, body."""
ACCOUNT = "123456789012"
REGION = "us-east-1"
PACE = 0.02
IMAGE = "/aws/service/deeplearning/ami/x86_64/oss-nvidia-driver-gpu-pytorch-2.9-ubuntu-24.04/latest/ami-id"
PRICES = {
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "g6.xlarge": 0.8048,
    "p4d.24xlarge": 21.957642,
    "p5.48xlarge": 55.04,
}
REGIONS = ("us-east-1", "us-east-2", "us-west-2")
SOLD = (*PRICES, "g5.48xlarge", "p4de.24xlarge", "p5en.48xlarge", "g4dn.xlarge", "g5g.xlarge", "t3.micro")
"""The types that exist here, of moto's thousand."""
os.environ["MOTO_AMIS_PATH"] = str(Path(__file__).with_name("images.json"))
"""Read when moto is imported: without it each empty account is filled with 1,300 images."""
SECRET = "wJalrXUtnFEMI-llmctl-tests-EXAMPLEKEY"


def ec2(region: str) -> Any:
    """moto's own state."""
    from moto.ec2.models import ec2_backends

    return ec2_backends[ACCOUNT][region]


def narrow(environ: dict[str, Any], parameters: dict[str, str]) -> None:
    """moto knows no wildcards in the names of types, and is slow with all of its thousand: name those that are sold here."""
    patterns = [value for key, value in parameters.items() if key.startswith("Filter.1.Value.")]
    kept = {key: value for key, value in parameters.items() if not key.startswith("Filter.1.Value.")}
    names = [name for name in SOLD if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)] or [
        "none.at-all"
    ]
    kept |= {f"Filter.1.Value.{index}": name for index, name in enumerate(names, 1)}
    data = urlencode(kept).encode()
    environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(data), str(len(data))


def user_data(text: Any) -> str | None:
    if not text:
        return None
    raw = text if isinstance(text, str) else text.decode()
    return raw if raw.startswith("#") else base64.b64decode(raw).decode()


def body_of(environ: dict[str, Any]) -> bytes:
    """Read the body and put it back."""
    if environ.get("HTTP_TRANSFER_ENCODING", "").lower() == "chunked":
        data = environ["wsgi.input"].read()
    else:
        data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(data)
    environ["CONTENT_LENGTH"] = str(len(data))
    return data


def name_of(environ: dict[str, Any], body: bytes) -> tuple[str, dict[str, str], str]:
    """(`ec2 RunInstances` or `s3 GET /bucket/key`, parameters, region)."""
    scope = re.search(
        r"Credential=[^/]+/\d+/([^/]+)/([^/]+)/aws4_request", environ.get("HTTP_AUTHORIZATION", "")
    )
    region, service = (scope[1], scope[2]) if scope else (REGION, "s3")
    if service in {"ec2", "sts"}:
        parameters = {
            key: values[0] for key, values in parse_qs(body.decode(), keep_blank_values=True).items()
        }
        where = parameters.get("NetworkInterface.1.SubnetId", "")
        return f"{service} {parameters.get('Action')} {where}".rstrip(), parameters, region
    if "HTTP_X_AMZ_TARGET" in environ:
        raw = json.loads(body or b"{}")
        filters = {item["Field"]: item["Value"] for item in raw.get("Filters", []) if "Field" in item}
        return f"{service} {environ['HTTP_X_AMZ_TARGET'].rpartition('.')[2]}", filters, region
    query = {
        key: values[0]
        for key, values in parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).items()
    }
    return f"s3 {environ['REQUEST_METHOD']} {unquote(environ['PATH_INFO'])}", query, region


def unsigned(environ: dict[str, Any]) -> str | None:
    """Why S3 would refuse this, as far as signatures go: none at all, version 2, or too old."""
    query = parse_qs(environ.get("QUERY_STRING", ""))
    if environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4-HMAC-SHA256"):
        return None
    if query.get("X-Amz-Algorithm") != ["AWS4-HMAC-SHA256"] or "X-Amz-Signature" not in query:
        return "AccessDenied"
    at = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return "AccessDenied" if time.time() > at.timestamp() + int(query["X-Amz-Expires"][0]) else None


def error(service: str, code: str, status: int) -> tuple[str, list[tuple[str, str]], bytes]:
    words = f"{code} by the test's server"
    if service == "ec2":
        text = f"<Response><Errors><Error><Code>{code}</Code><Message>{words}</Message></Error></Errors><RequestID>0</RequestID></Response>"
    elif service in {"s3", "sts"}:
        inner = f"<Error><Code>{code}</Code><Message>{words}</Message></Error>"
        text = inner if service == "s3" else f"<ErrorResponse>{inner}</ErrorResponse>"
    else:
        body = json.dumps({"__type": code, "message": words}).encode()
        return (
            f"{status} X",
            [("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-errortype", code)],
            body,
        )
    return f"{status} X", [("Content-Type", "text/xml")], text.encode()


def refuse(start_response: Any, name: str, code: str, status: int) -> list[bytes]:
    line, headers, body = error(name.partition(" ")[0], code, status)
    start_response(line, headers)
    return [body]


def drop(environ: dict[str, Any]) -> Any:
    """Close the connection without a word."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError("dropped for the test")


def half(environ: dict[str, Any], answer: bytes) -> Iterator[bytes]:
    yield answer[: len(answer) // 2]
    drop(environ)
